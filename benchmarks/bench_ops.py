"""Measures the delta-rule kernels beside fla, torch's softmax attention and the token-by-token rule, on one GPU.

    python benchmarks/bench_ops.py                           # the table of shapes, JSON beside this file in results/
    python benchmarks/bench_ops.py --shapes 8,4096,16,128    # one of them
    python benchmarks/bench_ops.py --lengths --plot lengths.svg    # by sequence length, with a plot
    python benchmarks/bench_ops.py --gated                   # the gated rule at the sizes of published models
    python benchmarks/bench_ops.py --token-by-token          # against the algorithm of 2021, by length and head size

Same inputs, same process, bf16, q/k norm in kernel; medians of triton.testing.do_bench. "forward" runs without
gradients, "forward + backward" returns those of q, k, v and beta (and g). A peer that is not installed has no column:
flash-linear-attention, and for the gated rule FlashQLA, which takes heads of 128 by 128 only.
"""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from figures import plot
from results_file import write

from deltanet_conversion.check import GATES


SHAPES = [
    (8, 4096, 16, 128),
    (1, 32768, 16, 128),
    (1, 131072, 16, 128),
    (1, 4096, 16, 128),
    (8, 4096, 32, 64),
    (8, 4096, 8, 256),
]
GATED_SHAPES = [  # B, T, H, HV, K, V
    (8, 4096, 16, 16, 128, 128),
    (1, 32768, 16, 16, 128, 128),
    (1, 32768, 16, 32, 128, 128),
    (8, 4096, 30, 30, 96, 192),
    (1, 4096, 16, 16, 128, 128),
]
# 32768 tokens of 2048 channels in all, as fewer and longer sequences.
TOKEN_BY_TOKEN_SHAPES = [(32768 // T, T, 2048 // d, d) for d in (128, 64, 256) for T in (512 << i for i in range(7))]
PEERS = {"fla": ("fla.ops", "flash-linear-attention"), "flash_qla": ("flash_qla", "flash-qla")}
ERROR_LENGTHS = 512, 4096  # the second is cut into segments
COLD = """
import time, torch
t = time.time()
from {module} import chunk_delta_rule as f
q, k, v = (torch.randn(8, 4096, 16, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
b = torch.rand(8, 4096, 16, device="cuda").bfloat16().requires_grad_()
f(q, k, v, b, use_qk_l2norm_in_kernel=True)[0].sum().backward()
torch.cuda.synchronize()
print("seconds", time.time() - t)
"""


def candidates(names: list[str], gated: bool = False) -> dict:
    """name -> function of (q, k, v, beta), gated of (q, k, v, beta, g); a peer that is not installed is left out, with
    a message.
    """
    import deltanet_kernels

    def delta(f, **kw):
        def plain(q, k, v, beta):
            return f(q, k, v, beta, use_qk_l2norm_in_kernel=True, **kw)[0]

        return (lambda q, k, v, beta, g: f(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[0]) if gated else plain

    def sdpa(q, k, v, beta):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)

    name = "chunk_gated_delta_rule" if gated else "chunk_delta_rule"
    found = {"ours": delta(getattr(deltanet_kernels, name))}
    if not gated:
        found |= {"sdpa": sdpa, "token by token": delta(deltanet_kernels.fused_recurrent_delta_rule)}
    os.environ.setdefault("FLA_FLASH_QLA", "0")  # fla hands its calls to FlashQLA where it finds it
    for peer, (module, distribution) in PEERS.items():
        if peer in names and (gated or peer != "flash_qla"):
            try:
                found[peer] = delta(getattr(importlib.import_module(module), name))
            except ImportError as error:
                print(f"no column for {peer}: {error} (pip install {distribution})")
    return {name: f for name, f in found.items() if name in names}


def takes(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a candidate computes a shape, in a time and a memory that are worth a row."""
    if name == "flash_qla":
        return shape[-2:] == (128, 128)
    return shape[1] <= {"token by token": 32768, "sdpa": 65536}.get(name, shape[1])


def make_inputs(shape: tuple[int, ...], gate: str | None = None, device: str = "cuda") -> list[torch.Tensor]:
    """q, k, v, beta and, with a gate, g; `shape` is B, T, H, d or B, T, H, HV, K, V."""
    B, T, H, HV, K, V = shape if len(shape) == 6 else (*shape[:3], *shape[2:], shape[3])
    q, k, v = (torch.randn(B, T, *x, device=device, dtype=torch.bfloat16) for x in ((H, K), (H, K), (HV, V)))
    inputs = [q, k, v, torch.rand(B, T, HV, device=device).bfloat16()]
    return inputs if gate is None else [*inputs, GATES[gate](torch.rand(B, T, HV, device=device))]


def measure(f, shape: tuple[int, ...], rep: int) -> dict:
    from triton.testing import do_bench

    torch.manual_seed(0)
    inputs = [x.requires_grad_() for x in make_inputs(shape, "gated" if len(shape) == 6 else None)]
    out = f(*inputs)
    do = torch.randn_like(out)
    gradients = torch.autograd.grad(out.sum(), inputs, allow_unused=True)
    used = [x for x, dx in zip(inputs, gradients, strict=True) if dx is not None]
    del out, gradients

    def both():
        return torch.autograd.grad(f(*inputs), used, do)

    def forward():
        with torch.no_grad():
            return f(*inputs)

    both()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    peak = torch.cuda.max_memory_allocated() - before
    times = [do_bench(g, warmup=15, rep=rep, return_mode="median") for g in (forward, both)]
    return {"fwd_ms": round(times[0], 4), "fwdbwd_ms": round(times[1], 4), "peak_extra_MB": round(peak / 1e6, 1)}


def errors(functions: dict, shape: tuple[int, ...], gate: str | None = None, device: str = "cuda") -> dict:
    """name -> ||x - ref|| / ||ref|| of the output and each gradient on one input; ref: torch's chunked form in
    fp64.
    """
    from modeling_deltanet.delta_rule import torch_chunk_delta_rule

    def both(f, inputs):
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = f(*inputs)
        return [out, *torch.autograd.grad(out, inputs, do.to(out.dtype))]

    torch.manual_seed(1)
    inputs = make_inputs(shape, gate, device)
    if gate is not None:  # steps of all kinds
        inputs[3][:, ::7], inputs[3][:, 1::5] = 0, 2
    do = torch.randn_like(inputs[2])
    reference = both(
        lambda q, k, v, beta, g=None: torch_chunk_delta_rule(q, k, v, beta, g=g, use_qk_l2norm_in_kernel=True)[0],
        [x.double() for x in inputs],
    )
    found = {}
    for name, f in functions.items():
        if name in ("ours", *PEERS) and takes(name, shape):
            pairs = zip(("o", "dq", "dk", "dv", "dbeta", "dg"), both(f, inputs), reference)
            found[name] = {key: float(f"{((x - y).norm() / y.norm()).item():.3e}") for key, x, y in pairs}
    if "ours" in found and "fla" in found:
        found["ratio"] = {key: round(x / found["fla"][key], 2) for key, x in found["ours"].items()}
    return found


def cold(module: str) -> float | None:
    """Seconds of the first forward + backward in a fresh process with an empty Triton cache."""
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "TRITON_CACHE_DIR": cache}
        code = COLD.format(module=module)
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    lines = [x for x in done.stdout.splitlines() if x.startswith("seconds")]
    return round(float(lines[0].split()[1]), 1) if lines else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", help="B,T,H,d each, gated B,T,H,HV,K,V; default: the table")
    parser.add_argument("--gated", action="store_true", help="the gated rule")
    parser.add_argument("--lengths", action="store_true", help="1 x T x 16 x 128 for T from 1024 to 131072 instead")
    parser.add_argument("--token-by-token", action="store_true", help="against the algorithm of 2021 instead")
    parser.add_argument(
        "--only", default="ours,fla,flash_qla,sdpa", help="names, separated by commas; also: token by token"
    )
    parser.add_argument("--rep", type=int, default=60, help="milliseconds of repetition a figure")
    parser.add_argument("--cold", action="store_true", help="also time the first call in a fresh process")
    parser.add_argument(
        "--errors", action="store_true", help="also the errors against fp64, 1 x 512 and 1 x 4096 tokens of each size"
    )
    parser.add_argument(
        "--out", default=None, help="JSON file; default: results/<gpu>_ops.json, gated <gpu>_gated.json"
    )
    parser.add_argument("--plot", default=None, help="PNG or SVG against sequence length")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "bench_ops needs a CUDA GPU: there is nothing to measure in Triton's interpreter\n")
    import triton

    shapes = (
        [tuple(map(int, s.split(","))) for s in args.shapes] if args.shapes else GATED_SHAPES if args.gated else SHAPES
    )
    if args.token_by_token:
        args.only = "ours,token by token"
        shapes = shapes if args.shapes else TOKEN_BY_TOKEN_SHAPES
    functions = candidates(args.only.split(","), args.gated)
    if args.lengths:
        shapes = [(1, 1024 * 4**i, 16, 128) for i in range(4)] + [(1, 131072, 16, 128)]
    gpu = torch.cuda.get_device_name()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    for peer in PEERS.keys() & functions.keys():
        versions[peer] = importlib.import_module(peer).__version__
    # by which fla, too, computes the gate's backward on Hopper beside Triton 3.4 to 3.7.0
    if "tilelang" in sys.modules:
        versions["tilelang"] = sys.modules["tilelang"].__version__
    rows = []
    record = {
        "gpu": gpu,
        "versions": versions,
        "date": str(date.today()),
        "command": " ".join(["python", "benchmarks/bench_ops.py", *sys.argv[1:]]),
        "timer": "triton.testing.do_bench median, bf16, use_qk_l2norm_in_kernel=True",
        "rows": rows,
    }
    suffix = "_gated" if args.gated else "_token_by_token" if args.token_by_token else "_ops"
    out = Path(args.out or Path(__file__).parent / "results" / f"{gpu.lower().replace(' ', '_')}{suffix}.json")

    def save() -> None:  # after every figure: a run that is cut off keeps what it has
        write(out, record)

    for shape in shapes:
        results = {}
        for name, f in functions.items():
            if takes(name, shape):
                try:
                    results[name] = measure(f, shape, args.rep)
                except Exception as error:  # a peer that fails loses its own column
                    if name not in PEERS:
                        raise
                    results[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
                torch.cuda.empty_cache()
        rows.append({"shape": shape, "results": results})
        for key, peer in (("ratio", "fla"), ("ratio_flash_qla", "flash_qla")):
            if "ours" in results and peer in results:
                rows[-1][key] = {k: round(x / results["ours"][k], 2) for k, x in results[peer].items() if k != "error"}
        save()
        print(json.dumps(rows[-1]), flush=True)
    if args.errors:
        record["errors"] = []
        sizes = sorted({shape[2:] for shape in shapes})
        gates = GATES if args.gated else [None]
        for shape, gate in [((1, T, *size), gate) for T in ERROR_LENGTHS for size in sizes for gate in gates]:
            record["errors"].append({"shape": shape, "gate": gate, **errors(functions, shape, gate)})
            save()
            print("errors", json.dumps(record["errors"][-1]), flush=True)
    if args.cold:
        start = time.time()
        record["first_call_s"] = {"ours": cold("deltanet_kernels")}
        save()
        print("first call", record["first_call_s"], f"({time.time() - start:.0f} s with imports)")
    if args.plot:
        plot(record, Path(args.plot))


if __name__ == "__main__":
    main()
