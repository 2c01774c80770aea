"""Whole models on one GPU: training steps and `generate`, ours against fla's DeltaNet and a Llama of equal size.

    python benchmarks/bench_model.py                                     # all of it, the 1.3B size
    python benchmarks/bench_model.py --only train --models ours-liger fla --out benchmarks/results/h200_train.json
    python benchmarks/bench_model.py --only train --models ours-liger --checkpoint-every 3  # recompute every 3rd layer
    python benchmarks/bench_model.py --only train --models ours-liger ours-liger-keep        # what recomputation costs
    python benchmarks/bench_model.py --only decode --models ours-static llama-static --limit 120

Suffixes of a model's name:

    -liger        training: Liger's kernels, as with `use_liger_kernel=True`
    -gated        training, ours: the same model with the gate (`linear_use_decay`)
    -keep         training, ours: nothing is recomputed; -keepmixer, -keepmlp: not this part of a layer
    -compiled     training: torch.compile with fullgraph; decoding: a static cache and Transformers' CompileConfig()
    -static       decoding: a static cache and what `generate` does with it: ours replays a CUDA graph of the eager
                  step, others' steps are compiled
    -cudagraphs   decoding: a static cache and torch's backend of that name: Dynamo's graph, captured without Inductor

Each row is measured in a process of its own, so that a model that fails, or takes longer than --limit, loses its own
row only. Rows are printed, and written to --out, as they come.

All models have bf16 weights drawn at random and see the same random tokens. Training is forward, loss, backward and a
fused AdamW step, without recomputation unless asked for. The peer `fla` is left out, with a message, where it is not
installed.
"""

import argparse
import datetime
import multiprocessing
import sys
import time
from pathlib import Path

import torch
import transformers
import triton
from results_file import write
from rich.console import Console
from rich.table import Table
from torch._dynamo.utils import counters
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM
from transformers.integrations.liger import apply_liger_kernel

from modeling_deltanet import DeltaNetConfig, DeltaNetForCausalLM


try:
    import fla
    from fla.models import DeltaNetConfig as FlaConfig
    from fla.models import DeltaNetForCausalLM as FlaForCausalLM
except ImportError:
    fla = None

H200_BF16_TFLOPS = 989  # dense peak of the data sheet, the denominator of model FLOP utilisation
console = Console(width=140)

# The parts of a layer that keep everything, where backward would compute them again.
KEEP = {"keep": ("linear_attn", "mlp"), "keepmixer": ("linear_attn",), "keepmlp": ("mlp",)}
# What `generate` is told about compilation.
DECODE = {
    "static": {},
    "compiled": {"compile_config": CompileConfig()},
    "cudagraphs": {"compile_config": CompileConfig(backend="cudagraphs", mode=None)},
}
EXTRAS = {"train": {"liger", "compiled", "gated", *KEEP}, "decode": set(DECODE)}


def make_model(name: str, size: str):
    torch.manual_seed(0)
    family, *extras = name.split("-")
    config = DeltaNetConfig.preset(size, **({"linear_use_decay": True} if "gated" in extras else {}))
    with torch.device("cuda"):  # to draw 1.3 billion numbers on the CPU takes longer than some of the measurements
        if family == "llama":
            model = LlamaForCausalLM._from_config(
                LlamaConfig(
                    vocab_size=config.vocab_size,
                    hidden_size=config.hidden_size,
                    intermediate_size=config.intermediate_size,
                    num_hidden_layers=config.num_hidden_layers,
                    num_attention_heads=config.num_attention_heads,
                    max_position_embeddings=131072,
                ),
                dtype=torch.bfloat16,
            )
        elif family == "fla":
            model = FlaForCausalLM(
                FlaConfig(
                    hidden_size=config.hidden_size,
                    num_hidden_layers=config.num_hidden_layers,
                    num_heads=config.linear_num_key_heads,
                    vocab_size=config.vocab_size,
                )
            ).to(torch.bfloat16)
        else:
            model = DeltaNetForCausalLM._from_config(config, dtype=torch.bfloat16)
    if "liger" in extras:
        apply_liger_kernel(model, {})
    for part in (part for extra in extras for part in KEEP.get(extra, ())):
        for module in (getattr(layer, part) for layer in model.model.layers if hasattr(layer, part)):
            # a layer's last word to its parts is whether to recompute
            module.forward = lambda *inputs, forward=module.forward: forward(*inputs[:-1])
    return model


