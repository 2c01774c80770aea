"""Times the chunked rule cut into each possible number of segments, on one GPU: the evidence for `count_segments`.

    python benchmarks/bench_segments.py                                # the heads and lengths of benchmarks/README.md
    python benchmarks/bench_segments.py --sizes 128,16 --lengths 5000 --out segments.json

One sequence, bf16, q/k norm in kernel, each call in a CUDA graph, so that the host does not count. The last lines of
the output say where the rule's choice is slower than the best one.
"""

import argparse
import json
import sys
from datetime import date
from pathlib import Path

import torch
from bench_decode import graph_of, median_ms
from deltanet_kernels import _replay, chunk_delta_rule, plan
from results_file import write


SIZES = ["128,1", "128,8", "128,16", "128,20", "128,32", "64,8", "64,32", "256,1", "256,8", "256,16"]
LENGTHS = [1024, 2048, 3001, 4096, 8192, 10001, 32768, 65536]


def measure(d: int, H: int, T: int) -> dict:
    """{segments: [ms forward, ms forward + backward]}, and what the rule chooses for either."""
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(1, T, H, d, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    x = [t.requires_grad_() for t in (q, k, v, torch.rand(1, T, H, device="cuda").bfloat16())]

    def forward():
        with torch.no_grad():
            return chunk_delta_rule(*x, use_qk_l2norm_in_kernel=True)[0]

    def both():
        return torch.autograd.grad(chunk_delta_rule(*x, use_qk_l2norm_in_kernel=True)[0], x, do)

    chosen = [plan.make_plan(*x, None, backward).segments for backward in (False, True)]
    times, rule = {}, plan.count_segments
    try:
        for s in (1, 2, 4, 8, 16, 32):
            # at least four chunks each, and no more programs than a few a multiprocessor
            sensible = 64 * 4 * s <= T and s * H * d <= 8 * 132 * 64
            if s > 1 and not sensible and s not in chosen:
                continue
            plan.count_segments = lambda *_, s=s: s
            plan.plan_of.cache_clear()
            _replay.forget()
            times[s] = [round(median_ms(graph_of(f, 1).replay, repeats=15, inner=4), 4) for f in (forward, both)]
    finally:
        plan.count_segments = rule
        plan.plan_of.cache_clear()
        _replay.forget()
    return {"d": d, "heads": H, "tokens": T, "rule": chosen, "ms": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=SIZES, help="head size and heads each, as 128,16")
    parser.add_argument("--lengths", nargs="*", type=int, default=LENGTHS, help="tokens")
    parser.add_argument("--out", default=None, help="JSON file; default: results/<gpu>_segments.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "bench_segments needs a CUDA GPU: there is nothing to measure in Triton's interpreter\n")
    import triton

    gpu = torch.cuda.get_device_name()
    rows = []
    record = {
        "gpu": gpu,
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "date": str(date.today()),
        "command": " ".join(["python", "benchmarks/bench_segments.py", *sys.argv[1:]]),
        "timer": "one call in a CUDA graph, median of 15 times 4 replays, bf16, use_qk_l2norm_in_kernel=True",
        "columns": "ms: {segments: [forward, forward + backward]}; rule: [inference, training]",
        "rows": rows,
    }
    out = Path(args.out or Path(__file__).parent / "results" / f"{gpu.lower().replace(' ', '_')}_segments.json")
    for size in args.sizes:
        for T in args.lengths:
            rows.append(measure(*map(int, size.split(",")), T))
            write(out, record)  # after every row: a run that is cut off keeps what it has
            print(json.dumps(rows[-1]), flush=True)
            torch.cuda.empty_cache()
    for row in rows:
        for i, what in enumerate(("forward", "forward + backward")):
            best = min(row["ms"], key=lambda s: row["ms"][s][i])
            loss = row["ms"][row["rule"][i]][i] / row["ms"][best][i]
            if loss > 1.05:
                print(
                    f"{row['heads']} heads of {row['d']}, {row['tokens']} tokens, {what}: "
                    f"{loss:.2f} of {best} segments' time"
                )


if __name__ == "__main__":
    main()
