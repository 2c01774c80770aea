"""DeltaNet from nothing to a folder that could be pushed to the Hub, offline, in a few minutes on a laptop.

Trains a tokenizer and a small hybrid DeltaNet on CPython's own documentation, reloads it with AutoModelForCausalLM,
samples from it, fine-tunes it with LoRA on Python source, reloads and merges the adapter, and writes a model card with
the figures and a loss curve. Uses a GPU when there is one.

    python examples/quickstart.py
    python examples/quickstart.py --steps 1000 --hidden-size 384     # longer, better
    python examples/quickstart.py --output-dir runs/second --seed 1

Ctrl-C saves a checkpoint; the same command goes on from there.
"""

import argparse
import json
import math
import os
import platform
import pydoc_data.topics
import sys
import sysconfig
import time
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import matplotlib  # noqa: E402


matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from shared import SaveOnInterrupt, train_tokenizer  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint  # noqa: E402

from deltanet_conversion.card import make_card, write_card  # noqa: E402
from modeling_deltanet import DeltaNetConfig, DeltaNetForCausalLM, register_remote_code  # noqa: E402


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


def train(
    model, folder: Path, train_set, eval_set, steps: int, learning_rate: float, args
) -> tuple[float, float, list]:
    """Train from the last checkpoint in `folder` or from the beginning: held-out perplexity before, after, and the
    log.
    """
    interrupt = SaveOnInterrupt()
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
            save_steps=max(1, steps // 2),
            save_total_limit=1,
            bf16=torch.cuda.is_available(),
            report_to="none",
            seed=args.seed,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=train_set,
        eval_dataset=eval_set,
        callbacks=[interrupt],
    )
    before_file = folder / "perplexity_before.json"
    if before_file.exists():  # resumed: the model at hand is not the one that training began with
        before = json.loads(before_file.read_text())
    else:
        before = math.exp(trainer.evaluate()["eval_loss"])
        before_file.write_text(json.dumps(before))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    if interrupt.interrupted:
        console.print(f"\nStopped at step {trainer.state.global_step}; the checkpoint is in {folder}. Go on with:")
        console.print(f"  python {' '.join(sys.argv)}", highlight=False)
        sys.exit(130)
    after = math.exp(trainer.evaluate()["eval_loss"])
    trainer.save_state()
    return before, after, trainer.state.log_history


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


