"""Launches a kernel again without the work that Triton repeats at every call.

`kernel[grid](...)` formats the types of all arguments into a string to find the compiled kernel, 0.1 to 0.2 ms a
launch for kernels of 50 parameters on the host of the H200 we measured, more than the kernels take at batch 1. Here
the compiled kernel is found by a tuple, and given addresses, which it need not ask the driver about. Pointers count by
dtype and 16-byte alignment, as Triton specialises them. Beside a Triton with which that was not tried (LAUNCHER), the
compiled kernel is still found here, but launched by Triton's public call.
"""

import threading

import torch
import triton
from triton import knobs
from triton.runtime import driver


TRITON = tuple(int(x) for x in triton.__version__.split(".")[:2])
# A compiled kernel's own `run` is private to Triton: its signature was read in each of these
LAUNCHER = TRITON in ((3, 6), (3, 7), (3, 8), (3, 9))
# a * b + c rounded once: Triton's default up to 3.9, which warns where nothing is said, but not from 3.10 on
FUSED = {"enable_fp_fusion": True}


class _Here(threading.local):
    recorder = None  # is told of each launch (see `_replay.py`)


here = _Here()
watched: list[str] | None = None  # names of what is launched, in every thread (see `_replay.watch`)
_compiled: dict[tuple, tuple] = {}
_LIMIT = 4096  # shapes remembered; beyond, start again


def launch(kernel, grid: tuple[int, ...], pointers: tuple, sizes: tuple, constants: dict, options: dict) -> None:
    """`kernel[grid](*pointers, *sizes, **constants, **options)`; the kernel's parameters stand in this order.

    `pointers` are tensors or None, the first a tensor; `sizes` are numbers.
    """
    device = pointers[0].get_device()  # -1: the CPU, and Triton's interpreter
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current device
            return launch(kernel, grid, pointers, sizes, constants, options)
    grid = (*grid, 1, 1)[:3]
    addresses, dtypes, bits = [], [], 0
    for x in pointers:
        if x is None:
            addresses.append(None)
            dtypes.append(None)
        else:
            address = x.data_ptr()
            bits |= address
            addresses.append(address)
            dtypes.append(x.dtype)
    misaligned = tuple([x is not None and x % 16 != 0 for x in addresses]) if bits % 16 else None
    # by the function: a Triton kernel's own hash takes a lock
    key = kernel.fn, device, misaligned, sizes, *dtypes, *constants.values(), *options.values()
    found = _compiled.get(key)
    if watched is not None:
        watched.append(f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}")
    if found is None:
        compiled = kernel[grid](*pointers, *sizes, **constants, **FUSED, **options)
        names = kernel.arg_names[len(pointers) + len(sizes) :]
        found = compiled, (*sizes, *[constants[name] for name in names])
        if len(_compiled) >= _LIMIT:
            _compiled.clear()
        if compiled is not None:  # as the interpreter returns
            _compiled[key] = found
    else:
        run(found[0], grid, stream_of(device), addresses, found[1], hooked())
    if here.recorder is not None:
        here.recorder.launched(found[0], grid, pointers, found[1])
    return None


def run(compiled, grid: tuple[int, int, int], stream: int | None, addresses: list, rest: tuple, hooked: bool) -> None:
    """Launches on the current device; `rest` are the sizes and the constants in the order of the kernel's
    parameters.
    """
    if hooked:
        compiled[grid](*addresses, *rest)
    else:  # what that comes to without hooks, whose arguments it prepares all the same
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *addresses, *rest)


def stream_of(device: int) -> int | None:
    """The stream to launch on, where it is not Triton who asks for it."""
    return driver.active.get_current_stream(device) if LAUNCHER else None


def hooked() -> bool:
    """Whether Triton itself must launch: somebody, a profiler say, is to be told of it, or it was not tried
    without.
    """
    return not LAUNCHER or _is_set(knobs.runtime.launch_enter_hook) or _is_set(knobs.runtime.launch_exit_hook)


def _is_set(hook) -> bool:
    """A hook of Triton's is a function, None, or a chain of functions, by default an empty one."""
    return bool(getattr(hook, "calls", hook))
