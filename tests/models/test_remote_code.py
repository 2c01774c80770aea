"""Remote code: what a published folder does where this package is not installed.

The package is left out for real: the scripts run in a virtual environment of its own, whose site-packages links to
everything that is installed here except this package, in an empty folder, without PYTHONPATH. Two processes run them
all, each several, because starting one takes longer than any script: the second loads copies of code that the first
has written.
"""

import json
import os
import site
import subprocess
import venv
from pathlib import Path

import pytest
import torch
from tiny import LINEAR, marks_for_remote_code_undone, tiny_model, tokens

import modeling_deltanet
from modeling_deltanet import DeltaNetForSequenceClassification


OWN = ("modeling_deltanet", "modeling-deltanet", "deltanet_kernels", "deltanet_conversion")

PUBLISHED = {
    "hybrid": {"linear_use_decay": True, "linear_use_output_gate": True},
    "all_linear": {"layer_types": [LINEAR] * 2},
}

# What runs the scripts in the clean environment, and what each of them begins with.
CLEAN = """
import importlib.util, sys

sys.modules["bitsandbytes"] = None  # which prints a line of its own on some CPUs

for name in ("modeling_deltanet", "deltanet_kernels", "deltanet_conversion"):
    assert importlib.util.find_spec(name) is None, name + " is installed here"

import json, traceback
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

def same(a, b):
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)

outcomes = {}
for name, script in json.loads(Path("scripts.json").read_text()).items():
    try:
        exec(script, dict(globals()))
        outcomes[name] = "passed"
    except Exception:  # one test's business: the next script runs all the same
        outcomes[name] = traceback.format_exc()
Path("outcomes.json").write_text(json.dumps(outcomes))
"""

# Another Transformers: what stands in the copied code is refused, or warned of, before the import that would fail.
OTHER_RELEASES = """
import sys, warnings

import transformers

ours = transformers.__version__
for version in ("4.57.6", "5.99.0"):
    for name in [name for name in sys.modules if name.startswith("transformers_modules.hybrid")]:
        del sys.modules[name]
    transformers.__version__ = version
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            AutoConfig.from_pretrained("hybrid", trust_remote_code=True)
        except ImportError as error:
            said = str(error)
        else:
            [said] = [str(warning.message) for warning in caught]
        finally:
            transformers.__version__ = ours
    assert "tried with transformers" in said and said.count("found " + version) == 1, said
"""

WITHOUT_TRUST = """
try:
    AutoModelForCausalLM.from_pretrained("hybrid", trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise AssertionError("loaded")
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

config = AutoConfig.from_pretrained("hybrid", trust_remote_code=True)
made = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
assert type(made).__name__ == "DeltaNetForCausalLM"
"""

USE_COPIES = """
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
assert {"a_proj", "b_proj", "g_proj", "down_proj", "q_proj"} <= adapted_names, adapted_names
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


def run(python, folder: Path, **scripts: str) -> dict[str, str]:
    """name -> "passed", or the traceback of the script with this name, which ran in a process that ran all of these;
    "printed" -> what that process printed."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "HF_MODULES_CACHE": str(folder / "modules")}
    environment["TQDM_DISABLE"] = "1"  # progress bars are Transformers' own
    (folder / "scripts.json").write_text(json.dumps(scripts))
    done = subprocess.run(
        [python, "-c", CLEAN], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return json.loads((folder / "outcomes.json").read_text()) | {"printed": done.stdout}


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
    """A folder with models that know their code, and what they answer."""
    folder = tmp_path_factory.mktemp("published")
    x, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    with marks_for_remote_code_undone(), torch.no_grad():
        modeling_deltanet.register_remote_code()
        for name, fields in PUBLISHED.items():
            model = tiny_model(**fields)
            model.save_pretrained(folder / name)
            logits = model(x, attention_mask=mask).logits
            text = model.generate(x, attention_mask=mask, max_new_tokens=8, do_sample=False)
            torch.save({"x": x, "mask": mask, "logits": logits, "text": text}, folder / f"{name}.pt")
        classifier = tiny_model(DeltaNetForSequenceClassification, num_labels=5)
        classifier.save_pretrained(folder / "classifier")
        logits = classifier(x, attention_mask=mask).logits
        torch.save({"x": x, "mask": mask, "logits": logits}, folder / "classifier.pt")
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


@pytest.fixture(scope="module")
def outcomes(clean_python, published) -> dict[str, str]:
    """What became of each script. (Trust is asked for before anything has been loaded with it.)"""
    first = run(clean_python, published, without_trust=WITHOUT_TRUST, use=USE)
    return run(clean_python, published, use_copies=USE_COPIES, lora=LORA, other_releases=OTHER_RELEASES) | first


def test_a_process_without_the_package_loads_generates_and_saves_again(outcomes, published):
    """A user of the Hub would not get the published model: other logits, no generation, or a copy without its code."""
    assert outcomes["use"] == "passed", outcomes["use"]
    for folder in ("hybrid", "all_linear"):
        for name in ("modeling_deltanet.py", "configuration_deltanet.py", "delta_rule.py", "cache_deltanet.py"):
            copy = published / f"{folder}_again" / name
            assert copy.read_text() == (published / folder / name).read_text()
    assert outcomes["use_copies"] == "passed", outcomes["use_copies"]


def test_lora_on_a_published_folder_without_the_package(outcomes):
    """A fine-tuner of a published model would train nothing, or could not reload what was trained."""
    assert outcomes["lora"] == "passed", outcomes["lora"]


def test_without_trust_the_code_is_not_run(outcomes):
    """Code from the Hub would run without having been asked for."""
    assert outcomes["without_trust"] == "passed", outcomes["without_trust"]


def test_nothing_is_printed(outcomes):
    """Whoever loads and uses a published model would read lines that he can do nothing about."""
    assert outcomes["printed"] == ""


def test_another_transformers_is_named(outcomes):
    """The user would read that some name cannot be imported, or get a text that nobody has compared, without a
    word.
    """
    assert outcomes["other_releases"] == "passed", outcomes["other_releases"]
