"""Run by `deltanet push` in a process of its own: load what would be published, generate a token, print what was seen.

    python load_check.py model FOLDER ""
    python load_check.py adapter FOLDER BASE_FOLDER

A model is loaded by the code in its folder, as a user without this package would: so this file imports none of it.
"""

import json
import sys
from pathlib import Path

import torch
import transformers


kind, folder, local_base = sys.argv[1:]
problems: list[tuple[str, int | None, str]] = []

if kind == "model":
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    name = config.architectures[0]
    auto_class = next(auto for auto, where in config.auto_map.items() if str(where).endswith(f".{name}"))
    model, info = getattr(transformers, auto_class).from_pretrained(
        folder, trust_remote_code=True, dtype="auto", output_loading_info=True
    )
    if not type(model).__module__.startswith("transformers_modules."):
        problems.append(
            ("config.json", None, f"auto_map leads to {type(model).__module__}, not to the code in the folder")
        )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            problems.append(("*.safetensors", None, f"{what.replace('_', ' ')}: {sorted(map(str, info[what]))[:5]}"))
    transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
else:
    from peft import AutoPeftModelForCausalLM

    import modeling_deltanet  # noqa: F401 (an adapter brings no code: its base is loaded by this package's)

    if local_base:
        file = Path(folder, "adapter_config.json")
        stored = json.loads(file.read_text(encoding="utf-8"))
        file.unlink()  # it may be a link to the original
        file.write_text(json.dumps(stored | {"base_model_name_or_path": local_base}), encoding="utf-8")
    model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype="auto")
    name = type(model).__name__

for parameter_name, parameter in model.named_parameters():
    if not torch.isfinite(parameter).all():
        problems.append(("*.safetensors", None, f"{parameter_name} holds values that are not finite"))

prompt = torch.ones(1, 4, dtype=torch.long)
new_tokens = 0
with torch.no_grad():
    if hasattr(model, "generate"):
        new_tokens = model.generate(prompt, max_new_tokens=1, do_sample=False).shape[1] - prompt.shape[1]
    else:
        model(prompt)
if hasattr(model, "generate") and new_tokens != 1:
    problems.append(("config.json", None, "the model generates no token"))
parameters = sum(parameter.numel() for parameter in model.parameters())
print(json.dumps({"class": name, "parameters": parameters, "new_tokens": new_tokens, "problems": problems}))
