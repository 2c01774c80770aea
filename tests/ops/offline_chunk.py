"""Compiles the chunked kernels for a GPU that is not there: `python offline_chunk.py 90:128:128:bf16 80:64:256:fp32`,
and with a gate: `90:96:192:bf16:gated`.

A process of its own, because in the tests' process the kernels belong to the interpreter. Prints a JSON object a line,
for each argument: kernel -> [registers per thread, bytes of spilled registers, bytes of shared memory]. What is
compiled are the launches of real calls, recorded without a GPU. Which Triton compiles is PYTHONPATH's business.
"""

import json
import os
import sys
from collections.abc import Iterator


os.environ.pop("TRITON_INTERPRET", None)

import torch  # noqa: E402
from deltanet_kernels import grads, layout, passes, plan, pools, prepare, reverse, scan, segments  # noqa: E402
from offline import compile_kernel, lost_bases, read_cubin, resources, serialized  # noqa: E402
from pipelines import overwritten  # noqa: E402


MODULES = [layout, pools, prepare, scan, reverse, grads, segments]
if plan.GLUON:
    from deltanet_kernels import hopper_grads, hopper_reverse, hopper_scan

    MODULES += [hopper_scan, hopper_reverse, hopper_grads]

SMS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NAMES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.float64: "*fp64",
}
# Not a multiple of 16, whatever the recorded call had: lengths and numbers of heads
NOT_DIVISIBLE = {"T", "NT", "H", "HV"}
SHARED = {module.__name__ for module in MODULES if module not in (layout, pools, segments)}
# B, T, heads: few programs of a scan, many, and a sequence that is cut into segments
CALLS = {"few": (1, 65, 2), "many": (40, 65, 16), "segmented": (1, 8250, 2)}


def record(arch: int, K: int, V: int, dtype: torch.dtype, gated: bool) -> Iterator[tuple]:
    """(name, kernel, pointers, sizes, constants, options) of what calls of these head sizes launch."""
    launched = []
    for module in MODULES:
        module.launch = lambda kernel, grid, *arguments: launched.append((kernel, *arguments))
    plan.arch_of, plan.multiprocessors = lambda _: arch, lambda _: SMS[arch]
    for kind, (B, T, H) in CALLS.items():
        q, k = (torch.empty(B, T, H, K, dtype=dtype) for _ in "qk")
        v, beta, states = (
            torch.empty(B, T, H, V, dtype=dtype),
            torch.empty(B, T, H, dtype=dtype),
            torch.empty(B, H, K, V),
        )
        g = torch.empty(B, T, H) if gated else None
        numbers = None, True, kind == "segmented"
        h0 = states if kind == "segmented" else None
        o, ht, made, memory, phi = passes.forward(*numbers, True, q, k, v, beta, h0, None, g)
        passes.backward(made, *numbers[:2], q, k, beta, h0, None, g, o, None if h0 is None else ht, memory, phi)
        for kernel, *arguments in launched:
            first = is_first(kernel, arguments[0])
            if kind == "segmented" and not first and kernel.fn.__module__ in SHARED:
                continue  # as for few programs, but for where a sequence lies
            name = kernel.fn.__name__.removesuffix("_kernel") + (" back" if arguments[2].get("REVERSE") else "")
            name = f"first {name}" if first else name
            yield f"{name}, {'Gluon, ' if kernel.is_gluon() else ''}{kind}", kernel, *arguments
        launched.clear()
    if arch == 90 and dtype == torch.bfloat16:
        # a server's pool, in vLLM's layout and in ours
        places, goes_on = torch.empty(1, dtype=torch.int32), torch.empty(1, dtype=torch.bool)
        for layout, pool in (("columns", torch.empty(1, 2, V, K).mT), ("rows", torch.empty(1, 2, K, V))):
            q, k = (torch.empty(1, 65, 2, K, dtype=dtype) for _ in "qk")
            v, beta = torch.empty(1, 65, 2, V, dtype=dtype), torch.empty(1, 65, 2, dtype=dtype)
            g = torch.empty(1, 65, 2) if gated else None
            passes.forward(None, True, False, False, q, k, v, beta, pool, None, g, places, goes_on)
            for kernel, *arguments in launched:
                name = kernel.fn.__name__.removesuffix("_kernel")
                yield f"{name}, {'Gluon, ' if kernel.is_gluon() else ''}pool of {layout}", kernel, *arguments
            launched.clear()
    if gated:
        # keys that the caller normalises: the reverse scan sums for dbeta
        q, k, v, do = (torch.empty(1, 65, 2, d, dtype=dtype) for d in (K, K, V, V))
        beta, g = torch.empty(1, 65, 2, dtype=dtype), torch.empty(1, 65, 2)
        _, _, made, memory, _ = passes.forward(None, False, False, True, q, k, v, beta, None, None, g)
        passes.backward(made, None, False, q, k, beta, None, None, g, do, None, memory, None)
        for kernel, *arguments in launched:
            name = kernel.fn.__name__.removesuffix("_kernel")
            if name in ("reverse", "grads"):
                yield f"{name}, {'Gluon, ' if kernel.is_gluon() else ''}caller's norm", kernel, *arguments
        launched.clear()


