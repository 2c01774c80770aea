"""Runs the cases of `check.py` over the routes of this machine; `deltanet check` prints what comes back."""

import contextlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial, partialmethod
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from multiprocessing import get_context

import torch

from modeling_deltanet import delta_rule, kernel_switch, short_conv

from .check import (
    BASIC,
    DTYPES,
    GATES,
    LAYOUTS,
    REFERENCE,
    SIZES,
    Case,
    check_reference,
    make_inputs,
    run_case,
    tolerance,
    too_large,
)


RULE = tuple(name for name in LAYOUTS if name not in ("step", "convolution"))
# Token by token, a long sequence is a minute of launches.
SHORT = tuple(name for name in RULE if name != "segmented")
AGAIN = 2  # calls more, on a GPU
MEMORY = 6 * 2**30  # of a GPU, for a process: K = V = 256 in fp64, and what CUDA takes for itself
FEW_SIZES = 16  # with more, slow routes compute those of published models alone, and a peer the first of them


@dataclass(frozen=True)
class Route:
    """A function that computes cases of some layouts and dtypes."""

    name: str
    function: Callable
    layouts: tuple[str, ...]
    kind: str = "kernels"  # of `check.TOLERANCES`
    dtypes: tuple[str, ...] = DTYPES
    is_peer: bool = False  # somebody else's: its errors are shown and do not count
    is_slow: bool = False  # token by token, or tuned anew for each size; or sizes do not matter to it
    is_gated: bool = True  # takes a gate, too


@cache
def routes(device: torch.device, peer: str | None = None) -> tuple[Route, ...]:
    """The routes that this machine has."""
    found = [
        Route("torch, chunks", delta_rule.torch_chunk_delta_rule, RULE, "torch", is_slow=True),
        Route("torch, token by token", delta_rule.torch_recurrent_delta_rule, SHORT, "torch", is_slow=True),
        Route("torch, convolution", short_conv.torch_short_conv, ("convolution",), "torch"),
    ]
    kernels = installed_kernels(device)
    if kernels is None:
        found.append(Route("torch, step", delta_rule.delta_rule_step, ("step",), "torch"))
    else:
        dtypes = DTYPES if device.type == "cuda" else DTYPES[1:]
        found += [
            Route("kernels, chunks", partial(_by_gate, kernels, "chunk"), RULE, dtypes=dtypes),
            Route(
                "kernels, token by token",
                partial(_by_gate, kernels, "fused_recurrent"),
                SHORT,
                dtypes=dtypes,
                is_slow=True,
            ),
            Route("kernels, step", kernels.delta_rule_step, ("step",), dtypes=dtypes),
            Route("kernels, convolution", kernels.short_conv, ("convolution",), dtypes=dtypes),
        ]
    if peer == "fla" and missing_peer(device) is None:
        import fla.ops

        tune_nothing()
        chunks, steps = (partial(_fla, partial(_by_gate, fla.ops, kind)) for kind in ("chunk", "fused_recurrent"))
        found += [
            Route("fla, chunks", chunks, RULE, dtypes=DTYPES[:2], is_peer=True, is_slow=True),
            Route("fla, token by token", steps, SHORT, is_peer=True, is_slow=True, is_gated=False),  # no backward
        ]
    return tuple(found)


def installed_kernels(device: torch.device):
    """The kernel package where it computes on this device, which a CPU does in Triton's interpreter alone."""
    if device.type == "cuda":
        return kernel_switch.kernels_for(torch.empty(0, device=device))
    return (
        kernel_switch.deltanet_kernels if not kernel_switch.OFF and os.environ.get("TRITON_INTERPRET") == "1" else None
    )


def missing_peer(device: torch.device) -> str | None:
    """Why fla is skipped, or None."""
    if device.type != "cuda":
        return "flash-linear-attention computes on a GPU alone"
    try:
        import fla.ops.delta_rule  # noqa: F401
    except ImportError as error:
        return f"flash-linear-attention is not installed ({error})"
    return None


def tune_nothing() -> None:
    """From here on, Triton's tuned kernels of this process take the first launch configuration that runs.

    To time them all takes fla minutes for each size, and their errors are the same.
    """
    from triton.runtime.autotuner import Autotuner

    Autotuner._bench = partialmethod(_first_that_runs, Autotuner._bench)