def bench_train(name, args):
    """Tokens per second and peak memory of a training step: --steps in a row after 3, the first step timed apart.

    The host waits for the GPU before and after them and not in between, as in training.
    """
    model = make_model(name, args.size).train()
    if args.checkpoint_every:
        model.activation_checkpointing_enable(every_n_layers=args.checkpoint_every)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(model.config.vocab_size, (args.batch, args.length), device="cuda")

    def loss_of(ids):
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    if name.endswith("compiled"):
        # Logits that a graph returns beside the loss get a gradient, of zeros: 2.1 GB to write, keep and read.
        loss_of = torch.compile(loss_of, fullgraph=True)

    def steps(n):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(n):
            loss_of(ids).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / n

    torch.cuda.reset_peak_memory_stats()
    first = steps(1)
    steps(2)
    seconds = steps(args.steps)
    tokens = args.batch * args.length
    flops = 6 * model.num_parameters(exclude_embeddings=True) * tokens  # what a token costs whatever the mixer
    return {
        "model": name,
        "tokens_per_second": tokens / seconds,
        "step_ms": 1e3 * seconds,
        "first_step_s": first,
        "peak_GB": torch.cuda.max_memory_allocated() / 1e9,
        "utilisation": flops / seconds / (H200_BF16_TFLOPS * 1e12),
    }


@torch.no_grad()
def bench_decode(name, args):
    """Milliseconds per generated token, from the difference of a long and a short greedy generation."""
    model = make_model(name, args.size).eval()
    ids = torch.randint(5, model.config.vocab_size, (args.decode_batch, args.prompt), device="cuda")
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for extra in name.split("-")[1:]:
        static = {"cache_implementation": "static", "max_cache_len": args.prompt + 16 + args.new_tokens}
        options |= static | DECODE[extra]

    def generate(new_tokens):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, **options)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    first = generate(16)
    console.print(f"{name}: first generate {first:.1f} s, graphs: {counters['stats']['unique_graphs']}")
    generate(16 + args.new_tokens)  # cuDNN's attention plans for every length that it has not seen
    short, long = generate(16), generate(16 + args.new_tokens)
    return {
        "model": name,
        "ms_per_token": 1e3 * (long - short) / args.new_tokens,
        "first_generate_s": first,
        "peak_GB": torch.cuda.max_memory_allocated() / 1e9,
        "graphs": counters["stats"]["unique_graphs"],
        "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
    }


BENCHES = {"train": bench_train, "decode": bench_decode}


def measure(task, name, args) -> dict:
    """A row, from a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_line, args=(sender, task, name, args))
    process.start()
    sender.close()
    try:
        if not receiver.poll(args.limit):
            return {"model": name, "error": f"not done after {args.limit} s"}
        return receiver.recv()
    except EOFError:
        process.join()
        return {"model": name, "error": f"its process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def send_line(sender, task, name, args) -> None:
    try:
        row = BENCHES[task](name, args)
    except (RuntimeError, ImportError, ValueError) as error:
        row = {"model": name, "error": f"{type(error).__name__}: {error}"[:300]}
    sender.send(row)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["ours", "ours-liger", "ours-compiled", "ours-static", "fla", "llama", "llama-liger", "llama-compiled"]
    parser.add_argument("--only", choices=["train", "decode"], help="one of the two measurements (default both)")
    parser.add_argument("--models", nargs="+", default=names, help=f"default {' '.join(names)}")
    parser.add_argument("--size", default="1.3B", help="a preset of DeltaNetConfig (default 1.3B)")
    parser.add_argument("--batch", type=int, default=8, help="sequences a training step (default 8)")
    parser.add_argument("--length", type=int, default=4096, help="tokens a training sequence (default 4096)")
    parser.add_argument("--decode-batch", type=int, default=8, help="sequences generated at once (default 8)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (default 512)")
    parser.add_argument("--new-tokens", type=int, default=64, help="generated tokens that are timed (default 64)")
    parser.add_argument("--steps", type=int, default=6, help="training steps that are timed (default 6)")
    parser.add_argument(
        "--checkpoint-every",
        type=int,
        default=0,
        metavar="N",
        help="recompute every Nth layer in training (default none)",
    )
    parser.add_argument("--limit", type=float, default=300, help="seconds that a line may take (default 300)")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    models, known = args.models, set.union(*EXTRAS.values())
    for name in models:
        family, *extras = name.split("-")
        if family not in ("ours", "fla", "llama") or not set(extras) <= known:
            parser.error(f"no model {name!r}: ours, fla or llama, and behind it {', '.join(sorted(known))}")
    if fla is None and any(name.startswith("fla") for name in models):
        console.print("fla is not installed: left out")
        models = [name for name in models if not name.startswith("fla")]

    results = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "fla": fla and fla.__version__,
        "date": datetime.date.today().isoformat(),
        "command": "python " + " ".join(sys.argv),
    }
    for task, extras in EXTRAS.items():
        if args.only not in (None, task):
            continue
        results[task] = []
        for name in models:
            if not set(name.split("-")[1:]) <= extras:
                continue  # a matter of the other task only
            row = measure(task, name, args)
            results[task].append(row)
            console.print(task, {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
            if args.out:
                write(args.out, results)
        columns = max((list(row) for row in results[task]), key=len, default=[])
        table = Table(*columns, title=f"{task}, {args.size}")
        for row in results[task]:
            table.add_row(*(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()))
        console.print(table)


if __name__ == "__main__":
    main()
