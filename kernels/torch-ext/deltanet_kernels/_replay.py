"""Makes a call's launches again without the work that leads to them.

Which memory a call takes and which kernels it launches on it follows from its signature: its numbers, and the shapes,
strides, dtypes and alignment of its tensors. Working that out took the host longer than all else at batch 1. So the
second call of a signature is recorded, as a tape of allocations and launches in their order, and later ones play the
tape. A call that does anything else with a tensor than launch on it, or on a view of it, is never played.
"""

import contextlib
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import _launch, _switch


class Allocation(NamedTuple):
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class View(NamedTuple):
    place: int
    offset: int  # bytes


class Launch(NamedTuple):
    compiled: object
    grid: tuple[int, int, int]
    places: list[int]  # of its pointers among the call's tensors, views from their middle among these
    rest: tuple  # sizes and constants


class Tape(NamedTuple):
    steps: list[Allocation | View | Launch]
    constants: list  # results that are no tensors
    results: list[int]  # places


SEEN_ONCE, NEVER = object(), object()  # recording costs a call's time: not where each call has another length
ALLOCATIONS = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
)
VIEWS = (
    torch.ops.aten.as_strided.default,
    torch.ops.aten.detach.default,  # torch.empty_like detaches what somebody else holds too
    torch.ops.aten.select.int,
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.view.default,
    torch.ops.aten.view.dtype,
)
REPLAYS = _switch.uses("replay")
_tapes: dict[tuple, object] = {}
_LIMIT = 4096  # signatures remembered; beyond, start again


def forget() -> None:
    """After a change of what no signature holds, as when tests change a plan."""
    _tapes.clear()


@contextlib.contextmanager
def watch():
    """A list that gathers "module.kernel" of all launches, for reports and tests; calls are not played meanwhile."""
    _launch.watched = names = []
    try:
        yield names
    finally:
        _launch.watched = None


def replay(function, numbers: tuple, tensors: tuple) -> list:
    """`function(*numbers, *tensors)`, a list of tensors, None and objects that follow from the signature. `tensors`
    may be None, but for the first.

    What a call allocates lives until it ends, also where `function` itself would have let go of it.
    """
    addresses, signature = [None], [function, *numbers]
    for x in tensors:
        if x is None:
            addresses.append(None)
            signature.append(None)
        else:
            address = x.data_ptr()
            addresses.append(address)
            signature += x.shape, x.stride(), x.dtype, x.get_device(), address % 16
    device = tensors[0].get_device()
    signature = tuple(signature)
    if _launch.watched is not None or not REPLAYS:
        return function(*numbers, *tensors)
    tape = _tapes.get(signature)
    if type(tape) is Tape:
        return _play(tape, tensors, addresses, device)
    if tape is SEEN_ONCE:
        with _Recorder(tensors) as recorder:
            results = function(*numbers, *tensors)
        _tapes[signature] = recorder.tape(results)
        return results
    if tape is not NEVER:
        if len(_tapes) >= _LIMIT:
            _tapes.clear()
        _tapes[signature] = SEEN_ONCE
    return function(*numbers, *tensors)


def _play(tape: Tape, tensors: tuple, addresses: list, device: int) -> list:
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _play(tape, tensors, addresses, device)
    tensors, where = [None, *tensors], tensors[0].device
    stream, hooked = _launch.stream_of(device), _launch.hooked()
    for step in tape.steps:
        if type(step) is Allocation:
            x = torch.empty_strided(step.shape, step.strides, dtype=step.dtype, device=where)
            tensors.append(x)
            addresses.append(x.data_ptr())
        elif type(step) is View:
            tensors.append(None)
            addresses.append(addresses[step.place] + step.offset)
        else:
            _launch.run(step.compiled, step.grid, stream, [addresses[i] for i in step.places], step.rest, hooked)
    tensors += tape.constants
    return [tensors[i] for i in tape.results]


class _Recorder(TorchDispatchMode):
    """Sees which operators a call runs, and is told of its launches."""

    def __init__(self, tensors: tuple):
        super().__init__()
        self.steps: list | None = []  # None: cannot be played
        # kept alive, or another tensor would take over an id; the former by place, None where that is a view's
        self.tensors, self.views = [None, *tensors], []
        self.places = {id(x): place for place, x in enumerate(self.tensors) if x is not None} | {id(None): 0}
        given = [id(x) for x in tensors if x is not None]
        if len(set(given)) < len(given):
            self.steps = None  # one tensor under two names: which of them a kernel was given does not show

    def __enter__(self):
        self.outer, _launch.here.recorder = _launch.here.recorder, self
        return super().__enter__()

    def __exit__(self, *error):
        _launch.here.recorder = self.outer
        return super().__exit__(*error)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if self.steps is None:
            pass
        elif operator in ALLOCATIONS:
            self._add(Allocation(tuple(out.shape), out.stride(), out.dtype), out, out)
        elif operator in VIEWS and id(args[0]) in self.places and out.numel() > 0:
            self.views.append(out)
            place, offset = self.places[id(args[0])], out.data_ptr() - args[0].data_ptr()
            if offset == 0:
                self.places[id(out)] = place
            else:
                self._add(View(place, offset), out, None)
        else:
            self.steps = None
        return out

    def _add(self, step: Allocation | View, out: torch.Tensor, at_place: torch.Tensor | None) -> None:
        self.steps.append(step)
        self.places[id(out)] = len(self.tensors)
        self.tensors.append(at_place)

    def launched(self, compiled, grid: tuple[int, int, int], pointers: tuple, rest: tuple) -> None:
        places = [self.places.get(id(x)) for x in pointers]
        if compiled is None or None in places:
            self.steps = None
        elif self.steps is not None:
            self.steps.append(Launch(compiled, grid, places, rest))

    def tape(self, results: list):
        constants = [x for x in results if not isinstance(x, torch.Tensor | None)]
        self.places |= {id(x): len(self.tensors) + i for i, x in enumerate(constants)}
        self.tensors += constants
        places = [self.places.get(id(x)) for x in results]
        if self.steps is None or not all(map(self._is_whole, results, places)):
            return NEVER
        return Tape(self.steps, constants, places)

    def _is_whole(self, x: torch.Tensor | None, place: int | None) -> bool:
        """Whether what stands at the place may be returned for x, which may be a view of it."""
        if not isinstance(x, torch.Tensor):
            return True
        if place is None or self.tensors[place] is None:
            return False
        return x.shape == self.tensors[place].shape and x.stride() == self.tensors[place].stride()
