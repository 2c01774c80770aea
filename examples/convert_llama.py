"""A conversion from end to end: a small Llama-style teacher, trained here, becomes a hybrid DeltaNet.

Trains a tokenizer and a teacher on the Python sources of the standard library, mixed with a recall task; keeps softmax
attention in a quarter of the layers; aligns the new mixers; distils; and measures perplexity and recall of the teacher
and of the student at each stage. Minutes on one GPU:

    python examples/convert_llama.py
    python examples/convert_llama.py --output-dir runs/none-kept --keep none        # what the kept layers are worth
    python examples/convert_llama.py --output-dir runs/toy --toy              # the whole way on a CPU, in a minute

Steps that are done are not done again: after Ctrl-C the same command goes on. The conversion itself is three commands,
which this script calls as functions and prints:

    deltanet convert TEACHER HYBRID --keep 0.25
    deltanet align TEACHER HYBRID ALIGNED --data text.jsonl
    deltanet distill TEACHER ALIGNED DISTILLED --data text.jsonl

The teacher is a Qwen2, a Llama with biases, whose first layer sees two tokens only and whose embeddings are not tied,
and it begins with recall alone, until it has learned that. At the sizes of --toy it had after 400 steps; with tied
embeddings not after 480, beside text not after 700, and two layers of a Llama without that window not after 1300.

Recall is overwriting recall: 8 keys are written 4 times each with fresh values, then each key is asked for, and the
last value counts. Chance is 1 in the number of values.
"""

import argparse
import itertools
import json
import math
import os
import platform
import random
import sysconfig
import time
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import recall  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from shared import claim, refusals, run, train, train_tokenizer  # noqa: E402
from tokenizers import AddedToken  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from deltanet_conversion import Distillation, Stage, align, convert_checkpoint, distill  # noqa: E402
from deltanet_conversion.checkpoint import new_folder  # noqa: E402
from deltanet_conversion.text import blocks, load_text  # noqa: E402


KEYS, WRITES = recall.AT_ONCE, 4  # of the task that is measured
DOCUMENT = 96  # tokens of a document of the task to learn from, its end included
MOST_FIRST = 40_000  # documents of it, and nothing else, that the teacher begins with
SOLVED = 0.1  # loss in nats an answer at which it goes on to all the text
EPISODES = 256
console = Console()


def python_sources(megabytes: float) -> tuple[list[str], list[str]]:
    """Modules of the standard library, its tests included: what to train on, and every twentieth, held out."""
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in library.rglob("*.py") if not {"site-packages", "dist-packages"} & set(path.parts))
    random.Random(0).shuffle(files)
    texts, size = [], 0
    for file in files:
        texts.append(file.read_text(encoding="utf-8", errors="ignore"))
        size += len(texts[-1])
        if size > megabytes * 1e6 and len(texts) >= 20:
            break
    return [text for i, text in enumerate(texts) if i % 20], texts[::20]


def key(i: int) -> str:
    return f"<k{i}>"


def value(i: int) -> str:
    return f"<v{i}>"


def recall_stream(draw: random.Random, symbols: int, length: int) -> str:
    """The task to learn from, `length` tokens, see `recall.py`."""
    return "".join(recall.recall_stream(draw, *names(symbols), "<q>", length))


def recall_episode(draw: random.Random, symbols: int) -> str:
    """The task that is measured, see `recall.py`."""
    return "".join(recall.recall_episode(draw, *names(symbols), "<q>", WRITES))


def names(symbols: int) -> tuple[list[str], list[str]]:
    return list(map(key, range(symbols))), list(map(value, range(symbols)))


def tokenizer_with_symbols(texts: list[str], vocab_size: int, symbols: int) -> PreTrainedTokenizerFast:
    """The examples' tokenizer, with a token for each symbol of the recall task."""
    tokens = ["<q>", *itertools.chain(*names(symbols))]
    tokenizer = train_tokenizer(texts, vocab_size - len(tokens))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    return tokenizer


