"""Every line of the launch table compiles for its architecture, fits its shared memory and does not spill unnoticed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("triton")
from deltanet_kernels import configs  # noqa: E402


# Bytes of spilled registers a thread that are known and accepted (kernels/README.md, "Spills"). Hopper's wide keys
# hold 128 registers of state; gradients and prepare at d = 64 are held to 168; where Gluon's scans run, Triton's of few
# programs is left rows off alignment. Everything else: at most a few words.
ACCEPTED = {
    (86, 256): {"scan, many": 80, "scan, few": 80, "chain, backwards = False": 96, "chain, backwards = True": 88},
    (90, 64): {"grads": 80, "prepare": 80},
    (90, 128): {"scan, few": 64},
    (90, 256): {"scan, many": 224, "scan, few": 224},
    (100, 128): {
        "scan, many": 128, "scan, few": 160, "reverse, many": 400, "reverse, few": 256, "first reverse, many": 64,
        "first reverse, few": 64,
    },
    (100, 256): {"scan, many": 320, "scan, few": 320},
}  # fmt: skip
SMALL = 48


@pytest.mark.parametrize(
    "arch, d", [(90, 64), (90, 128), (90, 256), (80, 128), (86, 128), (86, 256), (89, 96), (100, 128), (100, 256)]
)
def test_launch_table(arch, d, tmp_path):
    """A user of this chip and head size gets kernels that start, and as fast as they were measured."""
    here = Path(__file__).parent
    paths = [str(here.parent.parent / "kernels/torch-ext"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(paths)}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(here / "offline_chunk.py"), str(arch), str(d)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, (registers, spilled, shared) in json.loads(done.stdout.splitlines()[-1]).items():
        assert shared <= configs.shared_memory_limit(arch), (name, shared)
        assert 32 < registers <= 255, (name, "a kernel of few registers is empty")
        assert spilled <= ACCEPTED.get((arch, d), {}).get(name, SMALL), (name, spilled)
