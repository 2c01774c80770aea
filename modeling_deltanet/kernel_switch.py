"""Which route computes: the Triton kernels where they are installed and take the call, else torch.

The one place that imports the kernels. The environment variable DELTANET_KERNELS leaves out parts of them (its words
stand in the kernels' `_switch.py`); "off" leaves out all and is understood without them.
"""

import functools
import logging
import os

import torch
from torch.utils.checkpoint import checkpoint


deltanet_kernels, MISSING = None, "torch is built without CUDA"
if torch.version.cuda or torch.version.hip or os.environ.get("TRITON_INTERPRET") == "1":  # otherwise 0.2 s for nothing
    try:  # only a missing package is forgiven: a broken one must be heard
        import deltanet_kernels
    except ImportError as error:
        MISSING = str(error)

logger = logging.getLogger(__name__)

OFF = "off" in os.environ.get("DELTANET_KERNELS", "").replace(" ", "").split(",")
LIMITS = None if deltanet_kernels is None else deltanet_kernels.limits


def kernels_for(x: torch.Tensor, refused: str | None = None):
    """The Triton kernels if they compute with tensors like `x`, else None: the one place where that is decided.

    `refused` is what they do not take of this call, for the log.
    """
    return _kernels_on(x.device.index, x.dtype, refused) if x.is_cuda else None


def _kernels_on(index: int | None, dtype: torch.dtype, refused: str | None):
    if deltanet_kernels is None:
        return _torch("not with its Triton kernels: %s", MISSING)
    if OFF:
        return _torch("as %s says", "DELTANET_KERNELS=off")
    if (device := _refused_device(index)) is not None:
        return _torch("its Triton kernels do not take %s", device)
    if dtype == torch.float64:
        refused = "fp64"
    if refused is not None:
        return _torch("its Triton kernels do not take %s", refused)
    _say_once(logging.INFO, "DeltaNet computes with the Triton kernels of %s", deltanet_kernels.__file__)
    return deltanet_kernels


def _torch(reason: str, detail: str) -> None:
    """None, and a line in the log on why."""
    _say_once(logging.WARNING, f"DeltaNet computes with torch on this GPU, {reason}", detail)


@torch.compiler.assume_constant_result
def _refused_device(index: int | None) -> str | None:
    """What speaks against a GPU, or None. AMD's say that they are CUDA devices, the MI200 of capability (9, 0), a
    Hopper's.
    """
    return _judged(index)


@functools.cache
def _judged(index: int | None) -> str | None:
    if torch.version.hip is not None:
        return f"ROCm ({torch.version.hip})"
    capability = torch.cuda.get_device_capability(index)
    if capability < LIMITS.LEAST_CAPABILITY:
        name, (major, minor), least = torch.cuda.get_device_name(index), capability, LIMITS.LEAST_CAPABILITY
        return f"compute capability {major}.{minor} ({name}): {least[0]}.{least[1]} is the least"
    return None


def _say_once(level: int, message: str, detail: str) -> None:
    if not torch.compiler.is_compiling():  # torch.compile would break the graph there
        _log_once(level, message, detail)


_log_once = functools.cache(logger.log)


def checkpoint_but_for_rule(function, *inputs):
    """`function(*inputs)`, which backward computes again, but for the kernels of a delta rule in it: their results are
    kept.
    """
    if deltanet_kernels is None or OFF:  # the rule runs in torch, or by a kernel of the Hub
        return checkpoint(function, *inputs, use_reentrant=False)
    compiled = torch.compiler.is_compiling()
    context_fn = deltanet_kernels.keep_results_compiled if compiled else deltanet_kernels.keep_results
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=context_fn)


def is_transformed() -> bool:
    """Whether a transformation of `torch.func` (grad, vmap, jvp, ...) is at work: only torch's own operators know them
    all.

    (torch has no public name for it; its `autograd.Function.apply` asks the same.)
    """
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