def write_text(out: Path, args) -> None:
    """`text.jsonl` to train on, a document a row, `args.recall` of its tokens the recall task; `recall.jsonl`, nothing
    but that; `held_out.jsonl`; and the tokenizer."""
    texts, held_out = python_sources(args.megabytes)
    tokenizer = tokenizer_with_symbols(texts, args.vocab_size, args.symbols)
    draw = random.Random(args.seed)
    tokens = sum(len(ids) for ids in tokenizer(texts, verbose=False).input_ids)
    streams = int(tokens * args.recall / (1 - args.recall) / DOCUMENT)
    recall_documents = [recall_stream(draw, args.symbols, DOCUMENT - 1) for _ in range(streams)]
    first = min(MOST_FIRST, args.recall_steps * args.batch_size * args.length // DOCUMENT // 8 + 1)
    files = {
        "text": texts + recall_documents,
        "recall": [recall_stream(draw, args.symbols, DOCUMENT - 1) for _ in range(first)],
        "held_out": held_out,
    }
    with new_folder(out / "text") as folder:
        for name, rows in files.items():
            with (folder / f"{name}.jsonl").open("w") as file:
                file.writelines(json.dumps({"text": row}) + "\n" for row in rows)
        tokenizer.save_pretrained(folder / "tokenizer")
    console.print(f"{tokens:,} tokens of {len(texts)} modules, {streams:,} documents of recall")


def make_teacher(out: Path, args) -> None:
    """The teacher: first on recall alone, which a small model else hardly begins to learn beside text, then on
    both.
    """
    tokenizer = AutoTokenizer.from_pretrained(out / "text" / "tokenizer")
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 8 // 3 // 64 * 64,
        num_hidden_layers=args.layers,
        layer_types=["sliding_attention"] + ["full_attention"] * (args.layers - 1),
        use_sliding_window=True,
        sliding_window=2,
        num_attention_heads=args.hidden_size // args.head_dim,
        num_key_value_heads=args.hidden_size // args.head_dim // 2,
        max_position_embeddings=args.length,
        initializer_range=0.8 * args.hidden_size**-0.5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Qwen2ForCausalLM(config)
    tokens = (args.recall_steps + args.steps) * args.batch_size * args.length
    console.print(f"{model.num_parameters():,} parameters, {tokens:,} tokens")
    first, text = (
        blocks(load_text([str(out / "text" / f"{name}.jsonl")]), tokenizer, length, args.seed)
        for name, length in (("recall", DOCUMENT), ("text", args.length))
    )
    question = tokenizer.convert_tokens_to_ids("<q>")
    first = first.map(lambda row: only_answers(row, question))
    batch_size = args.batch_size * args.length // DOCUMENT
    # How soon it is learned is a matter of luck: a constant rate until it is.
    train_on(
        model,
        first,
        args.recall_steps,
        batch_size,
        out / "teacher.recall",
        args,
        "constant_with_warmup",
        StopWhenSolved(),
    )
    train_on(model, text, args.steps, args.batch_size, out / "teacher.training", args, "cosine")
    with new_folder(out / "teacher") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def only_answers(row: dict, question: int) -> dict:
    """Labels for the values that were asked for: the rest of the recall task is random."""
    ids = row["input_ids"]
    return {
        "labels": [-100, -100, *(token if two_before == question else -100 for two_before, token in zip(ids, ids[2:]))]
    }


class StopWhenSolved(TrainerCallback):
    """Ends a training whose loss has fallen to `SOLVED`, with a checkpoint to go on from."""

    def on_log(self, args, state, control, logs, **kwargs):
        if logs.get("loss", math.inf) < SOLVED:
            control.should_save = control.should_training_stop = True


def train_on(
    model, rows, steps: int, batch_size: int, work: Path, args, schedule: str, *callbacks: TrainerCallback
) -> None:
    """Next-token training, from the last checkpoint in `work` if there is one."""
    on_gpu = torch.cuda.is_available()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(work),
            max_steps=steps,
            learning_rate=args.learning_rate,
            lr_scheduler_type=schedule,
            warmup_steps=min(100, steps // 20),
            weight_decay=0.1,
            max_grad_norm=1.0,
            per_device_train_batch_size=batch_size,
            logging_steps=max(1, min(20, steps // 20)),
            save_steps=max(1, steps // 2),
            save_total_limit=1,
            bf16=on_gpu,
            report_to="none",
            seed=args.seed,
            dataloader_pin_memory=on_gpu,
        ),
        train_dataset=rows,
        callbacks=list(callbacks),
    )
    train(trainer)


@torch.no_grad()
def measure(folder: Path, out: Path, args) -> dict[str, float]:
    """Perplexity on held-out modules, and the share of recall questions that are answered right."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    model, tokenizer = model.to(device).eval(), AutoTokenizer.from_pretrained(folder)

    held_out = blocks(load_text([str(out / "text" / "held_out.jsonl")]), tokenizer, args.length).with_format("torch")
    losses = []
    for batch in held_out.select(range(min(len(held_out), args.eval_blocks))).iter(args.batch_size):
        ids = batch["input_ids"].to(device)
        losses.append((model(input_ids=ids, labels=ids, use_cache=False).loss.item(), len(ids)))
    loss = sum(loss * n for loss, n in losses) / sum(n for _, n in losses)

    draw = random.Random(12345)
    ids = torch.tensor(tokenizer([recall_episode(draw, args.symbols) for _ in range(EPISODES)]).input_ids)
    questions = torch.arange(2 * KEYS * WRITES + 1, ids.shape[1] - 1, 3)  # the keys after <q>
    right = 0
    for batch in ids.to(device).split(args.batch_size):
        answers = model(batch, use_cache=False).logits[:, questions].argmax(-1)
        right += (answers == batch[:, questions + 1]).sum().item()
    return {"perplexity": math.exp(loss), "overwriting recall": right / (EPISODES * KEYS)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output-dir", type=Path, default=Path("runs/convert-llama"), help="default runs/convert-llama")
    add("--toy", action="store_true", help="sizes for a CPU, where an option does not say otherwise")
    add("--keep", default="0.25", help="layers that keep softmax attention (default 0.25, the last of each four)")
    add("--no-linear-rope", action="store_true", help="converted layers drop the rotary embedding")
    add("--recall-steps", type=int, help="of the teacher at most, on recall alone, before the others (default 3000)")
    add(
        "--steps",
        type=int,
        help="of the teacher, on everything (default 700; 2000 learn the library by heart: perplexity 161 held out)",
    )
    add("--batch-size", type=int, help="blocks per step (default 64)")
    add("--length", type=int, help="tokens per block (default 512)")
    add("--hidden-size", type=int, help="default 384")
    add("--head-dim", type=int, help="default 64")
    add("--layers", type=int, help="default 8")
    add("--vocab-size", type=int, help="default 4096")
    add("--megabytes", type=float, help="of Python source (default 16)")
    add("--symbols", type=int, help="keys and as many values of the recall task (default 32)")
    add("--align-tokens", type=int, help="default 8,000,000")
    add("--distill-tokens", type=int, help="default 16,000,000")
    add("--eval-blocks", type=int, help="held-out blocks (default 256)")
    add("--learning-rate", type=float, default=1.5e-3, help="of the teacher (default 1.5e-3)")
    add("--recall", type=float, default=0.25, help="share of the recall task in the text (default 0.25)")
    add("--seed", type=int, default=0, help="default 0")
    args = parser.parse_args()
    sizes = {
        "recall_steps": (3000, 1500), "steps": (700, 300), "batch_size": (64, 32), "length": (512, 128),
        "hidden_size": (384, 64),
        "head_dim": (64, 32), "layers": (8, 4), "vocab_size": (4096, 512), "megabytes": (16.0, 0.5),
        "symbols": (32, 16),
        "align_tokens": (8_000_000, 300_000), "distill_tokens": (16_000_000, 600_000), "eval_blocks": (256, 64),
    }  # fmt: skip
    for name, (default, toy) in sizes.items():
        if getattr(args, name) is None:
            setattr(args, name, toy if args.toy else default)
    changed = [
        f"--{name.replace('_', '-')}" + ("" if given is True else f" {given}")
        for name, given in vars(args).items()
        if name != "output_dir" and given != (sizes[name][args.toy] if name in sizes else parser.get_default(name))
    ]
    command = " ".join(["python examples/convert_llama.py", *changed])

    out = args.output_dir
    with refusals(parser):
        claim(out, {name: value for name, value in vars(args).items() if name != "output_dir"})
    set_seed(args.seed)
    start = time.perf_counter()

    teacher, hybrid, aligned, distilled = (out / name for name in ("teacher", "hybrid", "aligned", "distilled"))
    stage = {
        "teacher": str(teacher), "data": (str(out / "text" / "text.jsonl"),), "length": args.length,
        "batch_size": args.batch_size, "seed": args.seed,
    }  # fmt: skip
    steps = {
        out / "text": ("text and a tokenizer", lambda: write_text(out, args)),
        teacher: ("the teacher", lambda: make_teacher(out, args)),
        hybrid: (
            f"deltanet convert {teacher} {hybrid} --keep {args.keep}",
            lambda: convert_checkpoint(
                teacher, hybrid, keep=args.keep, linear_use_rope=not args.no_linear_rope, max_shard_size="5GB"
            ),
        ),
        aligned: (
            f"deltanet align {teacher} {hybrid} {aligned} --tokens {args.align_tokens}",
            lambda: align(
                Stage(student=str(hybrid), output=str(aligned), tokens=args.align_tokens, learning_rate=2e-3, **stage)
            ),
        ),
        # A model this small learns at rates far above those of the published conversions, which are the defaults.
        distilled: (
            f"deltanet distill {teacher} {aligned} {distilled} --tokens {args.distill_tokens}",
            lambda: distill(
                Distillation(
                    student=str(aligned), output=str(distilled), tokens=args.distill_tokens, learning_rate=3e-4,
                    mixer_learning_rate=2e-3, **stage,
                )
            ),
        ),
    }  # fmt: skip
    seconds = {}
    for folder, (title, step) in steps.items():
        console.rule(title)
        began = time.perf_counter()
        if not folder.exists():
            step()
        seconds[folder.name] = round(time.perf_counter() - began, 1)

    console.rule("perplexity and recall")
    columns = {"teacher": teacher, "before alignment": hybrid, "after alignment": aligned, "": distilled}
    figures = {name: measure(folder, out, args) for name, folder in columns.items()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    data = {"perplexity": "Python standard library, held out", "overwriting recall": "8 keys written 4 times each"}
    evaluation = {
        "command": command,
        "hardware": f"{device}, Python {platform.python_version()}, torch {torch.__version__}",
        "results": [
            {"dataset": data[metric], "metric": metric, "value": round(found[metric], 4)}
            | ({"of": name} if name else {})
            for metric in data
            for name, found in figures.items()
        ],
    }  # fmt: skip
    (distilled / "evaluation.json").write_text(json.dumps(evaluation, indent=2) + "\n")
    table = Table(
        "", *(name or "after distillation" for name in columns), title=f"{time.perf_counter() - start:.0f} s"
    )
    for metric in data:
        table.add_row(f"{data[metric]}: {metric}", *(f"{found[metric]:.3f}" for found in figures.values()))
    console.print(table)
    console.print(f"seconds: {seconds}")
    console.print(f"{distilled} holds the student, conversion.json and evaluation.json")


if __name__ == "__main__":
    run(main)