def write_evaluation(file: Path, results: list[dict], changed: dict) -> None:
    """The figures with the command that made them: what `deltanet card` fills cards from."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    options = (f"--{name.replace('_', '-')} {value}" for name, value in changed.items())
    evaluation = {
        "command": " ".join(["python examples/quickstart.py", *options]),
        "hardware": f"{device}, Python {platform.python_version()}, torch {torch.__version__}",
        "results": [{"metric": "perplexity", **result} for result in results],
    }
    file.write_text(json.dumps(evaluation, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/quickstart"), help="default runs/quickstart")
    parser.add_argument("--steps", type=int, default=320, help="training steps (default 320)")
    parser.add_argument("--lora-steps", type=int, default=120, help="LoRA steps (default 120)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per step (default 8)")
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence (default 256)")
    parser.add_argument("--hidden-size", type=int, default=256, help="width, a multiple of 64 (default 256)")
    parser.add_argument("--vocab-size", type=int, default=2048, help="entries of the tokenizer (default 2048)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    args = parser.parse_args()
    start = time.perf_counter()
    set_seed(args.seed)

    out, settings = args.output_dir, {k: v for k, v in vars(args).items() if k != "output_dir"}
    settings_file = out / "settings.json"
    if settings_file.exists() and json.loads(settings_file.read_text()) != settings:
        parser.error(f"{out} holds a run with other settings, {settings_file.read_text()}; name another --output-dir")
    out.mkdir(parents=True, exist_ok=True)
    settings_file.write_text(json.dumps(settings))
    model_dir = out / "deltanet-quickstart"

    console.rule("1. A tokenizer, trained on CPython's documentation")
    text, held_out = documentation()
    tokenizer = train_tokenizer(text.split("\n\n"), args.vocab_size)
    train_set, eval_set = (blocks(tokenizer, t, args.length) for t in (text, held_out))
    console.print(
        f"{len(text):,} characters, {args.length * len(train_set):,} tokens; held out: {len(eval_set)} blocks"
    )

    console.rule("2. A small hybrid DeltaNet, trained with Trainer")
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
    before, after, history = train(model, out / "training", train_set, eval_set, args.steps, 2e-3, args)
    register_remote_code()  # the folder then loads where this package is not installed, with trust_remote_code=True
    model.save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)

    console.rule("3. Reloaded with AutoModelForCausalLM, and a sample")
    model = AutoModelForCausalLM.from_pretrained(model_dir, device_map="auto")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    prompt = tokenizer("The value of the expression is", return_tensors="pt", return_token_type_ids=False)
    sample = model.generate(**prompt.to(model.device), max_new_tokens=60, do_sample=True, temperature=0.8, top_k=40)
    console.print(tokenizer.decode(sample[0]), style="italic", markup=False, highlight=False)

    console.rule("4. LoRA on another domain: Python source")
    code, held_out_code = python_source()
    code_set, code_eval_set = blocks(tokenizer, code, args.length), blocks(tokenizer, held_out_code, args.length)[:64]
    # No target_modules: the family has defaults, every projection in the mixers and the MLPs.
    lora = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM"))
    lora.print_trainable_parameters()
    lora_before, lora_after, lora_history = train(
        lora, out / "lora_training", code_set, code_eval_set, args.lora_steps, 4e-3, args
    )
    lora.save_pretrained(model_dir / "lora")

    console.rule("5. The adapter reloaded, merged, and a sample")
    merged = AutoPeftModelForCausalLM.from_pretrained(model_dir / "lora").merge_and_unload()
    merged.save_pretrained(model_dir / "merged")
    tokenizer.save_pretrained(model_dir / "merged")
    merged = AutoModelForCausalLM.from_pretrained(model_dir / "merged").to(model.device)
    prompt = tokenizer("def __init__(self, ", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        ids = code_eval_set[0]["input_ids"].unsqueeze(0).to(model.device)
        difference = (merged(ids).logits - lora.eval()(ids).logits).abs().max().item()
    sample = merged.generate(**prompt.to(model.device), max_new_tokens=60, do_sample=True, temperature=0.8, top_k=40)
    console.print(tokenizer.decode(sample[0]), style="italic", markup=False, highlight=False)

    seconds = time.perf_counter() - start
    text, code = "documentation, held out", "Python source, held out"
    evaluation = [
        {"dataset": text, "of": "before training", "value": before},
        {"dataset": text, "value": after},
        {"dataset": code, "value": lora_before},
        {"dataset": code, "of": "with the adapter in `lora/`", "value": lora_after},
    ]
    plot_losses({"documentation": history, "LoRA on Python source": lora_history}, model_dir / "loss.png")
    changed = {k: v for k, v in settings.items() if v != parser.get_default(k)}
    write_evaluation(model_dir / "evaluation.json", evaluation, changed)
    card = make_card(
        model_dir,
        repo_id=model_dir.name,
        title="DeltaNet quickstart",
        summary="A very small hybrid DeltaNet that `examples/quickstart.py` trained from nothing. It shows the way; "
        "it knows little more than the style of CPython's documentation.",
        license="apache-2.0",
        language="en",
        training=f"{args.steps} steps of {args.batch_size} x {args.length} tokens of CPython's documentation topics, "
        f"AdamW, then {args.lora_steps} steps of LoRA on Python source (the adapter is in `lora/`, the merged model "
        f"in `merged/`). Seed {args.seed}; {seconds:.0f} s in all.",
        trainer_state=out / "training" / "trainer_state.json",
        limits="Far too small and trained on far too little for any use but learning how the parts fit.",
    )
    write_card(card, model_dir / "README.md")

    summary = Table("perplexity", "before", "after", title=f"quickstart: {seconds:.0f} s")
    summary.add_row(text, f"{before:.1f}", f"{after:.1f}")
    summary.add_row(f"{code} (LoRA)", f"{lora_before:.1f}", f"{lora_after:.1f}")
    summary.add_row("merged against adapter: largest logit difference", "", f"{difference:.1e}")
    console.print(summary)
    console.print(f"Ready for the Hub: {model_dir} ({', '.join(sorted(p.name for p in model_dir.iterdir()))})")


if __name__ == "__main__":
    main()
