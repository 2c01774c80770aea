"""Peak memory of a conversion: the 1.3B preset with random weights, to fla's form and back, each in a fresh process.

    python benchmarks/convert_memory.py
    python benchmarks/convert_memory.py --shard-size 500 --out benchmarks/results/convert_memory.json

What counts is the process's peak resident set (mapped pages of the files included) over what Python, torch and
Transformers take before the conversion begins, against the source's largest file. Both are reported.
"""

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from results_file import write
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from deltanet_conversion import convert_from_fla, convert_to_fla
from deltanet_conversion.checkpoint import INDEX, Checkpoint, expected_tensors
from modeling_deltanet import DeltaNetConfig


BAR = 1.5
MB = 1e6
console = Console(width=140)


def make_checkpoint(folder: Path, size: str, shard_size: float) -> None:
    """Random bf16 weights in files of at most `shard_size` MB, one in memory at a time."""
    config = DeltaNetConfig.preset(size, architectures=["DeltaNetForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    shards, pending = [[]], 0
    for name, shape in expected_tensors(config).items():
        n = 2 * torch.Size(shape).numel()
        if shards[-1] and pending + n > shard_size * MB:
            shards.append([])
            pending = 0
        shards[-1].append((name, shape))
        pending += n
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def memory(field: str) -> float:
    """MB of this process: `VmRSS`, what it holds, or `VmHWM`, the most that it held (getrusage's figure would be its
    parent's, where that was larger)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / MB


def convert(direction: str, source: str, target: str) -> None:
    """In a process of its own: convert and print the measurement as JSON."""
    before, start = memory("VmRSS"), time.perf_counter()
    {"to fla": convert_to_fla, "from fla": convert_from_fla}[direction](source, target)
    peak = memory("VmHWM")
    shard = Checkpoint(source).largest_shard / MB
    print(
        json.dumps(
            {
                "direction": direction,
                "largest_shard_mb": round(shard, 1),
                "before_mb": round(before, 1),
                "peak_mb": round(peak, 1),
                "conversion_over_shard": round((peak - before) / shard, 3),
                "process_over_shard": round(peak / shard, 3),
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.3B", help="preset, 340M or 1.3B (default 1.3B)")
    parser.add_argument(
        "--shard-size",
        type=float,
        nargs="+",
        default=[500.0, 5000.0],
        help="MB a file (default 500, and 5000: one file)",
    )
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    parser.add_argument("--convert", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.convert:
        convert(*args.convert)
        return
    rows = []
    for shard_size in args.shard_size:
        with tempfile.TemporaryDirectory() as folder:
            make_checkpoint(Path(folder, "ours"), args.size, shard_size)
            for direction, source, target in (("to fla", "ours", "fla"), ("from fla", "fla", "back")):
                command = [
                    sys.executable,
                    __file__,
                    "--convert",
                    direction,
                    f"{folder}/{source}",
                    f"{folder}/{target}",
                ]
                rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
                console.print(rows[-1])
    results = {
        "size": args.size,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": "python " + " ".join(sys.argv),
        "bar": BAR,
        "met": all(row["conversion_over_shard"] <= BAR for row in rows),
        "rows": rows,
    }
    if args.out:
        write(args.out, results)
    table = Table(*rows[0], title=f"converting the {args.size} preset, bf16")
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)


if __name__ == "__main__":
    main()
