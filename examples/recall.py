"""What the delta rule is for, in twenty seconds on a CPU: a memory whose entries can be overwritten.

A text writes digits under letters, over and over: `a3 b5 a1 c2 b9 ...`. In the end each letter is asked for, and what
was written under it last is the right answer. Two models of the same size learn it from the same texts. In one, a
write first takes away what the letter already holds (the delta rule); in the other it only adds (linear attention).

    python examples/recall.py
    python examples/recall.py --steps 400 --seed 1
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table
from shared import claim, log_in_lines, refusals, run, train
from transformers import Trainer, TrainingArguments, set_seed

from modeling_deltanet import DeltaNetConfig, DeltaNetForCausalLM


AT_ONCE = 8  # keys that a text uses
KEYS, VALUES, QUESTION = "abcdefgh", "0123456789", "?"
SYMBOLS = KEYS + VALUES + QUESTION
WRITES = 4  # under each key, of the texts that are measured
LENGTH = len(KEYS) * (2 * WRITES + 3)  # symbols of such a text
EPISODES = 128
BATCH = 32


def recall_stream(draw: random.Random, keys: Sequence[str], values: Sequence[str], question: str, length: int):
    """The task to learn from, `length` symbols: writes `key value` and questions `? key value` in any order, over
    `AT_ONCE` of the keys.
    """
    keys, memory, text = draw.sample(keys, AT_ONCE), {}, []
    while len(text) < length:
        key = draw.choice(keys)
        if key in memory and draw.random() < 0.5:
            text += [question, key, memory[key]]
        else:
            memory[key] = draw.choice(values)
            text += [key, memory[key]]
    return text[:length]


def recall_episode(draw: random.Random, keys: Sequence[str], values: Sequence[str], question: str, writes: int):
    """The task that is measured: `AT_ONCE` of the keys, each written `writes` times, then all asked for."""
    keys, memory, text = draw.sample(keys, AT_ONCE), {}, []
    for key in draw.sample(keys * writes, len(keys) * writes):
        memory[key] = draw.choice(values)
        text += [key, memory[key]]
    for key in draw.sample(keys, len(keys)):
        text += [question, key, memory[key]]
    return text


def make_model(use_delta_rule: bool) -> DeltaNetForCausalLM:
    config = DeltaNetConfig(
        vocab_size=len(SYMBOLS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        layer_types=["linear_attention"] * 2,
        linear_num_key_heads=1,
        linear_use_delta_rule=use_delta_rule,
        num_attention_heads=1,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return DeltaNetForCausalLM(config)


def encode(texts: list[list[str]]) -> torch.Tensor:
    return torch.tensor([[SYMBOLS.index(symbol) for symbol in text] for text in texts])


def examples(draw: random.Random, count: int) -> list[dict[str, torch.Tensor]]:
    """Texts to learn from: writes and questions in any order. Only answers are learned, the rest is random."""
    ids = encode([recall_stream(draw, KEYS, VALUES, QUESTION, LENGTH) for _ in range(count)])
    labels = torch.full_like(ids, -100)
    labels[:, 2:] = torch.where(ids[:, :-2] == SYMBOLS.index(QUESTION), ids[:, 2:], -100)
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels)]


@torch.no_grad()
def answers(model, texts: list[list[str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model answers to the questions at the end of each text, and the right answers: `[texts, keys]`."""
    ids = encode(texts).to(model.device)
    asked = torch.arange(2 * WRITES * len(KEYS) + 1, LENGTH - 1, 3)  # the keys after the question marks
    return model.eval()(ids, use_cache=False).logits[:, asked].argmax(-1), ids[:, asked + 1]


def measure(folder: Path, steps: int, seed: int, use_delta_rule: bool) -> tuple[float, float, list[str]]:
    """The share of questions that are answered right before and after training, and the answers to the first text."""
    texts = episodes()
    set_seed(seed)
    model = make_model(use_delta_rule)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            learning_rate=3e-3,
            warmup_steps=steps // 10,
            weight_decay=0.1,
            per_device_train_batch_size=BATCH,
            logging_steps=max(1, steps // 3),
            save_steps=steps,
            disable_tqdm=True,
            report_to="none",
            seed=seed,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=examples(random.Random(seed), steps * BATCH),
    )
    given, right = answers(model, texts)
    before = (given == right).float().mean().item()
    train(log_in_lines(trainer))
    given, right = answers(model, texts)
    return before, (given == right).float().mean().item(), [SYMBOLS[answer] for answer in given[0]]


def episodes() -> list[list[str]]:
    draw = random.Random(12345)
    return [recall_episode(draw, KEYS, VALUES, QUESTION, WRITES) for _ in range(EPISODES)]


def compare(folder: Path, steps: int, seed: int, console: Console) -> dict[str, tuple[float, float]]:
    """Train both models and show what they answer. The share of right answers before and after, of each."""
    rules = {"with the delta rule": True, "without it": False}
    shares, given = {}, {}
    for name, use_delta_rule in rules.items():
        console.print(f"A model {name}:", highlight=False)
        *shares[name], given[name] = measure(folder / name.replace(" ", "_"), steps, seed, use_delta_rule)
    text = episodes()[0]
    writes, questions = text[: -3 * len(KEYS)], text[-3 * len(KEYS) :]
    console.print(f"\nA text:  {' '.join(map(''.join, zip(writes[::2], writes[1::2])))}", highlight=False)
    asked, right = questions[1::3], questions[2::3]
    table = Table(Column("asked for", no_wrap=True), *asked, f"right, of {EPISODES * len(KEYS):,}")
    table.add_row("written last", *right, "")
    for name in rules:
        cells = [answer if answer == wanted else f"[red]{answer} ✗[/]" for answer, wanted in zip(given[name], right)]
        table.add_row(name, *cells, f"{shares[name][1]:.0%}")
    console.print(table)
    return shares


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/recall"), help="default runs/recall")
    parser.add_argument("--steps", type=int, default=120, help="training steps of each model (default 120)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    args = parser.parse_args()
    with refusals(parser):
        claim(args.output_dir, {"steps": args.steps, "seed": args.seed})
    compare(args.output_dir, args.steps, args.seed, Console())


if __name__ == "__main__":
    run(main)
