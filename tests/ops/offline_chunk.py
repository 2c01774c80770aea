"""Compiles the chunked kernels for a GPU that is not there: `python offline_chunk.py 90 128 bf16`.

A process of its own, because in the tests' process the kernels belong to the interpreter. Prints one JSON object:
kernel -> [registers a thread, bytes of spilled registers, bytes of shared memory].
"""

import json
import os
import sys


os.environ.pop("TRITON_INTERPRET", None)

import triton  # noqa: E402
from deltanet_kernels import chunk_backward as backward  # noqa: E402
from deltanet_kernels import chunk_forward as forward  # noqa: E402
from deltanet_kernels import configs, hopper_grads, hopper_reverse, hopper_scan, hopper_tiles, segments  # noqa: E402
from offline import compile_kernel, resources, serialized  # noqa: E402


INPUTS, SCRATCH = ("q", "k", "v", "do", "o", "dq", "dk", "beta", "dbeta"), ("a", "p", "u", "s", "ds", "dv")
STATES = ("rq", "rk", "h0", "ht", "dh0", "dht", "n", "phi", "first", "out")
TABLES = {"cu_seqlens": "*i64", "flags": "*i32", "chunk_offsets": "*i32", "chunks": "*i32"}
NOT_DIVISIBLE = {"T", "NT", "H", "HV", "HV_ALL", "H_ALL"}


def compile_and_read(kernel, constants, launch, arch, dtype):
    scratch = "bf16" if dtype == "bf16" else "fp32"
    pointers = dict.fromkeys(INPUTS, f"*{dtype}") | dict.fromkeys(SCRATCH, f"*{scratch}")
    pointers |= dict.fromkeys(STATES, "*fp32") | TABLES
    if constants.get("PHI"):
        pointers["o"] = "*fp32"  # Phi stands there
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    if launch.maxnreg:
        options["maxnreg"] = launch.maxnreg
    compiled = compile_kernel(kernel, pointers, constants, arch, options, NOT_DIVISIBLE)
    assert not (kernel.is_gluon() and serialized(compiled)), f"{kernel.fn.__name__}: products wait for each other"
    registers, stack, _, shared = resources(compiled)
    return [registers, stack, shared]


def main(arch: int, d: int, dtype: str = "bf16") -> dict:
    wide = dtype != "bf16"
    pad = max(32, triton.next_power_of_2(d))
    found = {}
    for few in (True, False):
        plan = configs.plan(arch, d, d, wide, few)
        precision = {"PRECISION": "tf32x3" if wide else "tf32"}
        common = {
            "K": d,
            "C": configs.CHUNK,
            "L2NORM": True,
            "PACKED": False,
            "EVEN": False,
            "WIDE": wide,
            **precision,
        }
        scan = {**common, "V": d, "BK": min(128, pad), "BV": min(plan.scan.block_v, pad)}
        name = "few" if few else "many"
        state = {
            "HAS_H0": False,
            "HAS_HT": False,
            "PHI": False,
            "OUTPUT": True,
            "SAVE": True,
            "EPS": 1e-6,
            "STORED": plan.stored,
        }
        found[f"scan, {name}"] = compile_and_read(forward.scan_kernel, scan | state, plan.scan, arch, dtype)
        first = scan | state | {"HAS_HT": True, "PHI": True, "OUTPUT": False, "SAVE": False}
        found[f"first scan, {name}"] = compile_and_read(
            forward.scan_kernel, first, plan.entry or plan.scan, arch, dtype
        )
        state = {
            "HAS_DHT": False,
            "HAS_DH0": False,
            "SAVE": True,
            "STORED": plan.stored,
            "DEEP": plan.reverse.deep,
        }
        found[f"reverse, {name}"] = compile_and_read(backward.reverse_kernel, scan | state, plan.reverse, arch, dtype)
        first = scan | state | {"HAS_DH0": True, "SAVE": False}
        found[f"first reverse, {name}"] = compile_and_read(backward.reverse_kernel, first, plan.reverse, arch, dtype)
    for backwards in (False, True):
        chain = {"K": d, "V": d, "BK": min(128, pad), "BV": configs.chain(arch, d).block_v, "S": 4}
        chain |= {"HAS_FIRST": True, "REVERSE": backwards}
        found[f"chain, {backwards = }"] = compile_and_read(
            segments.chain_kernel, chain, configs.chain(arch, d), arch, dtype
        )
    prepare = common | {"BK": min(plan.prepare.block_v, pad), "FP16": not wide, "EPS": 1e-6, "BETA_MIN": forward.BETA_MIN}
    found["prepare"] = compile_and_read(forward.prepare_kernel, prepare, plan.prepare, arch, dtype)
    scores = common | {"BK": min(plan.scores.block_v, pad), "EPS": 1e-6}
    found["scores"] = compile_and_read(forward.scores_kernel, scores, plan.scores, arch, dtype)
    block_v, _, block_k, nk = forward.blocks(d, d, plan)
    grads = common | {"V": d, "BK": block_k, "NK": nk, "BV": block_v, "W": min(block_v, plan.grads.block_v), "G": 1}
    found["grads"] = compile_and_read(backward.grads_kernel, grads, plan.grads, arch, dtype)
    if plan.gluon_grads:
        sizes = {"K": d, "V": d, "C": configs.CHUNK, "L2NORM": True, "PACKED": False, "EVEN": False}
        for beside in (False, True):
            found[f"grads, Gluon, {beside = }"] = compile_and_read(
                hopper_grads.grads_kernel, sizes | {"G": 1, "BESIDE": beside}, plan.grads, arch, dtype
            )
    if plan.gluon_scans:
        sizes |= {"H": 16, "HV": 16, "q_st": 16 * d, "k_st": 16 * d}
        for block_v in sorted({64, d}):
            state = {"HAS_H0": True, "HAS_HT": True, "SAVE": True, "EPS": 1e-6, "v_st": 16 * d}
            state |= {"BV": block_v, "STAGES": hopper_tiles.STAGES[block_v]}
            gluon = configs.Launch(block_v, block_v // 16, 1)
            found[f"scan, Gluon, {block_v}"] = compile_and_read(
                hopper_scan.scan_kernel, sizes | state, gluon, arch, dtype
            )
        state = {"HAS_DHT": True, "HAS_DH0": True, "d_st": 16 * d}
        state |= {"BV": hopper_reverse.BLOCK_V, "STAGES": hopper_tiles.STAGES[hopper_reverse.BLOCK_V]}
        gluon = configs.Launch(64, 4, 1)
        for save, beside in ((True, False), (True, True), (False, False)):
            found[f"reverse, Gluon, {save = }, {beside = }"] = compile_and_read(
                hopper_reverse.reverse_kernel, sizes | state | {"SAVE": save, "BESIDE": beside}, gluon, arch, dtype
            )
    return found


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])))
