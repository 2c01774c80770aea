"""Language models of 30M parameters, one from each kind of layer: what does the kind of memory change?

    python benchmarks/quality/lm_data.py runs/lm                                 # the text, once
    python benchmarks/quality/lm.py --data runs/lm --out lm.json                 # 9 minutes; the same command goes on
    python benchmarks/quality/lm.py --data runs/lm --out try.json --toy          # seconds, on a CPU

Every model gets the same tokens in the same order, and the same search: three learning rates, 150 steps each, judged
on held-out text; then one training with the best of them. A training that is cut off goes on from its checkpoint in
`--work`. What is measured, all on documents that no model has seen:

- perplexity at the length of training, and by position up to four times that length
- perplexity of tokens that finish a pair of tokens which the same text had before (recalled), and of all others
- which of four continuations of 32 tokens is the text's own (multiple choice by likelihood)
- needle retrieval and overwriting recall by length, as `deltanet evaluate` asks
- tokens/s and peak memory of training; time per token and bytes of the cache after 1K and 32K tokens
"""

import argparse
import json
import lzma
import math
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


sys.path.append(str(Path(__file__).parent.parent))
from quality_record import conditions  # noqa: E402


# In order of importance: what is looked at first is trained first.
MODELS = (
    "transformer", "DeltaNet", "additive", "DeltaNet + global attention", "DeltaNet + sliding window",
    "DeltaNet, beta to 2", "Gated DeltaNet",
)  # fmt: skip
SIZES = {"width": 512, "layers": 8, "heads": 8, "vocab_size": 8192, "tie_word_embeddings": True}
LENGTH = 1024
LEARNING_RATES = (5e-4, 1e-3, 2e-3)
BATCH, SEARCH_STEPS, TOKENS = 64, 150, 150e6
LONG = 4 * LENGTH
TOY = {
    "sizes": {"width": 64, "layers": 2, "heads": 2, "vocab_size": 8192, "tie_word_embeddings": True},
    "length": 256, "learning_rates": (1e-3, 2e-3), "batch": 2, "search_steps": 2, "tokens": 3000, "long": 1024,
    "rows": 4, "episodes": 2, "contexts": (64, 128), "decode_batch": 1,
}  # fmt: skip
FULL = {
    "sizes": SIZES, "length": LENGTH, "learning_rates": LEARNING_RATES, "batch": BATCH,
    "search_steps": SEARCH_STEPS, "tokens": TOKENS, "long": LONG, "rows": 1024, "episodes": 64,
    "contexts": (1024, 32768), "decode_batch": 16,
}  # fmt: skip


