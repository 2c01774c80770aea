"""Beside every Transformers: what an import says, and does not say. (Remote code's own: test_remote_code.py.)"""

import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from modeling_deltanet.versions_deltanet import NEWEST, OLDEST, check_transformers


USE = """
import torch
from modeling_deltanet import DeltaNetConfig, DeltaNetForCausalLM
types = ["linear_attention", "sliding_attention", "full_attention"]
for layer_types in (types, types[:1]):
    window = 4 if len(layer_types) > 1 else None
    config = DeltaNetConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=len(layer_types), layer_types=layer_types,
        sliding_window=window, eos_token_id=None, pad_token_id=0,
    )
    model, x = DeltaNetForCausalLM(config), torch.tensor([[1, 2, 3]])
    model(x, labels=x).loss.backward()
    model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=3)
"""


def python(script: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "error::FutureWarning", "-c", script]
    return subprocess.run(command, capture_output=True, text=True)


def test_importing_and_using_the_package_prints_nothing():
    """Each program would begin with lines that its user can do nothing about, and that hide those that matter."""
    done = python(f"import modeling_deltanet\n{USE}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_import_brings_in_neither_peft_nor_what_peft_does():
    """Seconds of waiting, and bitsandbytes' own lines, for whoever only generates."""
    done = python(
        "import sys, modeling_deltanet\n"
        "print(*(name for name in ('peft', 'bitsandbytes', 'liger_kernel') if name in sys.modules))\n"
        "from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as targets\n"
        "print('q_proj' in targets['deltanet'])"
    )
    assert done.stdout.splitlines() == ["", "True"], done.stderr


def test_beside_an_older_transformers_the_import_says_what_is_wanted():
    """The user would read that some name cannot be imported, and not that an upgrade helps."""
    done = python("import transformers; transformers.__version__ = '4.57.6'; import modeling_deltanet")
    message = (
        f"DeltaNet needs transformers {OLDEST} or later (tried with transformers {OLDEST} to {NEWEST}), found 4.57.6"
    )
    assert done.stderr.splitlines()[-1] == f"ImportError: {message}"


def test_beside_a_newer_transformers_the_import_warns():
    """A release that renames what we rely on would change the text without a word."""
    major, minor = map(int, NEWEST.split(".")[:2])
    with pytest.warns(UserWarning, match=re.escape(f"tried with transformers {OLDEST} to {NEWEST}, found")):
        check_transformers(f"{major}.{minor + 1}.0.dev0")


def test_what_was_tried_is_loaded_without_a_word():
    """A patch release would be taken for one that nobody has tried."""
    with warnings.catch_warnings(action="error"):
        for version in (OLDEST, NEWEST, ".".join([*NEWEST.split(".")[:2], "9"])):
            check_transformers(version)


def test_the_project_admits_what_the_code_admits():
    """A plain install would bring a release that the import refuses or warns of."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    [admitted] = [r.specifier for r in map(Requirement, project["dependencies"]) if r.name == "transformers"]
    below, above = (list(map(int, version.split(".")[:2])) for version in (OLDEST, NEWEST))
    assert admitted.contains(OLDEST) and admitted.contains(NEWEST)
    assert not admitted.contains(f"{below[0]}.{below[1] - 1}.99") and not admitted.contains(
        f"{above[0]}.{above[1] + 1}.0"
    )
