"""Each kernel of the chunked rule alone, beside the time that its bytes take at the copy bandwidth of this GPU.

python benchmarks/bench_kernels.py                                    # the shapes of benchmarks/README.md
python benchmarks/bench_kernels.py --shapes 8,4096,16,128 --triton    # Triton's where Gluon's would run
python benchmarks/bench_kernels.py --out benchmarks/results/h200_kernels.json
"""

import argparse
import sys
from datetime import date
from pathlib import Path

import torch
from bench_ops import SHAPES
from deltanet_kernels import grads, layout, plan, prepare, reverse, scan
from results_file import write


def copy_bandwidth(timer) -> float:
    """Bytes per second, read and written, of a copy that no cache holds."""
    x = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2e3 * x.numel() / timer(lambda: y.copy_(x))


def size(*tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def measure(shape, timer, triton_only: bool, device: str = "cuda") -> dict:
    """Kernel -> (ms, bytes read and written); sequences are not cut into segments."""
    B, T, H, d = shape
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(B, T, H, d, device=device, dtype=torch.bfloat16) for _ in range(4))
    beta = torch.rand(B, T, H, device=device, dtype=torch.bfloat16)
    scale = d**-0.5
    chosen = plan.make_plan(q, k, v, beta, None, True, cut=False, aligned=not triton_only)
    x, t = layout.Inputs(q, k, v, beta, None, None, None), layout.tables(B, T, None)
    places, bytes_ = layout.scratch_layout(chosen, True, True, t.n_chunks)
    scratch = layout.scratch_in(torch.empty(bytes_, dtype=torch.uint8, device=device), places)
    a, p, rq, rk, u, s, _ = scratch
    o, dv, dq, dk, dbeta = (torch.empty_like(x) for x in (v, v, q, k, beta))
    ds = torch.empty(layout.s_shape(chosen, t.n_chunks), dtype=q.dtype, device=device)

    def run_prepare():
        prepare.prepare(x, scratch, t, chosen, scale)

    def run_scan(save):
        places = scratch if save else scratch._replace(u=None, s=None)
        scan.scan(x, places, t, chosen, scale, chosen.scan, o=o)

    def run_reverse():
        reverse.reverse(x, do, scratch, t, chosen, scale, chosen.reverse, dht=None, dv=dv, ds=ds, dh0=None)

    def run_grads():
        grads.grads(x, do, scratch, t, chosen, scale, dv=dv, ds=ds, flags=None, dq=dq, dk=dk, dbeta=dbeta, dg=None)

    run_prepare()
    run_scan(save=True)
    run_reverse()
    return {
        "prepare" if p is None else "prepare and scores": (
            timer(run_prepare), size(k, beta, a, rk, rq, p) + size(q) * (p is not None)
        ),
        "scan, inference": (timer(lambda: run_scan(save=False)), size(q, k, v, a, p, rk, o)),
        "scan, training": (timer(lambda: run_scan(save=True)), size(q, k, v, a, p, rk, rq, o, u, s)),
        "reverse": (timer(run_reverse), size(q, k, do, a, p, rq, rk, dv, ds)),
        "grads": (timer(run_grads), size(q, k, do, u, dv, s, ds, rq, rk, dq, dk, dbeta)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", help="B,T,H,d each; default: the table in kernels/README.md")
    parser.add_argument("--triton", action="store_true", help="not the Gluon kernels")
    parser.add_argument("--rep", type=int, default=60, help="milliseconds of repetition a figure (default 60)")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "bench_kernels needs a CUDA GPU: there is nothing to measure in Triton's interpreter\n")
    import triton

    def timer(f):
        return triton.testing.do_bench(f, warmup=10, rep=args.rep, return_mode="median")

    bandwidth = copy_bandwidth(timer)
    record = {
        "gpu": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "date": str(date.today()),
        "command": " ".join(["python", "benchmarks/bench_kernels.py", *sys.argv[1:]]),
        "copy_TB_per_s": bandwidth / 1e12,
        "rows": [],
    }
    for shape in [tuple(map(int, s.split(","))) for s in args.shapes] if args.shapes else SHAPES:
        for kernel, (ms, nbytes) in measure(shape, timer, args.triton).items():
            row = {"shape": shape, "kernel": kernel, "ms": ms, "floor_ms": 1e3 * nbytes / bandwidth}
            record["rows"].append(row)
            print(shape, f"{kernel:20} {ms:.4f} ms, floor {row['floor_ms']:.4f}", flush=True)
            if args.out:  # after every figure: a run that is cut off keeps what it has
                write(args.out, record)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
