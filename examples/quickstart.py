"""DeltaNet from nothing to folders that can be pushed to the Hub, offline, in a few minutes on a laptop.

First two very small models learn to recall what was written last, one with the delta rule and one without. Then it
trains a tokenizer and a small hybrid DeltaNet on CPython's own documentation, reloads it with AutoModelForCausalLM,
samples from it, fine-tunes it with LoRA on Python source, reloads and merges the adapter, and writes model cards with
the figures and a loss curve. Uses a GPU when there is one.

    python examples/quickstart.py
    python examples/quickstart.py --steps 1000 --hidden-size 384     # longer, better
    python examples/quickstart.py --output-dir runs/second --seed 1

Ctrl-C saves a checkpoint; the same command goes on from there.
"""

import quiet  # noqa: F401


# isort: split
import argparse
import json
import math
import os
import platform
import pydoc_data.topics
import shutil
import sys
import sysconfig
import time
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import matplotlib  # noqa: E402


matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import recall  # noqa: E402
import torch  # noqa: E402
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from shared import claim, log_in_lines, refusals, run, train, train_tokenizer  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from deltanet_conversion.card import make_card, write_card  # noqa: E402
from modeling_deltanet import DeltaNetConfig, DeltaNetForCausalLM, register_remote_code  # noqa: E402


OWNER = "your-name"  # `deltanet push` writes the name that it is given into the cards
console = Console()


def documentation() -> tuple[str, str]:
    """CPython's help topics, about 0.7 MB of English: nine in ten to learn from, the tenth held out."""
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    held_out = topics[::10]
    return "\n\n".join(t for i, t in enumerate(topics) if i % 10), "\n\n".join(held_out)


def python_source() -> tuple[str, str]:
    """Python source of the standard library: the second domain, split by module."""
    library = Path(sysconfig.get_path("stdlib"))
    modules = [path.read_text(encoding="utf-8", errors="ignore") for path in sorted(library.glob("[a-h]*.py"))]
    return "\n\n".join(m for i, m in enumerate(modules) if i % 10), "\n\n".join(modules[::10])


