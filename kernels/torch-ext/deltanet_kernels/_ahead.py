"""Compiles the kernels of backward while those of forward compile, each of which takes a second or more.

A first forward + backward waits for little else. Most of a compilation runs outside of Python, so that a thread helps.
"""

import contextlib
import threading

import torch
from triton import knobs

from . import _launch, _switch


_started: set[tuple] = set()


def compile_ahead(function, numbers: tuple, tensors: tuple) -> threading.Thread | None:
    """Compiles what `function(*numbers, *tensors)` would launch, once for each kind of tensors, in the thread it returns.

    The caller joins it: it allocates, which would end a capture that comes next. What it allocates is freed at the end.
    A kind leaves lengths out: a kernel that depends on one may still have to compile.
    """
    kinds = [None if x is None else (x.dtype, x.shape[2:], x.stride()[1:]) for x in tensors]
    key = (function, tensors[0].device, *numbers, *kinds)
    is_cuda = tensors[0].is_cuda
    if (
        key in _started
        or knobs.runtime.interpret
        or not _switch.uses("ahead")
        or (is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return None
    _started.add(key)
    stream = torch.cuda.stream(torch.cuda.current_stream(tensors[0].device)) if is_cuda else contextlib.nullcontext()

    def run():
        _launch.here.compile_only = True
        # an error will be met by the call itself, where somebody can catch it
        with contextlib.suppress(Exception), torch.no_grad(), stream:
            function(*numbers, *tensors)

    thread = threading.Thread(target=run)
    thread.start()
    return thread