def is_first(kernel, pointers: tuple) -> bool:
    """Whether a scan only brings the state of a segment to its end."""
    given = dict(zip(kernel.arg_names, pointers))
    return given.get({"scan_kernel": "u", "reverse_kernel": "dv"}.get(kernel.fn.__name__), kernel) is None


def compile_launch(kernel, pointers: tuple, sizes: tuple, constants: dict, options: dict, arch: int):
    names = kernel.arg_names
    given = {name: None if x is None else NAMES[x.dtype] for name, x in zip(names, pointers)}
    odd = set(NOT_DIVISIBLE)
    for name, x in zip(names[len(pointers) :], sizes):
        if not isinstance(x, int | float):  # a constant, or nothing
            constants = constants | {name: getattr(x, "value", None)}
        elif x == 1 and name not in NOT_DIVISIBLE:  # for which Triton makes code of its own
            constants = constants | {name: 1}
        elif name != "scale" and x % 16:
            odd.add(name)
    return compile_kernel(kernel, given, constants, arch, {k: x for k, x in options.items() if x is not None}, odd)


def read(kernel, compiled) -> list[int]:
    name = kernel.fn.__name__
    if compiled.metadata.target.arch == 90:  # the only chip whose products take descriptors from an assembler that old
        sass = read_cubin(compiled, "-sass")
        assert not (kernel.is_gluon() and serialized(sass)), f"{name}: products wait for each other"
        assert not (lost := lost_bases(sass)), f"{name}: ptxas lost the base of an address: {lost}"
        tiles = overwritten(compiled.asm["ttgir"])
        assert not tiles, f"{name}: copied to while a product reads them: {tiles}"
    registers, stack, _, shared = resources(compiled)
    return [registers, stack, shared]


def main(arch: int, K: int, V: int, dtype: str = "bf16", gated: bool = False, aligned: bool = True) -> dict:
    done, found = {}, {}  # few and many programs often launch the same kernel
    plan.is_aligned = lambda *_: aligned
    for name, kernel, pointers, sizes, constants, options in record(arch, K, V, DTYPES[dtype], gated):
        shown = [getattr(x, "value", None) for x in sizes]
        key = kernel.fn, *[x is None for x in pointers], *shown, *constants.values(), *options.values()
        if key not in done:
            try:
                done[key] = read(kernel, compile_launch(kernel, pointers, sizes, constants, options, arch))
            except Exception as error:  # the table is to be read whole
                done[key] = f"{type(error).__name__}: {str(error)[-500:]}"
        found[name] = done[key]
    return found


if __name__ == "__main__":
    for case in sys.argv[1:]:
        arch, K, V, dtype, *gate = case.split(":")
        kind = int(arch), int(K), int(V), dtype, gate == ["gated"]
        found = main(*kind)
        if any("Gluon" in name for name in found):  # and what takes their place where rows are not aligned
            found |= main(*kind, aligned=False)
        print(json.dumps(found), flush=True)
