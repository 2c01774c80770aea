"""`deltanet kernels build`: the folder it makes is a kernel that the `kernels` package finds, checks and runs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deltanet_conversion.hub_kernel import build


PROJECT = Path(__file__).parent.parent.parent / "kernels"

# A process of its own, for a kernel stays in sys.modules. `kernels` chooses a variant by the machine's backend;
# without a GPU that is "cpu", so the machine that the kernel is for is pretended.
LOAD = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
from pathlib import Path
import torch
import kernels.backends, kernels.variants
from packaging.version import Version

kernels.backends._backend = lambda: kernels.backends.CUDA(version=Version("13.0"))
from kernels import get_local_kernel
from kernels._rust import Build

assert "CUDA" in str(Build.open(sys.argv[2]).general).upper()
loaded = get_local_kernel(Path(sys.argv[1]))
assert Path(loaded.__file__).parent.name == "torch-cuda", loaded.__file__
assert "deltanet_kernels" not in sys.modules  # it stands on its own files

import deltanet_kernels
assert loaded.__all__ == deltanet_kernels.__all__
inputs = [torch.randn(1, 5, 2, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
beta = torch.rand(1, 5, 2, generator=torch.Generator().manual_seed(3))
o, state = loaded.fused_recurrent_delta_rule(*inputs, beta, output_final_state=True, use_qk_l2norm_in_kernel=True)
from modeling_deltanet.delta_rule import torch_recurrent_delta_rule
o_ref, state_ref = torch_recurrent_delta_rule(*inputs, beta, output_final_state=True, use_qk_l2norm_in_kernel=True)
torch.testing.assert_close(o, o_ref, atol=1e-4, rtol=1e-4)
torch.testing.assert_close(state, state_ref, atol=1e-4, rtol=1e-4)

# Both packages' operators are there, each under its own name.
unique = next(name for name in sys.modules if name.startswith("_deltanet_kernels_cuda_") and "." not in name)
for name in ("chunk_forward", "recurrent_forward", "short_conv_forward"):
    assert hasattr(getattr(torch.ops, unique), name)
    assert hasattr(torch.ops.deltanet_kernels, name)
"""

# Transformers 5.23 takes `kernels` from 0.18.2 on, which PyPI does not have (November 2026): its check is set to 0.17
# here. Its KernelConfig knows no CPU, so the mapping is given to `kernels` itself.
USE_KERNELS = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
import transformers.utils.import_utils as import_utils

import_utils.is_kernels_available.__wrapped__.__defaults__ = ("0.17.0", "0.19")
sys.path.insert(0, sys.argv[2])
from pathlib import Path

import torch
from kernels import LocalLayerRepository, use_kernel_mapping
from tiny import output_and_gradients, tiny_model, tokens

model, x = tiny_model(layer_types=["linear_attention", "full_attention"]), tokens(1, 12)
with torch.no_grad():
    logits, text = model(x).logits, model.generate(x, max_new_tokens=3, do_sample=False)
_, gradients = output_and_gradients(model, input_ids=x, labels=x, use_cache=None)

layers = ("DeltaRule", "DeltaRuleStep", "ShortConv", "ShortConvStep")
variant = Path(sys.argv[1])
with use_kernel_mapping(
    {name: {"cpu": LocalLayerRepository(repo_path=variant, layer_name=name)} for name in layers}, inherit_mapping=False
):
    model.set_use_kernels(True)
    functions = next(
        module
        for name, module in sys.modules.items()
        if name.startswith("_deltanet_kernels") and name.endswith(".layers")
    )
    called = set()

    def counted(name, function):
        return lambda *args: (called.add(name), function(*args))[1]

    for name in ("chunk_delta_rule", "delta_rule_step", "short_conv", "short_conv_step"):
        setattr(functions, name, counted(name, getattr(functions, name)))
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, logits, atol=2e-3, rtol=1e-3)
        assert torch.equal(model.generate(x, max_new_tokens=3, do_sample=False), text)
    assert len(called) == 4, called
    _, got = output_and_gradients(model.train(), input_ids=x, labels=x, use_cache=None)
    for name, gradient in gradients.items():
        error = (got[name] - gradient).norm() / gradient.norm()
        assert error < 5e-3, (name, error)
"""


def test_the_build_loads_as_a_kernel_of_the_hub(tmp_path):
    """`get_kernel` would not find the kernels, or take the place of the installed package's operators."""
    [variant] = build(PROJECT, tmp_path / "build")
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path), str(PROJECT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert variant == tmp_path / "build" / "torch-cuda"


def test_use_kernels_brings_them_into_the_model(tmp_path):
    """Where only the model's code was downloaded, `use_kernels=True` would leave it on torch, or compute something
    else.
    """
    [variant] = build(PROJECT, tmp_path)
    models = str(Path(__file__).parent.parent / "models")
    done = subprocess.run([sys.executable, "-c", USE_KERNELS, str(variant), models], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_build_is_the_project(tmp_path):
    """A forgotten file, or one of an earlier build, would be published."""
    [variant] = build(PROJECT, tmp_path, repo_id="me/deltanet-kernels")
    (variant / "stale.py").write_text("")
    [variant] = build(PROJECT, tmp_path, repo_id="me/deltanet-kernels")
    sources = {path.name for path in (PROJECT / "torch-ext" / "deltanet_kernels").glob("*.py")}
    assert {path.name for path in variant.iterdir()} == sources | {"metadata.json"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    metadata = json.loads((variant / "metadata.json").read_text())
    assert metadata["name"] == "deltanet-kernels"
    assert metadata["backend"] == {"type": "cuda"}
    assert 'get_kernel("me/deltanet-kernels"' in (tmp_path / "CARD.md").read_text()
    again = json.loads((build(PROJECT, tmp_path / "again")[0] / "metadata.json").read_text())
    assert again["id"] == metadata["id"]  # the same sources, the same build


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("edition = 5", "edition = 4", "must be edition 5"),
        ('backends = ["cuda"]', 'backends = ["rocm"]', "backends rocm; the kernels exist for cuda"),
        ("version = 1\n", "", "lacks version"),
        ("edition = 5", "edition = ", "not TOML"),
        ('name = "deltanet-kernels"', 'name = "other"', "build.toml names the kernel 'other'"),
    ],
)
def test_a_project_that_cannot_be_built_is_refused(tmp_path, old, new, message):
    """A kernel would be published for hardware that nobody has tried it on, or could not be loaded."""
    project = Path(shutil.copytree(PROJECT, tmp_path / "kernels", ignore=shutil.ignore_patterns("build")))
    text = (project / "build.toml").read_text()
    (project / "build.toml").write_text(text.replace(old, new))
    assert old in text
    with pytest.raises(ValueError, match=message):
        build(project)
    assert not (project / "build").exists()
    with pytest.raises(ValueError, match="--source"):
        build(tmp_path)
