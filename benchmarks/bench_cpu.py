"""The torch rule on this machine's CPU: against Transformers' torch fallback, against itself token by token, decoding.

    python benchmarks/bench_cpu.py                         # print the tables
    python benchmarks/bench_cpu.py --out benchmarks/results/cpu.json

Every ratio is of medians measured in this run, on the same inputs, in alternation. The peer is
`torch_chunk_gated_delta_rule` of transformers, with zero decay: then it computes the same rule.
"""

import argparse
import datetime
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from results_file import write
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import torch_chunk_gated_delta_rule

from modeling_deltanet import DeltaNetConfig, DeltaNetForCausalLM
from modeling_deltanet.delta_rule import torch_chunk_delta_rule, torch_recurrent_delta_rule


CHUNK_SHAPES = [(1, 2048, 8, 64), (1, 1024, 4, 128), (1, 2048, 4, 128), (4, 512, 4, 64)]
RECURRENT_SHAPES = [(1, 2048, 8, 64), (1, 2048, 4, 128)]
DECODE_CONTEXTS = [1024, 32768]


def make_inputs(B, T, H, D):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, T, H, D, generator=generator, requires_grad=True) for _ in range(3))
    beta = torch.rand(B, T, H, generator=generator).requires_grad_()
    return (q, k, v, beta), torch.randn(B, T, H, D, generator=generator)


def forward_backward(rule, inputs, do):
    o, _ = rule(*inputs)
    torch.autograd.grad(o, inputs, do)
    return o


def ours(q, k, v, beta):
    return torch_chunk_delta_rule(q, k, v, beta, use_qk_l2norm_in_kernel=True)


def token_by_token(q, k, v, beta):
    return torch_recurrent_delta_rule(q, k, v, beta, use_qk_l2norm_in_kernel=True)


def peer(q, k, v, beta):
    return torch_chunk_gated_delta_rule(q, k, v, torch.zeros_like(beta), beta, use_qk_l2norm_in_kernel=True)


def medians(functions, repeats):
    """Median milliseconds of each function; they take turns, so that a busy moment hits all of them."""
    times = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(repeats):
        for function, series in zip(functions, times):
            start = time.perf_counter()
            function()
            series.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(series) for series in times]


def bench_rules(shapes, other, repeats):
    rows = []
    for shape in track(shapes, description=f"chunked against {other.__name__}"):
        inputs, do = make_inputs(*shape)
        difference = (ours(*inputs)[0] - other(*inputs)[0]).norm() / ours(*inputs)[0].norm()
        assert difference < 1e-4, f"the two do not compute the same at {shape}: {difference}"
        with torch.no_grad():
            forward = medians([lambda: ours(*inputs), lambda: other(*inputs)], repeats)  # noqa: B023
        both = medians(
            [lambda: forward_backward(ours, inputs, do), lambda: forward_backward(other, inputs, do)],  # noqa: B023
            repeats,
        )
        rows.append(
            {
                "B, T, H, D": list(shape),
                "forward_ms": forward[0],
                "other_forward_ms": forward[1],
                "forward_backward_ms": both[0],
                "other_forward_backward_ms": both[1],
                "forward_backward_ratio": both[0] / both[1],
            }
        )
    return rows


@torch.no_grad()
def bench_decode(repeats):
    """One step of an all-linear model after contexts of different length: its time and the bytes of its cache."""
    config = DeltaNetConfig(
        hidden_size=256, num_hidden_layers=4, linear_num_key_heads=4, vocab_size=1000, max_position_embeddings=32768
    )
    torch.manual_seed(0)
    model = DeltaNetForCausalLM(config).eval()
    caches = {}
    for context in track(DECODE_CONTEXTS, description="reading the contexts"):
        ids = torch.randint(1000, (1, context))
        caches[context] = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    step = torch.randint(1000, (1, 1))
    times = medians([lambda cache=cache: model(step, past_key_values=cache) for cache in caches.values()], repeats)
    return [
        {
            "context": context,
            "step_ms": ms,
            "cache_bytes": sum(
                state.nbytes
                for layer in cache.layers
                for state in (*layer.conv_states.values(), *layer.recurrent_states.values())
            ),
        }
        for (context, cache), ms in zip(caches.items(), times)
    ]


def table(title, rows):
    out = Table(*rows[0], title=title)
    for row in rows:
        out.add_row(*(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()))
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads torch may use (default 2)")
    parser.add_argument("--repeats", type=int, default=15, help="measurements of which the median counts (default 15)")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    results = {
        "machine": f"{platform.machine()}, {args.threads} threads, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
        "command": "python " + " ".join(sys.argv),
        "against_transformers_torch_fallback": bench_rules(CHUNK_SHAPES, peer, args.repeats),
        "against_token_by_token": bench_rules(RECURRENT_SHAPES, token_by_token, max(3, args.repeats // 5)),
        "decode_step": bench_decode(10 * args.repeats),
    }
    console = Console(width=140)
    for name, rows in results.items():
        if isinstance(rows, list):
            console.print(table(name.replace("_", " "), rows))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write(args.out, results)
        console.print(f"written to {args.out}")


if __name__ == "__main__":
    main()
