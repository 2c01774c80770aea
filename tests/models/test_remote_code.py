"""Remote code: what a published folder does where this package is not installed.

The package is left out for real: each script runs in a virtual environment of its own, whose site-packages links to
everything that is installed here except this package, in an empty folder, without PYTHONPATH.
"""

import json
import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest


OWN = ("modeling_deltanet", "modeling-deltanet", "deltanet_kernels", "deltanet_conversion")

PUBLISH = """
import sys

import torch

sys.path.insert(0, {tests!r})
from tiny import tiny_model, tokens

import modeling_deltanet
from modeling_deltanet import DeltaNetForSequenceClassification

modeling_deltanet.register_remote_code()
x, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
mask[0, :6] = 0
for name, fields in ("hybrid", {{"linear_use_output_gate": True}}), ("all_linear", {{"layer_types": ["linear_attention"] * 2}}):
    model = tiny_model(**fields)
    model.save_pretrained(name)
    with torch.no_grad():
        logits = model(x, attention_mask=mask).logits
    text = model.generate(x, attention_mask=mask, max_new_tokens=8, do_sample=False)
    torch.save({{"x": x, "mask": mask, "logits": logits, "text": text}}, name + ".pt")
classifier = tiny_model(DeltaNetForSequenceClassification, num_labels=5)
classifier.save_pretrained("classifier")
with torch.no_grad():
    torch.save({{"x": x, "mask": mask, "logits": classifier(x, attention_mask=mask).logits}}, "classifier.pt")
"""

# What every script in the clean environment begins with.
CLEAN = """
import importlib.util

for name in ("modeling_deltanet", "deltanet_kernels", "deltanet_conversion"):
    assert importlib.util.find_spec(name) is None, name + " is installed here"

import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

def same(a, b):
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
"""

USE = """
for folder in ("hybrid", "all_linear"):
    wanted = torch.load(folder + ".pt")
    x, mask = wanted["x"], wanted["mask"]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    with torch.no_grad():
        same(model(x, attention_mask=mask).logits, wanted["logits"])
    text = model.generate(x, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(text, wanted["text"])
    model.generate(x, attention_mask=mask, max_new_tokens=8, num_beams=3)
    model.train()(x, labels=x).loss.backward()
    model.save_pretrained(folder + "_again")

wanted = torch.load("classifier.pt")
model = AutoModelForSequenceClassification.from_pretrained("classifier", trust_remote_code=True)
with torch.no_grad():
    same(model(wanted["x"], attention_mask=wanted["mask"]).logits, wanted["logits"])

made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("hybrid", trust_remote_code=True), trust_remote_code=True)
assert type(made).__name__ == "DeltaNetForCausalLM"
"""

REFUSE = """
import json, pathlib

for folder in ("hybrid", "all_linear"):
    wanted = torch.load(folder + ".pt")
    model = AutoModelForCausalLM.from_pretrained(folder + "_again", trust_remote_code=True)
    with torch.no_grad():
        same(model(wanted["x"], attention_mask=wanted["mask"]).logits, wanted["logits"])

path = pathlib.Path("hybrid_again", "config.json")
path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 3}))
try:
    AutoModelForCausalLM.from_pretrained("hybrid_again", trust_remote_code=True)
except Exception as error:
    assert "layer_types" in str(error) and "num_hidden_layers" in str(error), error
else:
    raise AssertionError("a contradictory config.json was accepted")
"""

LORA = """
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

wanted = torch.load("hybrid.pt")
x = wanted["x"]
base = AutoModelForCausalLM.from_pretrained("hybrid", trust_remote_code=True)
adapted = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM"))  # no targets: the defaults come with the code
adapted_names = {name.split(".")[-2] for name, _ in adapted.named_modules() if name.endswith(".lora_A")}
assert {"b_proj", "g_proj", "down_proj", "q_proj"} <= adapted_names, adapted_names
trainer = Trainer(
    model=adapted,
    args=TrainingArguments(
        output_dir="run", max_steps=12, learning_rate=1e-2, report_to="none", use_cpu=True, logging_steps=1,
        save_strategy="no", disable_tqdm=True,
    ),
    train_dataset=[{"input_ids": row, "labels": row} for row in x],
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
assert losses[-1] < 0.9 * losses[0], losses
adapted.eval().save_pretrained("adapter")
with torch.no_grad():
    trained = adapted(x).logits
    reloaded = AutoPeftModelForCausalLM.from_pretrained("adapter", trust_remote_code=True).eval()
    same(reloaded(x).logits, trained)
    merged = reloaded.merge_and_unload()
    torch.testing.assert_close(merged(x).logits, trained, atol=5e-5, rtol=1e-4)
    merged.save_pretrained("merged")
    same(AutoModelForCausalLM.from_pretrained("merged", trust_remote_code=True)(x).logits, merged(x).logits)
"""


