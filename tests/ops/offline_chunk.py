"""Compiles the chunked kernels for a GPU that is not there: `python offline_chunk.py 90:128:128:bf16 80:64:256:fp32`.

A process of its own, because in the tests' process the kernels belong to the interpreter. Prints a JSON object a line, for
each argument (chip, K, V, dtype): kernel -> [registers a thread, bytes of spilled registers, bytes of shared memory].
Which Triton compiles is PYTHONPATH's business.
"""

import json
import os
import sys
from collections.abc import Iterator


os.environ.pop("TRITON_INTERPRET", None)

from deltanet_kernels import chunk_backward as backward  # noqa: E402
from deltanet_kernels import chunk_forward as forward  # noqa: E402
from deltanet_kernels import configs, segments  # noqa: E402
from offline import compile_kernel, lost_bases, read_cubin, resources, serialized  # noqa: E402
from pipelines import overwritten  # noqa: E402


if configs.GLUON:
    from deltanet_kernels import hopper_grads, hopper_reverse, hopper_scan, hopper_tiles


INPUTS, SCRATCH = ("q", "k", "v", "do", "o", "dq", "dk", "beta", "dbeta"), ("a", "p", "u", "s", "ds", "dv")
STATES = ("rq", "rk", "h0", "ht", "dh0", "dht", "n", "phi", "first", "out")
TABLES = {"cu_seqlens": "*i64", "flags": "*i32", "chunk_offsets": "*i32", "chunks": "*i32"}
NOT_DIVISIBLE = {"T", "NT", "H", "HV", "HV_ALL", "H_ALL"}


def compile_line(kernel, constants: dict, launch: configs.Launch, arch: int, dtype: str):
    scratch = "bf16" if dtype == "bf16" else "fp32"
    pointers = dict.fromkeys(INPUTS, f"*{dtype}") | dict.fromkeys(SCRATCH, f"*{scratch}")
    pointers |= dict.fromkeys(STATES, "*fp32") | TABLES
    if constants.get("PHI"):
        pointers["o"] = "*fp32"  # Phi stands there
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    if launch.maxnreg:
        options["maxnreg"] = launch.maxnreg
    given = {name: constants[name] for name in ("K", "V") if name in constants and not kernel.is_gluon()}
    wide = dtype != "bf16" and kernel is not segments.chain_kernel
    numbers = [name for name, size in given.items() if isinstance(forward.static(size, wide), int)]
    constants = {name: x for name, x in constants.items() if name not in numbers}
    odd = {name for name in numbers if given[name] % 16}
    return compile_kernel(kernel, pointers, constants, arch, options, NOT_DIVISIBLE | odd)


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