def _first_that_runs(tuner, bench, *args, config, **meta) -> list[float]:
    """In the place of `Autotuner._bench`: the times of a configuration, infinite after one that ran in this call."""
    if getattr(tuner, "_served", None) is tuner.nargs:  # a new dict for each call
        return [float("inf")] * 3
    times = bench(tuner, *args, config=config, **meta)
    if times[0] < float("inf"):
        tuner._served = tuner.nargs
    return times


def _by_gate(module, kind: str, *, g=None, **inputs):
    """The module's function for these inputs, which with a gate has another name."""
    if g is None:
        return getattr(module, f"{kind}_delta_rule")(**inputs)
    return getattr(module, f"{kind}_gated_delta_rule")(g=g, **inputs)


def _fla(function, q, k, v, beta, cu_seqlens=None, **options):
    """fla has as many key heads as value heads, and borders in int64."""
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
    return function(q=q, k=k, v=v, beta=beta, cu_seqlens=None if cu_seqlens is None else cu_seqlens.long(), **options)


# ------------------------------------------------------------------------------------------------------- the running


def run(
    cases: Iterable[Case], device: torch.device, peer: str | None = None, seed: int = 0, jobs: int = 1, first: int = 0
) -> Iterator[list[dict]]:
    """For each case from the `first` on, in order, a row for each route that takes it. `jobs` processes share the
    compiling, and all GPUs where the device is "cuda" without a number; fewer where they would fill a GPU's memory.

    Of more than FEW_SIZES head sizes, slow routes compute those of published models (`check.SIZES`), a peer one of
    them.

    A row holds the case, the route, its errors by quantity, those that are too large, the kernels that ran and
    `failure`, an exception's text; a failed row has no errors.
    """
    cases = list(cases)
    sizes = {(case.K, case.V) for case in cases}
    chosen = (sizes, sizes) if len(sizes) <= FEW_SIZES else (sizes & set(SIZES), sizes & set(SIZES[:1]))
    one = partial(_run_routes, device=device, peer=peer, seed=seed, chosen=chosen)
    cases = cases[first:]
    places = _places(device, jobs)
    if len(places) == 1:
        yield from map(one, cases)
        return
    # what shares compiled kernels, in one process
    together = [list(group) for _, group in groupby(cases, key=lambda case: (case.K, case.V, case.dtype))]
    context = get_context("spawn")
    queue = context.SimpleQueue()
    for place in places:
        queue.put(place)
    with ProcessPoolExecutor(len(places), context, _take_place, (queue,)) as pool:
        for rows in pool.map(partial(_each, one), together):
            yield from rows


