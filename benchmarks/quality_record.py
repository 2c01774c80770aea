"""What a file of results says about how it came about."""

import platform
import shlex
import sys
from datetime import date
from pathlib import Path

import torch
import transformers


def conditions(what: str, script: str) -> dict:
    """What was measured, on what, with which versions, when and by which command."""
    gpu = torch.cuda.is_available()
    # Where things lie on this machine is of no use elsewhere.
    arguments = [Path(x).name if Path(x).is_absolute() else shlex.quote(x) for x in sys.argv[1:]]
    record = {
        "what": what,
        "gpu" if gpu else "hardware": torch.cuda.get_device_name() if gpu else "CPU",
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        },
        "date": str(date.today()),
        "command": " ".join(["python", f"benchmarks/quality/{Path(script).name}", *arguments]),
    }  # fmt: skip
    if gpu:
        import triton

        record["versions"]["triton"] = triton.__version__
    return record
