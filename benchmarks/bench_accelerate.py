"""Transformers' own models on one GPU: as they are, with fla, and with `deltanet_kernels.accelerate()`.

    python benchmarks/bench_accelerate.py
    python benchmarks/bench_accelerate.py --models olmo-hybrid-1b --only train --out benchmarks/results/h100_olmo.json

Three measurements: a training step (forward, loss, backward, a fused AdamW step), the prefill of a long prompt, and a
generated token. Three ways to compute:

    torch    Transformers without flash-linear-attention: the rule and the convolution in torch
    fla      Transformers with flash-linear-attention, which it finds by itself: fla's rule; the convolution by
             causal-conv1d where that is installed, otherwise by torch
    ours     the same, and `deltanet_kernels.accelerate()`: our rule and our convolution

The models have bf16 weights drawn at random, in the proportions of Qwen3.5-2B and of a 1B OLMo-Hybrid, and see the
same random tokens. Each row is measured in a process of its own, since Transformers looks for fla once. A training
step that does not fit into the GPU's memory is measured with half the batch, and its row says so.
"""

import argparse
import datetime
import importlib.metadata
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
import triton
from results_file import write
from rich.console import Console
from rich.table import Table


console = Console(width=140)
MODELS = {
    "qwen3.5-2b": {
        "model_type": "qwen3_5_text", "vocab_size": 248320, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 24, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256,
        "linear_num_key_heads": 16, "linear_num_value_heads": 16, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "tie_word_embeddings": True,
    },
    # the 7B model's rules (heads of 96 and 192, one softmax layer in four) at the width and depth of OLMo-2-1B
    "olmo-hybrid-1b": {
        "model_type": "olmo_hybrid", "vocab_size": 100352, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 16,
    },
}  # fmt: skip
WAYS = ("torch", "fla", "ours")


def make_model(name: str, way: str):
    """On the GPU, in bf16; to be called first in a process."""
    os.environ.setdefault("FLA_FLASH_QLA", "0")  # fla hands its calls to FlashQLA where it finds it
    if way == "torch":
        sys.modules["fla"] = None  # Transformers finds none
    from transformers import AutoConfig, AutoModelForCausalLM

    if way == "ours":
        import deltanet_kernels

        deltanet_kernels.accelerate()
    torch.manual_seed(0)
    fields = dict(MODELS[name])
    config = AutoConfig.for_model(fields.pop("model_type"), max_position_embeddings=65536, **fields)
    with torch.device("cuda"):  # the CPU takes minutes to draw that many numbers
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def seconds_of(function) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def bench_train(model, args) -> dict:
    """Tokens per second and peak memory, of --steps in a row after 3."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(model.config.vocab_size, (args.batch, args.length), device="cuda")

    def steps(n):
        for _ in range(n):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    while True:
        try:
            steps(3)
            break
        except torch.OutOfMemoryError:
            if len(ids) == 1:
                raise
        optimizer.zero_grad(set_to_none=True)  # outside the except clause, whose error holds the step's memory
        ids = ids[: len(ids) // 2]
    torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(lambda: steps(args.steps)) / args.steps
    return {
        "tokens_per_second": ids.numel() / seconds,
        "step_ms": 1e3 * seconds,
        "batch": len(ids),
        "peak_GB": torch.cuda.max_memory_allocated() / 1e9,
    }


@torch.no_grad()
def bench_prefill(model, args) -> dict:
    """Milliseconds until the first token's logits and the cache are there, of a prompt of --prompt tokens."""
    model.eval()
    ids = torch.randint(model.config.vocab_size, (1, args.prompt), device="cuda")
    times = [seconds_of(lambda: model(ids, use_cache=True, logits_to_keep=1)) for _ in range(5)]
    return {"ms": 1e3 * statistics.median(times[2:]), "peak_GB": torch.cuda.max_memory_allocated() / 1e9}


@torch.no_grad()
def bench_decode(model, args) -> dict:
    """Milliseconds per generated token, from the difference of a long and a short greedy generation."""
    model.eval()
    ids = torch.randint(model.config.vocab_size, (1, 512), device="cuda")

    def generate(n):
        model.generate(
            ids, max_new_tokens=n, min_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True
        )

    generate(16 + args.new_tokens)  # cuDNN's attention plans for every length that it has not seen
    short, long = (seconds_of(lambda n=n: generate(n)) for n in (16, 16 + args.new_tokens))
    return {"ms_per_token": 1e3 * (long - short) / args.new_tokens}


BENCHES = {"train": bench_train, "prefill": bench_prefill, "decode": bench_decode}
COMPARED = {"train": "tokens_per_second", "prefill": "ms", "decode": "ms_per_token"}  # what a ratio is made of


def measure(task: str, name: str, way: str, args) -> dict:
    row = {"model": name, "way": way}
    try:
        return row | BENCHES[task](make_model(name, way), args)
    except (RuntimeError, ImportError, ValueError) as error:
        return row | {"error": f"{type(error).__name__}: {error}"[:300]}


def ratios(task: str, rows: list[dict]) -> list[dict]:
    """How many times faster ours is."""
    figures = {(row["model"], row["way"]): row.get(COMPARED[task]) for row in rows}
    found = []
    for (name, way), figure in figures.items():
        ours = figures.get((name, "ours"))
        if way != "ours" and ours and figure:
            found.append({"model": name, "over": way, "ratio": ours / figure if task == "train" else figure / ours})
    return found


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES), help="measurements (default all)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default all")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default all")
    parser.add_argument("--batch", type=int, default=4, help="sequences a training step (default 4)")
    parser.add_argument("--length", type=int, default=4096, help="tokens a training sequence (default 4096)")
    parser.add_argument("--steps", type=int, default=6, help="training steps that are timed (default 6)")
    parser.add_argument("--prompt", type=int, default=32768, help="tokens of the prompt to prefill (default 32768)")
    parser.add_argument("--new-tokens", type=int, default=64, help="generated tokens that are timed (default 64)")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    versions = {
        package: version_of(package) for package in ("flash-linear-attention", "fla-core", "tilelang", "causal-conv1d")
    }
    ways = [way for way in args.ways if way != "fla" or versions["fla-core"]]
    if ways != args.ways:
        console.print("flash-linear-attention is not installed: its rows are left out")

    results = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        **versions,
        "date": datetime.date.today().isoformat(),
        "command": "python " + " ".join(sys.argv),
    }
    for task in args.only:
        results[task] = []
        for name in args.models:
            for way in ways:
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    row = pool.submit(measure, task, name, way, args).result()
                results[task].append(row)
                console.print(task, {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
                results[f"{task}_ratios"] = ratios(task, results[task])
                if args.out:
                    write(args.out, results)
        table = Table("model", "ours over", "times", title=task)
        for row in results[f"{task}_ratios"]:
            table.add_row(row["model"], row["over"], f"{row['ratio']:.2f}")
        console.print(table)


if __name__ == "__main__":
    main()