class Rows(torch.utils.data.Dataset):
    """Tokens in rows of `length`, each to be predicted from those before it."""

    def __init__(self, ids: np.ndarray, length: int):
        self.ids = ids[: len(ids) // length * length].reshape(-1, length)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        row = torch.from_numpy(self.ids[i].astype(np.int64))
        return {"input_ids": row, "labels": row}


def tokens(folder: Path, name: str) -> np.ndarray:
    """All parts of `name` that the folder has, one after another: fewer parts are less text."""
    parts = sorted(folder.glob(f"{name}*.bin.xz"))
    if not parts:
        raise SystemExit(f"{folder} has no {name}*.bin.xz: python benchmarks/quality/lm_data.py {folder}")
    return np.concatenate([np.frombuffer(lzma.decompress(part.read_bytes()), dtype=np.uint16) for part in parts])


def make(name: str, options: dict):
    from models import make_model

    return make_model(
        name, **options["sizes"], max_position_embeddings=options["length"], sliding_window=options["length"] // 4
    )


def train(name: str, data: np.ndarray, rate: float, steps: int, seed: int, folder: Path, options: dict):
    """The trainer after `steps`, and what training took. Cut off, it leaves a checkpoint, from which the next call
    goes on.
    """
    from transformers import Trainer, TrainingArguments, set_seed

    from deltanet_conversion.interrupt import Stopped, train_or_resume

    on_gpu = torch.cuda.is_available()
    set_seed(seed)
    trainer = Trainer(
        model=make(name, options),
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=options["batch"],
            learning_rate=rate,
            weight_decay=0.1,
            adam_beta2=0.95,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 20,
            bf16=on_gpu,
            use_liger_kernel=on_gpu and options["liger"],
            save_strategy="no",
            logging_steps=max(1, steps // 10),
            disable_tqdm=True,
            report_to="none",
            seed=seed,
            data_seed=0,
            dataloader_pin_memory=on_gpu,
        ),
        train_dataset=Rows(data, options["length"]),
    )
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began, start = trainer.state.global_step, time.perf_counter()
    if not train_or_resume(trainer):
        raise Stopped(f"{name}: stopped at step {trainer.state.global_step} of {steps}, with a checkpoint:")
    seconds, done = time.perf_counter() - start, trainer.state.global_step - began
    took = {"steps": steps, "loss": [round(x["loss"], 3) for x in trainer.state.log_history if "loss" in x]}
    took["tokens_per_second"] = round(done * options["batch"] * options["length"] / seconds)
    if on_gpu:
        took["peak_GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    return trainer, took


def spread(ids: np.ndarray, length: int, rows: int) -> np.ndarray:
    """`rows` rows of `length` tokens (or all that there are), evenly from all documents."""
    every = ids[: len(ids) // length * length].reshape(-1, length)
    return every[np.linspace(0, len(every) - 1, min(rows, len(every))).astype(int)]


@torch.no_grad()
def losses(model, rows: np.ndarray, batch: int) -> np.ndarray:
    """`[rows, length - 1]`: -log p of every token but a row's first."""
    model.eval()
    found, device = [], model.device
    for part in torch.from_numpy(rows.astype(np.int64)).split(batch):
        part = part.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=part, use_cache=False).logits[:, :-1]
        found.append(F.cross_entropy(logits.float().mT, part[:, 1:], reduction="none").cpu())
    return torch.cat(found).numpy()


def recalled(rows: np.ndarray, vocab_size: int) -> np.ndarray:
    """For every token but a row's first, whether the row has had this token after the same token before."""
    pairs = rows[:, :-1].astype(np.int64) * vocab_size + rows[:, 1:]
    found = np.zeros(pairs.shape, dtype=bool)
    for row, out in zip(pairs, found):
        _, first, which = np.unique(row, return_index=True, return_inverse=True)
        out[:] = first[which] < np.arange(len(row))
    return found


@torch.no_grad()
def multiple_choice(model, rows: np.ndarray, batch: int, choices: int = 4, end: int = 32) -> float:
    """How often a text's own last `end` tokens are likelier than those of the next texts."""
    start = rows.shape[1] - end
    texts = [np.concatenate((rows[:, :start], np.roll(rows[:, start:], i, axis=0)), axis=1) for i in range(choices)]
    scores = [losses(model, text, batch)[:, -end:].sum(1) for text in texts]
    return float((np.stack(scores).argmin(0) == 0).mean())


def decoding(model, context: int, batch: int, steps: int = 20) -> dict:
    """Milliseconds per token of `batch` texts after `context` tokens, and bytes of one text's cache."""
    from deltanet_conversion.evaluate import time_decoding

    model.to(torch.bfloat16 if model.device.type == "cuda" else torch.float32).eval()
    ids = torch.zeros(batch, context, dtype=torch.long, device=model.device)
    seconds, size = time_decoding(model, ids, steps, part=1024)
    return {"context": context, "batch": batch, "ms": round(1e3 * seconds, 3), "cache_bytes_per_text": size // batch}


def measure(model, held_out: np.ndarray, tokenizer, options: dict) -> dict:
    """Everything that is measured of a trained model."""
    from deltanet_conversion.evaluate import share_right
    from deltanet_conversion.recall_tasks import RecallTasks

    length, long, batch, count = (options[x] for x in ("length", "long", "batch", "rows"))
    rows = spread(held_out, length, count)
    loss, again = losses(model, rows, batch), recalled(rows, options["sizes"]["vocab_size"])
    by_position = losses(model, spread(held_out, long, count * length // long), max(1, batch // 4)).mean(0)
    edges = [1, length // 4, length // 2, length, 2 * length, long]
    found = {
        "held_out_tokens": rows.size,
        "perplexity": round(math.exp(loss.mean()), 3),
        "perplexity_recalled": round(math.exp(loss[again].mean()), 3),
        "perplexity_others": round(math.exp(loss[~again].mean()), 3),
        "share_recalled": round(float(again.mean()), 3),
        "perplexity_by_position": {
            f"{a} to {b}": round(math.exp(by_position[a - 1 : b - 1].mean()), 3) for a, b in zip(edges, edges[1:])
        },
        "multiple_choice": round(multiple_choice(model, spread(held_out, 224, 4 * count), batch), 4),
    }
    tasks = RecallTasks(tokenizer, held_out[: 50 * length].tolist())
    for asked, draw in (("needle", tasks.needle), ("overwriting", tasks.overwriting)):
        for at in (length // 4, length, 2 * length, long):
            if at >= tasks.shortest():
                episodes, at_a_time = list(draw(at, options["episodes"], 0)), max(1, batch * length // at // 2)
                with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
                    share = share_right(model, episodes, at_a_time, f"{asked} {at}")
                found.setdefault(asked, {})[at] = round(share, 4)
    found["decoding"] = [decoding(model, context, options["decode_batch"]) for context in options["contexts"]]
    return found


def folder_of(work: Path, model: str, seed: int) -> Path:
    return work / f"{model}-{seed}".replace(" ", "_").replace(",", "")


def work(options: dict, cell: dict) -> dict:
    """Search, train and measure one model."""
    from transformers import PreTrainedTokenizerFast

    from modeling_deltanet import DeltaNetForCausalLM

    data, held_out = (tokens(Path(options["data"]), name) for name in ("train", "held_out"))
    file = str(Path(options["data"]) / "tokenizer.json")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=file, eos_token="<|end|>", clean_up_tokenization_spaces=False)
    folder = folder_of(Path(options["work"]), cell["model"], cell["seed"])
    folder.mkdir(parents=True, exist_ok=True)
    found = folder / "search.json"
    search = json.loads(found.read_text()) if found.exists() else {}
    for rate in options["learning_rates"]:
        if str(rate) not in search:
            steps = options["search_steps"]
            trainer, took = train(cell["model"], data, rate, steps, cell["seed"], folder / f"lr-{rate}", options)
            rows = spread(held_out, options["length"], options["rows"] // 4)
            search[str(rate)] = round(float(losses(trainer.model, rows, options["batch"]).mean()), 4)
            found.write_text(json.dumps(search))
            print(f"{cell['model']}: lr {rate}: held-out loss {search[str(rate)]}, {took}", flush=True)
    best = float(min(search, key=lambda rate: search[rate] if math.isfinite(search[rate]) else math.inf))
    steps = math.ceil(options["tokens"] / options["batch"] / options["length"])
    saved = folder / f"model-{steps}"  # what is trained is not trained again, should measuring fail or be cut off
    if not (saved / "took.json").exists():
        trainer, took = train(cell["model"], data, best, steps, cell["seed"], folder / f"training-{steps}", options)
        print(f"{cell['model']}: lr {best}: {took}", flush=True)
        trainer.model.save_pretrained(saved)
        trainer.state.save_to_json(str(saved / "trainer_state.json"))
        tokenizer.save_pretrained(saved)
        (saved / "took.json").write_text(json.dumps(took))
    took = json.loads((saved / "took.json").read_text())
    model = DeltaNetForCausalLM.from_pretrained(saved).to("cuda" if torch.cuda.is_available() else "cpu")
    row = {"search": search, "lr": best, "parameters": model.num_parameters(), **took}
    row |= {"tokens": options["tokens"], "text_tokens": len(data)}
    return row | measure(model, held_out, tokenizer, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of lm_data.py")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of results, which the same command adds to")
    parser.add_argument("--work", type=Path, default=Path("runs/lm-work"), help="for checkpoints")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS, help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--tokens", type=float, help="to train on (default 150e6)")
    parser.add_argument("--liger", action="store_true", help="Liger's kernels for norms, MLP and loss, in all models")
    parser.add_argument("--seconds", type=float, default=520, help="when to stop (default 520)")
    parser.add_argument("--toy", action="store_true", help="tiny models")
    args = parser.parse_args()
    from cells import run_cells

    options = dict(TOY if args.toy else FULL) | {"liger": args.liger}
    options["tokens"] = args.tokens or options["tokens"]
    record = conditions("language modelling", __file__) | {"options": options}
    data = args.data / "lm_data.json"
    record["text"] = json.loads(data.read_text()) if data.exists() else None
    cells = [{"model": model, "seed": seed} for seed in args.seeds for model in args.models]
    places = {"data": str(args.data), "work": str(args.work)}
    run_cells(cells, partial(work, options | places), record, args.out, args.seconds, 1, resumes=True)


if __name__ == "__main__":
    main()