def blocks(tokenizer, text: str, length: int) -> list[dict[str, torch.Tensor]]:
    """`text` cut into examples of `length` tokens."""
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
    return [{"input_ids": block, "labels": block} for block in ids[: len(ids) // length * length].view(-1, length)]


def make_trainer(model, folder: Path, train_set, eval_set, steps: int, learning_rate: float, args) -> Trainer:
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 20,
            weight_decay=0.1,
            max_grad_norm=1.0,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            logging_steps=max(1, steps // 20),
            eval_strategy="steps",
            eval_steps=max(1, steps // 4),
            save_steps=steps,
            disable_tqdm=True,
            bf16=torch.cuda.is_available(),
            report_to="none",
            seed=args.seed,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=train_set,
        eval_dataset=eval_set,
    )
    return log_in_lines(trainer)


def perplexities(trainer: Trainer) -> tuple[float, float]:
    """Train, and the held-out perplexity before and after."""
    file = Path(trainer.args.output_dir) / "perplexity_before.json"
    if file.exists():  # resumed: the model at hand is not the one that training began with
        before = json.loads(file.read_text())
    else:
        before = math.exp(trainer.evaluate()["eval_loss"])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(before))
    train(trainer)
    trainer.save_state()
    steps, history = trainer.state.global_step, trainer.state.log_history
    after = next((log["eval_loss"] for log in history if "eval_loss" in log and log["step"] == steps), None)
    return before, math.exp(trainer.evaluate()["eval_loss"] if after is None else after)


def plot_losses(histories: dict[str, list], file: Path) -> None:
    """One panel a stage, training and held-out loss against the step."""
    figure, axes = plt.subplots(1, len(histories), figsize=(10, 3.5), squeeze=False)
    for axis, (title, history) in zip(axes[0], histories.items()):
        for key, label in (("loss", "training"), ("eval_loss", "held out")):
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            axis.plot(*zip(*points), label=label, marker="." if key == "eval_loss" else None)
        axis.set(title=title, xlabel="step", ylabel="loss (nats a token)")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def write_evaluation(folder: Path, results: list[dict], command: str) -> None:
    """The figures with the command that made them: what `deltanet card` fills cards from."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    evaluation = {
        "command": command,
        "hardware": f"{device}, Python {platform.python_version()}, torch {torch.__version__}",
        "results": [{"metric": "perplexity", **result} for result in results],
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation, indent=2) + "\n")


def sample(model, tokenizer, prompt: str) -> None:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    ids = model.generate(**inputs, max_new_tokens=60, do_sample=True, temperature=0.8, top_k=40)
    console.print(tokenizer.decode(ids[0]), style="italic", markup=False, highlight=False)


def deltanet() -> str:
    """How to call the command line from here: by its name where that is found, otherwise beside this Python."""
    if shutil.which("deltanet"):
        return "deltanet"
    command = Path(sys.executable).with_name("deltanet")
    return str(command.relative_to(Path.cwd()) if command.is_relative_to(Path.cwd()) else command)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/quickstart"), help="default runs/quickstart")
    parser.add_argument("--recall-steps", type=int, default=120, help="steps of each recall model (default 120)")
    parser.add_argument("--steps", type=int, default=320, help="training steps (default 320)")
    parser.add_argument("--lora-steps", type=int, default=120, help="LoRA steps (default 120)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per step (default 8)")
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence (default 256)")
    parser.add_argument("--hidden-size", type=int, default=256, help="width, a multiple of 64 (default 256)")
    parser.add_argument("--vocab-size", type=int, default=2048, help="entries of the tokenizer (default 2048)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    args = parser.parse_args()
    start = time.perf_counter()
    out, settings = args.output_dir, {k: v for k, v in vars(args).items() if k != "output_dir"}
    with refusals(parser):
        if args.hidden_size < 64 or args.hidden_size % 64:
            raise ValueError(f"--hidden-size must be a multiple of 64, got {args.hidden_size}")
        claim(out, settings)
    changed = [f"--{k.replace('_', '-')} {v}" for k, v in settings.items() if v != parser.get_default(k)]
    command = " ".join(["python examples/quickstart.py", *changed])
    model_dir, lora_dir, merged_dir = (out / f"deltanet-quickstart{part}" for part in ("", "-lora", "-merged"))
    disable_progress_bar()

    console.rule("1. A memory that can be overwritten: recall, with and without the delta rule")
    recalled = recall.compare(out / "recall", args.recall_steps, args.seed, console)

    set_seed(args.seed)
    console.rule("2. A tokenizer, trained on CPython's documentation")
    text, held_out = documentation()
    tokenizer = train_tokenizer(text.split("\n\n"), args.vocab_size)
    train_set, eval_set = (blocks(tokenizer, t, args.length) for t in (text, held_out))
    console.print(
        f"{len(text):,} characters, {args.length * len(train_set):,} tokens; held out: {len(eval_set)} blocks"
    )

    console.rule("3. A small hybrid DeltaNet, trained with Trainer")
    heads = args.hidden_size // 64
    config = DeltaNetConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        num_hidden_layers=4,
        layer_types=DeltaNetConfig.hybrid_layer_types("sliding", 4),
        sliding_window=64,
        linear_num_key_heads=heads,
        num_attention_heads=heads,
        max_position_embeddings=args.length,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = DeltaNetForCausalLM(config)
    console.print(f"{model.num_parameters():,} parameters: {', '.join(config.layer_types)}")
    trainer = make_trainer(model, out / "training", train_set, eval_set, args.steps, 2e-3, args)
    before, after = perplexities(trainer)
    register_remote_code()  # the folder then loads where this package is not installed, with trust_remote_code=True
    model.save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)

    console.rule("4. Reloaded, and a sample: the style is there, no more")
    model = AutoModelForCausalLM.from_pretrained(model_dir, device_map="auto")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    sample(model, tokenizer, "The value of the expression is")

    console.rule("5. LoRA on another domain: Python source")
    code, held_out_code = python_source()
    code_set, code_eval_set = blocks(tokenizer, code, args.length), blocks(tokenizer, held_out_code, args.length)[:64]
    # No target_modules: the family has defaults, every projection in the mixers and the MLPs.
    lora = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM"))
    lora.print_trainable_parameters()
    lora_trainer = make_trainer(lora, out / "lora_training", code_set, code_eval_set, args.lora_steps, 4e-3, args)
    lora_before, lora_after = perplexities(lora_trainer)
    lora.save_pretrained(lora_dir)

    console.rule("6. The adapter reloaded, merged, and a sample")
    merged = AutoPeftModelForCausalLM.from_pretrained(lora_dir).merge_and_unload()
    merged.save_pretrained(merged_dir)
    tokenizer.save_pretrained(merged_dir)
    merged = AutoModelForCausalLM.from_pretrained(merged_dir).to(model.device)
    merged_trainer = make_trainer(merged, out / "lora_training", code_set, code_eval_set, args.lora_steps, 4e-3, args)
    merged_after = math.exp(merged_trainer.evaluate()["eval_loss"])
    sample(merged, tokenizer, "def __init__(self, ")

    text, code = "documentation, held out", "Python source, held out"
    histories = {"documentation": trainer.state.log_history, "LoRA on Python source": lora_trainer.state.log_history}
    plot_losses(histories, model_dir / "loss.png")
    write_evaluation(
        model_dir,
        [
            {"dataset": text, "of": "before training", "value": before},
            {"dataset": text, "value": after},
            {"dataset": code, "value": lora_before},
        ],
        command,
    )
    fine_tuned = {"dataset": code, "of": "before fine-tuning", "value": lora_before}
    write_evaluation(lora_dir, [fine_tuned, {"dataset": code, "value": lora_after}], command)
    write_evaluation(merged_dir, [fine_tuned, {"dataset": code, "value": merged_after}], command)
    on_code = f"{args.lora_steps} steps of LoRA on Python source, {args.batch_size} x {args.length} tokens each"
    cards = {
        model_dir: {
            "title": "DeltaNet quickstart",
            "summary": "A very small hybrid DeltaNet that `examples/quickstart.py` trained from nothing. It shows the "
            "way; it knows little more than the style of CPython's documentation.",
            "training": f"{args.steps} steps of {args.batch_size} x {args.length} tokens of CPython's documentation "
            f"topics, AdamW. Seed {args.seed}.",
            "trainer_state": out / "training" / "trainer_state.json",
        },
        lora_dir: {
            "title": "DeltaNet quickstart, LoRA",
            "summary": "A LoRA adapter of the quickstart's DeltaNet for the style of Python source.",
            "training": f"{on_code}, AdamW. Seed {args.seed}.",
            "trainer_state": out / "lora_training" / "trainer_state.json",
            "base_model": model_dir.name,
        },
        merged_dir: {
            "title": "DeltaNet quickstart, merged",
            "summary": "The quickstart's DeltaNet with its LoRA adapter for Python source merged into it.",
            "training": f"{on_code}, AdamW, then merged. Seed {args.seed}.",
            "trainer_state": out / "lora_training" / "trainer_state.json",
            "base_model": model_dir.name,
        },
    }
    for folder, texts in cards.items():
        limits = "Far too small and trained on far too little for any use but learning how the parts fit."
        card = make_card(folder, folder.name, license="apache-2.0", language="en", limits=limits, **texts)
        write_card(card, folder / "README.md")

    console.rule("What has been learned")
    summary = Table("", "before", "after", title=f"quickstart: {time.perf_counter() - start:.0f} s")
    for name, shares in recalled.items():
        summary.add_row(f"overwriting recall, {name}", *(f"{share:.0%}" for share in shares))
    summary.add_row(f"perplexity: {text}", f"{before:.1f}", f"{after:.1f}")
    summary.add_row(f"perplexity: {code}, by LoRA", f"{lora_before:.1f}", f"{lora_after:.1f}")
    summary.add_row(f"perplexity: {code}, merged", f"{lora_before:.1f}", f"{merged_after:.1f}")
    console.print(summary)
    print(f"Model, adapter and merged model, each with its card: {model_dir}, {lora_dir}, {merged_dir}")
    print(f"What would be sent to the Hub, where {OWNER} is your name, and whether it is fit to be:")
    for folder in (lora_dir, merged_dir, model_dir):
        base = f" --base-model {OWNER}/{model_dir.name}" if folder == lora_dir else ""
        print(f"  {deltanet()} push {folder} {OWNER}/{folder.name}{base} --dry-run")


if __name__ == "__main__":
    run(main)
