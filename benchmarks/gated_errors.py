"""Errors of the gated rule beside fla's on the same inputs, on one GPU: cases of `deltanet check`, over several draws.

    python benchmarks/gated_errors.py                        # 5 minutes: both compile kernels for each size
    python benchmarks/gated_errors.py --sizes 128,128 --layouts few plain

Of each quantity: the root mean square of ||x - reference|| / ||reference|| over the draws (reference: fp64), ours over
fla's, and the largest ratio of a single draw. A single draw says little where a gate forgets: with "few" five tokens
make three quarters of dbeta's norm.
"""

import argparse
import json
import math
from datetime import date
from pathlib import Path

import torch
from results_file import write

from deltanet_conversion import check, check_run


SIZES = (128, 128), (64, 64), (96, 192)
LAYOUTS = "few", "plain", "many", "segmented"


def compare(functions: dict, case: check.Case, seeds: int, device: torch.device) -> dict:
    """Of `functions` "ours" and "fla" in one case: errors of ours, ratios over all draws, largest ratios of one."""
    found = {name: [check.run_case(case, device, f, seed) for seed in range(seeds)] for name, f in functions.items()}
    quantities = [x for x, e in found["fla"][0].items() if e]

    def rms(name, x):
        return math.sqrt(sum(e[x] ** 2 for e in found[name]) / seeds)

    return {
        "ours": {x: round(rms("ours", x), 5) for x in quantities},
        "ratio": {x: round(rms("ours", x) / rms("fla", x), 2) for x in quantities},
        "largest": {x: round(max(a[x] / b[x] for a, b in zip(found["ours"], found["fla"])), 2) for x in quantities},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, type=lambda text: tuple(map(int, text.split(","))))
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, choices=LAYOUTS)
    parser.add_argument("--seeds", type=int, default=16, help="draws of each case (default 16)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gated_errors.json")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if why := check_run.missing_peer(device):
        parser.exit(1, f"nothing to compare with: {why}\n")
    import fla
    import triton

    found = {route.name: route.function for route in check_run.routes(device, "fla")}
    functions = {"ours": found["kernels, chunks"], "fla": found["fla, chunks"]}
    rows = []
    record = {
        "gpu": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "fla": fla.__version__},
        "date": str(date.today()),
        "seeds": args.seeds,
        "rows": rows,
    }
    for K, V in args.sizes:
        for layout in args.layouts:
            for gate in check.GATES:
                case = check.Case(K, V, "bfloat16", layout, gate)
                rows.append({"K": K, "V": V, "layout": layout, "gate": gate})
                rows[-1] |= compare(functions, case, args.seeds, device)
                print(json.dumps(rows[-1]), flush=True)
                write(args.out, record)


if __name__ == "__main__":
    main()