def _places(device: torch.device, jobs: int) -> list[int | None]:
    """For each process its GPU: of all, unless the device is a certain one; None on a CPU."""
    if device.type != "cuda":
        return [None] * jobs
    gpus = range(torch.cuda.device_count()) if device.index is None else [device.index]
    room = {gpu: max(1, torch.cuda.mem_get_info(gpu)[0] // MEMORY) for gpu in gpus}
    rounds = [gpu for i in range(max(room.values())) for gpu in gpus if i < room[gpu]]
    return rounds[:jobs]


def _take_place(queue) -> None:
    gpu = queue.get()
    if gpu is not None:
        torch.cuda.set_device(gpu)


def _each(function, items: list) -> list:
    return [function(item) for item in items]


def _run_routes(case: Case, device: torch.device, peer: str | None, seed: int, chosen=None) -> list[dict]:
    """`chosen`: sizes of slow routes, and of peers; None: every size."""
    rows = []
    for route in routes(device, peer):
        if case.layout not in route.layouts or case.dtype not in route.dtypes:
            continue
        if case.inputs in GATES and not route.is_gated:
            continue
        if route.is_slow and chosen is not None and (case.K, case.V) not in chosen[route.is_peer]:
            continue
        row = {"route": route.name, "case": asdict(case), "is_peer": route.is_peer, "errors": {}, "too_large": {}}
        watch = watched(device) if route.name.startswith("kernels") else contextlib.nullcontext([])
        with watch as kernels:
            try:
                again = AGAIN if device.type == "cuda" and route.kind == "kernels" else 0
                row["errors"] = run_case(case, device, route.function, seed, again)
                row["too_large"] = too_large(row["errors"], tolerance(case, route.kind))
                row["failure"] = None
            except Exception as error:  # a report of what fails is what this command is for
                row["failure"] = f"{type(error).__name__}: {error}"
        rows.append(row | {"kernels": sorted(set(kernels))})
    if device.type == "cuda":
        torch.cuda.empty_cache()  # other processes of `jobs` need it
    return rows


def plans(cases: Iterable[Case], device: torch.device, seed: int = 0) -> list[str]:
    """What the kernels say of the first case of each basic layout: which run, with which tiles, and why."""
    kernels, texts = installed_kernels(device), []
    if kernels is not None:
        first = {case.layout: case for case in reversed(list(cases)) if case.layout in BASIC}
        for layout in sorted(first, key=BASIC.index):
            x = make_inputs(first[layout], device, seed)
            q, k, v, beta, *_ = x.tensors.values()
            texts.append(kernels.explain(q, k, v, beta, x.cu_seqlens))
    return texts


def watched(device: torch.device):
    """A context in which the names of the kernels that are launched gather in a list."""
    return installed_kernels(device)._replay.watch()


def reference_row(device: torch.device, seed: int) -> dict:
    errors = check_reference(device, seed)
    return {
        "route": "reference, two ways", "case": None, "is_peer": False, "errors": errors,
        "too_large": too_large(errors, lambda _: REFERENCE), "failure": None, "kernels": [],
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------- the report


def summary(rows: list[dict]) -> list[dict]:
    """A line for each route and dtype: how many cases, how many wrong, the worst error of each quantity, what ran."""
    lines = {}
    for row in rows:
        dtype = row["case"]["dtype"] if row["case"] else "float64"
        line = lines.setdefault(
            (row["route"], dtype),
            {"route": row["route"], "dtype": dtype, "cases": 0, "wrong": 0, "worst": {}, "kernels": set()},
        )
        line["cases"] += 1
        line["wrong"] += is_wrong(row)
        for name, value in row["errors"].items():
            line["worst"][name] = max(value, line["worst"].get(name, 0.0))
        line["kernels"] |= set(row["kernels"])
    return [line | {"kernels": sorted(line["kernels"])} for line in lines.values()]


def is_wrong(row: dict) -> bool:
    return bool(row["too_large"]) or row["failure"] is not None


def describe_kernels(names: Iterable[str]) -> str:
    """'Gluon, Triton, segments' from the names of modules and kernels."""
    names = list(names)
    kinds = {
        "Gluon": any(name.startswith("hopper_") for name in names),
        "Triton": any(not name.startswith("hopper_") for name in names),
        "segments": "segments.chain_kernel" in names,
    }
    return ", ".join(kind for kind, ran in kinds.items() if ran)


def environment(device: torch.device) -> dict[str, str | None]:
    """Versions, device and switches: what a report of a wrong result needs."""
    names = "modeling-deltanet torch triton transformers accelerate peft huggingface-hub safetensors datasets trl"
    found = {name: _version(name) for name in names.split()}
    found["flash-linear-attention"] = _version("flash-linear-attention") or _version("fla-core")
    found |= {"python": platform.python_version(), "platform": platform.platform()}
    found["device"] = f"CPU, {platform.machine()}, {os.cpu_count()} cores"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = f"{properties.name}, {properties.multi_processor_count} multiprocessors"
        found["compute capability"] = f"{properties.major}.{properties.minor}"
        found["CUDA of torch"] = torch.version.cuda or f"ROCm {torch.version.hip}"
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0")
    found["ptxas"] = _ptxas(device)
    found["threads"] = str(torch.get_num_threads())
    for name in ("DELTANET_KERNELS", "TRITON_INTERPRET"):
        found[name] = os.environ.get(name)
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _ptxas(device: torch.device) -> str | None:
    """Version and path of the assembler that Triton uses for this device."""
    try:
        from triton import knobs
    except ImportError:
        return None
    newest = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10
    path = (knobs.nvidia.ptxas_blackwell if newest else knobs.nvidia.ptxas).path
    lines = (_output(path, "--version") or "does not run").splitlines()
    return f"{next((line for line in lines if 'release' in line), lines[-1])} ({path})"


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None


def choose_device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:1', got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch finds no GPU here")
    return device


def parse_sizes(words: str | None, everything: Iterable[tuple[int, int]]) -> list[tuple[int, int]] | None:
    """'64', '64x128,256' or 'all' as pairs (K, V); None without."""
    if words is None:
        return None
    if words == "all":
        return list(everything)
    pairs = []
    for word in words.split(","):
        numbers = word.lower().split("x")
        if len(numbers) > 2 or not all(n.strip().isdigit() and 1 <= int(n) <= 256 for n in numbers):
            raise ValueError(f"sizes are K or KxV from 1 to 256, such as '64,32x64', or 'all', got {word!r}")
        pairs.append((int(numbers[0]), int(numbers[-1])))
    return pairs
