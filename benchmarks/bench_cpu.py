"""The torch rule on this machine's CPU: against Transformers' torch fallback, against itself token by token, decoding.

    python benchmarks/bench_cpu.py                         # print the tables, row by row
    python benchmarks/bench_cpu.py --out benchmarks/results/cpu.json

What stands in one row is measured in turns, on the same inputs, so that a busy moment of the machine hits all of it: a
figure is the median of the rounds, in brackets the quartiles, and a ratio the median of the ratios within a round.
Each row takes `--seconds`. The peer is `torch_chunk_gated_delta_rule` of transformers, with zero decay: then it
computes the same rule.
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
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import torch_chunk_gated_delta_rule

from modeling_deltanet import DeltaNetConfig, DeltaNetForCausalLM
from modeling_deltanet.delta_rule import torch_chunk_delta_rule, torch_recurrent_delta_rule


CHUNK_SHAPES = [(1, 2048, 8, 64), (1, 1024, 4, 128), (1, 2048, 4, 128), (4, 512, 4, 64)]
RECURRENT_SHAPES = [(1, 2048, 8, 64), (1, 2048, 4, 128)]
DECODE_CONTEXTS = [1024, 32768]
RULE_HEAD = ["B, T, H, D", "forward", "peer's forward", "with backward", "peer's with backward", "ratio", "ratio"]
HEADS = {
    "against_transformers_torch_fallback": RULE_HEAD,
    "against_token_by_token": RULE_HEAD,
    "decode_step": ["context", "one step"],
}


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


def in_turns(functions, seconds, least=5):
    """name -> milliseconds of each round, for `functions` by name; as many rounds as fit into `seconds`, at least
    `least`.

    Every second round goes backwards: otherwise each function would always find the cache as the same other left it.
    """
    times = {name: [] for name in functions}
    for function in functions.values():
        function()
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < least or time.perf_counter() < end:
        for name in reversed(functions) if len(next(iter(times.values()))) % 2 else functions:
            start = time.perf_counter()
            functions[name]()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def row(times):
    """Of each series of milliseconds its median and its quartiles."""
    found = {}
    for name, series in times.items():
        low, middle, high = statistics.quantiles(series, n=4)
        found |= {f"{name}_ms": round(middle, 3), f"{name}_ms_quartiles": [round(low, 3), round(high, 3)]}
    return found


def ratio(times, name, other):
    return round(statistics.median(x / y for x, y in zip(times[name], times[other])), 4)


def without_gradients(rule, inputs):
    with torch.no_grad():
        return rule(*inputs)


def bench_rule(shape, other, seconds):
    inputs, do = make_inputs(*shape)
    expected = without_gradients(ours, inputs)[0]
    difference = (expected - without_gradients(other, inputs)[0]).norm() / expected.norm()
    assert difference < 1e-4, f"the two do not compute the same at {shape}: {difference}"
    times = in_turns(
        {
            "forward": lambda: without_gradients(ours, inputs),
            "other_forward": lambda: without_gradients(other, inputs),
            "forward_backward": lambda: forward_backward(ours, inputs, do),
            "other_forward_backward": lambda: forward_backward(other, inputs, do),
        },
        seconds,
    )
    return {
        "B, T, H, D": list(shape),
        "rounds": len(times["forward"]),
        **row(times),
        "forward_ratio": ratio(times, "forward", "other_forward"),
        "forward_backward_ratio": ratio(times, "forward_backward", "other_forward_backward"),
    }


@torch.no_grad()
def bench_decode(seconds):
    """One step of an all-linear model after contexts of different length: its time and the bytes of its cache."""
    config = DeltaNetConfig(
        hidden_size=256, num_hidden_layers=4, linear_num_key_heads=4, vocab_size=1000, max_position_embeddings=32768
    )
    torch.manual_seed(0)
    model = DeltaNetForCausalLM(config).eval()
    caches = {}
    for context in DECODE_CONTEXTS:
        ids = torch.randint(1000, (1, context))
        caches[context] = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    token = torch.randint(1000, (1, 1))
    steps = {context: lambda cache=cache: model(token, past_key_values=cache) for context, cache in caches.items()}
    for context, series in in_turns(steps, seconds).items():
        states = (
            state
            for layer in caches[context].layers
            for state in (*layer.conv_states.values(), *layer.recurrent_states.values())
        )
        yield {
            "context": context,
            "rounds": len(series),
            **row({"step": series}),
            "cache_bytes": sum(state.nbytes for state in states),
        }


def noise(found):
    """What cannot be true of a row: something else kept the machine busy, and no figure of this run is to be used."""
    if "forward_ms" not in found:
        return None
    for name in ("", "other_"):
        forward, both = found[f"{name}forward_ms"], found[f"{name}forward_backward_ms"]
        if forward > both:
            return f"{name}forward ({forward} ms) takes longer than with backward ({both} ms): the machine is busy"
    return None


def show(found):
    """One row of a table, as soon as it is measured."""
    cells = [",".join(map(str, found["B, T, H, D"])) if "B, T, H, D" in found else f"{found['context']} tokens"]
    for key, value in found.items():
        if f"{key}_quartiles" in found:
            low, high = found[f"{key}_quartiles"]
            cells.append(f"{value:.4g} [{low:.4g}, {high:.4g}]")
        elif key.endswith("_ratio"):
            cells.append(f"{value:.2f}")
    print_cells(cells)


def print_cells(cells):
    print(
        f"{cells[0]:<14}" + "".join(f"{cell:>26}" if " " in cell else f"{cell:>8}" for cell in cells[1:]), flush=True
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads torch may use (default 2)")
    parser.add_argument("--seconds", type=float, default=20, help="for each row (default 20)")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()  # the peer's remark that it is a fallback: that is why it is here

    tables = {
        "against_transformers_torch_fallback": ([shape, peer] for shape in CHUNK_SHAPES),
        "against_token_by_token": ([shape, token_by_token] for shape in RECURRENT_SHAPES),
    }
    rows = len(CHUNK_SHAPES) + len(RECURRENT_SHAPES) + 1
    print(f"{rows} rows of {args.seconds:g} s, and some seconds between them: about {rows * args.seconds + 10:.0f} s")
    results = {
        "machine": f"{platform.machine()}, {args.threads} threads, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
        "command": "python " + " ".join(sys.argv),
    }
    for name, pairs in tables.items():
        results[name] = measured(name, (bench_rule(*pair, args.seconds) for pair in pairs))
    results["decode_step"] = measured("decode_step", bench_decode(args.seconds))
    if busy := [problem for name in tables for found in results[name] if (problem := noise(found))]:
        sys.exit("not written, measure again:\n" + "\n".join(busy))
    if args.out:
        write(args.out, results)
        print(f"written to {args.out}")


def measured(name, rows):
    """The rows of one table, shown as they come."""
    print(f"\n{name.replace('_', ' ')}, ms")
    print_cells(HEADS[name])
    found = []
    for each in rows:
        show(each)
        found.append(each)
    return found


if __name__ == "__main__":
    main()
