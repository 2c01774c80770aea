"""Compiles the token-by-token and convolution kernels for GPUs that are not there: `python offline.py 90:128 80:256`.

A process of its own, because in the tests' process the kernels belong to the interpreter. Prints a JSON object a line,
for each argument: kernel -> what `resources` says of it.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path


os.environ.pop("TRITON_INTERPRET", None)

import triton  # noqa: E402
from deltanet_kernels import convolution, recurrent, step  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402


NOT_DIVISIBLE = {"T", "N", "B", "s_bb", "s_bt", "s_bh"}


def compile_kernel(kernel, pointers, constants, capability, options, not_divisible=NOT_DIVISIBLE):
    """`pointers` maps a pattern to a pointer's type (None: passed as None); what is left is fp32 or an int32."""
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constexprs[(i,)] = "constexpr", constants[name]
            continue
        matches = [t for pattern, t in pointers.items() if re.fullmatch(pattern, name)]
        kind = matches[0] if matches else "fp32" if name == "scale" else "i32"
        if kind is None:
            signature[name], constexprs[(i,)] = "constexpr", None
            continue
        signature[name] = kind
        if kind != "fp32" and name not in not_divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source_type = GluonASTSource if kernel.is_gluon() else ASTSource
    source = source_type(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def read_cubin(compiled, option):
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        done = subprocess.run([cuobjdump, option, f.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def serialized(sass: str) -> bool:
    """Whether ptxas makes every product of Hopper's wait for the one before (its advisory C7514)."""
    return sass.count("WARPGROUP.DEPBAR") > sass.count("HGMMA") / 2


def lost_bases(sass: str) -> list[str]:
    """Sums of 64 bits, both halves of which start from one value, as ptxas 12.8 (Triton 3.6 and 3.7) makes them of the
    base of a descriptor and an offset: the base is lost, and a product reads elsewhere in shared memory.

    It did so in `grads_kernel` where a step of 64 value columns met fewer than 64 key columns. Rightly, the lower half
    starts from the base and the upper one from another register, or from the same one where that was given another
    value between.
    """
    lower, found = {}, []  # carry -> the register of a lower half, while it holds the same value, and the instruction
    for text in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@\S+ )?(\S.*?) *;", sass):
        name, *operands = re.split(r",? +", text)
        if name == "UIADD3.X":  # sum, summand, offset, URZ, carry, !UPT
            halves = [lower[x] for x in operands if x in lower]
            found += [f"{first}; {text}" for source, first in halves if source == operands[1]]
        written = operands[:2]  # a predicate may come second; registers that are read there do no harm
        if re.search("64|WIDE", name) and re.fullmatch(r"UR\d+", operands[0]):
            written.append(f"UR{int(operands[0][2:]) + 1}")
        lower = {
            carry: x for carry, x in lower.items() if carry not in written and x[0] not in (written[:1] + written[2:])
        }
        if name == "UIADD3" and operands[1].startswith("UP") and re.fullmatch(r"UR\d+", operands[2]):
            lower[operands[1]] = operands[2], text  # sum, carry, summand, offset, URZ
    return found


def resources(compiled):
    """[registers a thread, stack bytes, bytes of local memory, bytes of shared memory]"""
    text = read_cubin(compiled, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    return [int(x) for x in found.groups()] + [compiled.metadata.shared]


def main(capability, d, dtype="bf16"):
    x, f = f"*{dtype}", "*fp32"
    pad = triton.next_power_of_2(d)
    sizes = {"H": 16, "HV": 16, "K": d, "V": d, "NORM": True}
    loop, eps = recurrent.LOOP_BLOCK, {"EPS": recurrent.NORM_EPS}
    gates = {"": None, ", gated": f}
    given = {
        "g": None,
        "q|k|v|o|do|beta": x,
        "cu_seqlens": "*i64",
        "h0|ht|dh0|dht|h|e|r[qk]|d[qkv]|dbeta|dq_hv|dk_[sg]": f,
        "slots|goes_on": None,
    }
    # a call's own states, and a pool of vLLM's layout, last dimensions first
    pooled = {"slots": "*i32", "goes_on": "*u8"}
    kept = dict.fromkeys(("s_hn", "s_hh", "s_hk", "s_hv"))
    kept_conv = dict.fromkeys(("n_h", "s_hn", "s_hd", "s_hw"))
    rows = {"q|k|dq|dk": x, "r[qk]|dq_hv|dk_[sg]": f}
    channels = {"(x|w|y|dy|dx)\\d": x, "h|out": x, "dw": f, "cu_seqlens": "*i64", "slots|goes_on": None}
    conv = {"W": 4, "SILU": True}
    rows_of_a_turn = {
        "BT": convolution.FORWARD_SEGMENT, "BD": convolution.FORWARD_BLOCK_D, "R": convolution.FORWARD_ROWS,
    }  # fmt: skip
    table = {
        "recurrent rows": (
            recurrent.rows_kernel,
            rows,
            {"H": 16, "G": 1, "K": d, "BT": 16, "BK": pad, "NORM": True},
            4,
        ),
        "conv forward": (
            convolution.forward_kernel,
            channels,
            {**conv, **rows_of_a_turn, **kept_conv},
            convolution.FORWARD_WARPS,
        ),
        "conv forward, pool": (
            convolution.forward_kernel,
            pooled | channels,
            {**conv, **rows_of_a_turn, "s_hd": 1},
            convolution.FORWARD_WARPS,
        ),
        "conv backward": (
            convolution.backward_kernel,
            {**channels, "h": None},
            {
                **conv,
                "BT": convolution.BACKWARD_SEGMENT,
                "BD": convolution.BACKWARD_BLOCK_D,
                "R": convolution.BACKWARD_ROWS,
            },
            convolution.BACKWARD_WARPS,
        ),
        "conv step": (
            convolution.step_kernel,
            channels,
            {**conv, "BD": convolution.STEP_BLOCK_D, "s_hd": None, "s_hw": None},
            convolution.STEP_WARPS,
        ),
        "conv step, pool": (
            convolution.step_kernel,
            pooled | channels,
            {**conv, "BD": convolution.STEP_BLOCK_D, "s_hd": 1},
            convolution.STEP_WARPS,
        ),
    }
    for gated, g in gates.items():
        given = given | {"g": g}
        columns = {"BK": pad, "BV": loop}
        table |= {
            f"recurrent forward{gated}": (recurrent.forward_kernel, given, {**sizes, **eps, **columns, **kept}, 1),
            f"recurrent forward{gated}, pool": (
                recurrent.forward_kernel,
                pooled | given,
                {**sizes, **eps, **columns, "s_hk": 1},
                1,
            ),
            f"recurrent dv{gated}": (recurrent.dv_kernel, given, {**sizes, **columns}, 1),
            f"recurrent dqk{gated}": (recurrent.dqk_kernel, given, {**sizes, "BR": loop, "BV": pad}, 1),
        }
        for columns in (step.STEP_BLOCK, step.STEP_BLOCK_FEW):
            warps = step._step_warps(pad, columns)
            constants = {**sizes, **eps, "BK": pad, "BV": columns}
            table[f"step{gated}, {columns} columns"] = (step._step_kernel, given, constants | {"s_hv": None}, warps)
            pool = step._step_kernel, pooled | given, constants | {"s_hk": 1}, warps
            table[f"step{gated}, {columns} columns, pool"] = pool
    if (capability, d) != (90, 128):  # once is enough
        table = {name: row for name, row in table.items() if not name.endswith(", pool")}
    compiled = {name: compile_kernel(*row, capability, {"num_warps": warps}) for name, (*row, warps) in table.items()}
    return {name: resources(kernel) for name, kernel in compiled.items()}


if __name__ == "__main__":
    for capability, d in (case.split(":") for case in sys.argv[1:]):
        print(json.dumps(main(int(capability), int(d))), flush=True)