def run(python, script: str, folder: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "HF_MODULES_CACHE": str(folder / "modules")}
    (folder / "script.py").write_text(script)
    done = subprocess.run(
        [python, "script.py"], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.fixture(scope="module")
def clean_python(tmp_path_factory) -> Path:
    """Python with everything that is installed here but this package."""
    folder = tmp_path_factory.mktemp("environment")
    venv.EnvBuilder(with_pip=False, symlinks=os.name != "nt").create(folder)
    python = next(path for path in (folder / "bin" / "python", folder / "Scripts" / "python.exe") if path.exists())
    own_site = Path(
        subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True).strip()
    )
    for installed in [*site.getsitepackages(), site.getusersitepackages()]:
        for entry in Path(installed).glob("*"):
            is_ours = any(name in entry.name for name in OWN)
            if not is_ours and not (own_site / entry.name).exists():
                (own_site / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())
    return python


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A folder with models saved by a process in which the package marked itself for remote code."""
    folder = tmp_path_factory.mktemp("published")
    # In a process of its own, for the mark stays. It runs what this one has imported, wherever that is.
    import modeling_deltanet

    package = str(Path(modeling_deltanet.__file__).parent.parent)
    script = f"import sys; sys.path.insert(0, {package!r})\n" + PUBLISH.format(tests=str(Path(__file__).parent))
    run(sys.executable, script, folder)
    return folder


def test_the_code_is_written_beside_the_weights(published):
    """A published folder would load only where our package is installed."""
    for folder in ("hybrid", "all_linear", "classifier"):
        names = {path.name for path in (published / folder).glob("*.py")}
        assert {"modeling_deltanet.py", "configuration_deltanet.py", "delta_rule.py"} <= names
        config = json.loads((published / folder / "config.json").read_text())
        assert config["auto_map"]["AutoConfig"] == "configuration_deltanet.DeltaNetConfig"
        auto_class = "AutoModelForSequenceClassification" if folder == "classifier" else "AutoModelForCausalLM"
        assert config["auto_map"][auto_class] == "modeling_deltanet." + config["architectures"][0]


@pytest.fixture
def workspace(published, tmp_path) -> Path:
    shutil.copytree(published, tmp_path / "work")
    shutil.rmtree(tmp_path / "work" / "modules", ignore_errors=True)
    return tmp_path / "work"


def test_a_process_without_the_package_loads_generates_and_saves_again(clean_python, workspace):
    """A user of the Hub would not get the published model: other logits, no generation, or a copy without its code."""
    run(clean_python, CLEAN + USE, workspace)
    for folder in ("hybrid", "all_linear"):
        for name in ("modeling_deltanet.py", "configuration_deltanet.py", "delta_rule.py", "cache_deltanet.py"):
            copy = workspace / f"{folder}_again" / name
            assert copy.read_text() == (workspace / folder / name).read_text()
    run(clean_python, CLEAN + REFUSE, workspace)  # a process of its own: it loads the copies of the code


def test_lora_on_a_published_folder_without_the_package(clean_python, workspace):
    """A fine-tuner of a published model would train nothing, or could not reload what was trained."""
    run(clean_python, CLEAN + LORA, workspace)


def test_without_trust_the_code_is_not_run(clean_python, workspace):
    """Code from the Hub would run without having been asked for."""
    script = """
try:
    AutoModelForCausalLM.from_pretrained("hybrid", trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise AssertionError("loaded")
"""
    run(clean_python, CLEAN + script, workspace)