def lines(arch: int, K: int, V: int, dtype: str) -> Iterator[tuple]:
    """What calls of these head sizes launch: (name, kernel, constants, its line of the launch table)."""
    wide = dtype != "bf16"
    common = {"K": K, "C": configs.CHUNK, "L2NORM": True, "PACKED": False, "EVEN": False, "WIDE": wide}
    precision = {"PRECISION": "tf32x3" if dtype == "fp32" else "tf32"}
    for few in (True, False):
        plan = configs.plan(arch, K, V, wide, few)
        block_v, _, block_k, nk = forward.blocks(K, V, plan)
        name = "few" if few else "many"
        sizes = common | precision | {"V": V, "BK": block_k, "NK": nk, "BV": block_v}
        sizes |= {"FULL_K": K % block_k == 0, "FULL_V": V % block_v == 0}
        scan = sizes | {"HAS_H0": False, "EPS": 1e-6, "STORED": plan.stored}
        state = {"HAS_HT": False, "PHI": False, "OUTPUT": True, "SAVE": True}
        yield f"scan, {name}", forward.scan_kernel, scan | state, plan.scan
        first = {"HAS_HT": True, "PHI": True, "OUTPUT": False, "SAVE": False}
        yield f"first scan, {name}", forward.scan_kernel, scan | first, plan.entry or plan.scan
        reverse = sizes | {"HAS_DHT": False, "STORED": plan.stored, "DEEP": plan.reverse.deep}
        state, first = {"HAS_DH0": False, "SAVE": True}, {"HAS_DH0": True, "SAVE": False}
        yield f"reverse, {name}", backward.reverse_kernel, reverse | state, plan.reverse
        yield f"first reverse, {name}", backward.reverse_kernel, reverse | first, plan.reverse
    chain = {"K": K, "V": V, "BK": segments.chain_block(K), "NK": nk, "BV": configs.chain(arch, K).block_v, "S": 4}
    for backwards in (False, True):
        constants = chain | {"HAS_FIRST": True, "REVERSE": backwards}
        yield f"chain, {backwards = }", segments.chain_kernel, constants, configs.chain(arch, K)
    step = min(plan.prepare.block_v, block_k)
    constants = common | {"BK": step, "FULL_K": K % step == 0, "FP16": not wide, "EPS": 1e-6}
    constants |= {"BETA_MIN": forward.BETA_MIN, "PRECISION": "tf32x3" if wide else "tf32"}
    yield "prepare", forward.prepare_kernel, constants, plan.prepare
    step = min(plan.scores.block_v, block_k)
    constants = common | precision | {"BK": step, "FULL_K": K % step == 0, "EPS": 1e-6}
    yield "scores", forward.scores_kernel, constants, plan.scores
    step = min(block_v, plan.grads.block_v)
    constants = sizes | {"W": step, "FULL_V": V % step == 0, "G": 1}
    yield "grads", backward.grads_kernel, constants, plan.grads
    if plan.gluon_grads:
        yield from gluon_lines(K, V, plan)


def gluon_lines(K: int, V: int, plan: configs.Plan) -> Iterator[tuple]:
    sizes = {"K": K, "V": V, "C": configs.CHUNK, "L2NORM": True, "PACKED": False, "EVEN": False}
    for beside in (False, True):
        constants = sizes | {"G": 1, "BESIDE": beside}
        yield f"grads, Gluon, {beside = }", hopper_grads.grads_kernel, constants, plan.grads
    sizes |= {"H": 16, "HV": 16, "q_st": 16 * K, "k_st": 16 * K}
    for block_v in sorted({64, V}):
        state = {"HAS_H0": True, "HAS_HT": True, "SAVE": True, "EPS": 1e-6, "v_st": 16 * V}
        state |= {"BV": block_v, "STAGES": hopper_tiles.STAGES[block_v]}
        yield f"scan, Gluon, {block_v}", hopper_scan.scan_kernel, sizes | state, configs.Launch(0, block_v // 16, 1)
    state = {"HAS_DHT": True, "HAS_DH0": True, "d_st": 16 * V}
    state |= {"BV": hopper_reverse.BLOCK_V, "STAGES": hopper_tiles.STAGES[hopper_reverse.BLOCK_V]}
    for save, beside in ((True, False), (True, True), (False, False)):
        constants = sizes | state | {"SAVE": save, "BESIDE": beside}
        yield (
            f"reverse, Gluon, {save = }, {beside = }", hopper_reverse.reverse_kernel, constants, configs.Launch(0, 4, 1),
        )  # fmt: skip


def main(arch: int, K: int, V: int, dtype: str = "bf16") -> dict:
    done, found = {}, {}  # few and many programs often launch the same kernel
    for name, kernel, constants, launch in lines(arch, K, V, dtype):
        key = kernel.fn, *constants.items(), launch.num_warps, launch.num_stages, launch.maxnreg
        if key not in done:
            try:
                done[key] = read(kernel, compile_line(kernel, constants, launch, arch, dtype))
            except Exception as error:  # the table is to be read whole
                done[key] = f"{type(error).__name__}: {str(error)[-500:]}"
        found[name] = done[key]
    return found


if __name__ == "__main__":
    for case in sys.argv[1:]:
        arch, K, V, dtype = case.split(":")
        print(json.dumps(main(int(arch), int(K), int(V), dtype)), flush=True)
