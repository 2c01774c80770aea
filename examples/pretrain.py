"""Pretrain a DeltaNet from nothing, on one process or many: text is streamed, and packed into full rows.

    # local text, one document a line (or --sample_by paragraph | document); a tokenizer is trained on its beginning
    python examples/pretrain.py --text data/*.txt --preset none --hidden_size 256 --layers 4 --max_steps 1000

    # a data set of the Hub, streamed, and a published tokenizer; the same flags on 8 GPUs, and on 2 machines
    python examples/pretrain.py --dataset HuggingFaceFW/fineweb-edu --subset sample-10BT \\
        --tokenizer fla-hub/delta_net-1.3B-100B --preset 340M --hybrid sliding --length 2048 --bf16 True
    accelerate launch --num_processes 8 examples/pretrain.py  ...the same...
    accelerate launch --num_machines 2 --machine_rank 0 ...  examples/pretrain.py  ...the same...

    # two processes on a CPU, where `accelerate launch` starts one, whatever --num_processes says
    torchrun --nproc_per_node 2 examples/pretrain.py  ...the same...

    # faster on a GPU, with less memory, and with curves (`pip install '.[tensorboard]'`)
    ... --use_liger_kernel True --torch_compile True --activation_checkpointing True --report_to tensorboard

Ctrl-C saves a checkpoint and stops; the same command goes on from the last one in --output_dir. Every flag of
Transformers' TrainingArguments works, FSDP's included; below, this script's own come first.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from datasets import IterableDataset, load_dataset
from shared import SETTINGS, Parser, check_run, check_setup, claim, load, refusals, run, train, train_tokenizer
from transformers import AutoTokenizer, Trainer, TrainingArguments, set_seed

from deltanet_conversion.text import TEXT_SUFFIXES
from modeling_deltanet import DeltaNetConfig, DeltaNetForCausalLM, register_remote_code


DOCUMENTS_AT_ONCE = 1000  # that are packed together; their last row is filled up with padding


@dataclass
class PretrainArguments:
    """What to learn from, and what to build."""

    dataset: str | None = field(default=None, metadata={"help": "a data set's name on the Hub, or its folder"})
    subset: str | None = field(default=None, metadata={"help": "its configuration, e.g. sample-10BT"})
    split: str = field(default="train", metadata={"help": "its split"})
    text_column: str = field(default="text", metadata={"help": "the column that holds the text"})
    text: list[str] = field(
        default_factory=list, metadata={"help": "local text files, or folders of them, in place of --dataset"}
    )
    sample_by: Literal["line", "paragraph", "document"] = field(
        default="line", metadata={"help": "what a document in --text is"}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "a tokenizer's name or folder; without it, one is trained on the data"}
    )
    vocab_size: int = field(default=8192, metadata={"help": "entries of a tokenizer that is trained"})
    preset: str = field(default="340M", metadata={"help": "340M or 1.3B, or none, for --hidden_size and --layers"})
    hybrid: str | None = field(default=None, metadata={"help": "sliding or global: softmax layers among the linear"})
    hidden_size: int = field(default=256, metadata={"help": "width with --preset none"})
    layers: int = field(default=4, metadata={"help": "layers with --preset none"})
    length: int = field(default=2048, metadata={"help": "tokens a row"})
    shuffle_buffer: int = field(default=10_000, metadata={"help": "rows among which the next one is drawn"})
    held_out: int = field(default=0, metadata={"help": "rows at the beginning that are for evaluation only"})


@dataclass
class Defaults(TrainingArguments):
    """TrainingArguments with this script's defaults."""

    output_dir: str = "runs/pretrain"
    max_steps: int = 1000
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.05
    logging_steps: float = 10
    save_steps: float = 0.1
    dataloader_pin_memory: bool = torch.cuda.is_available()
    ddp_find_unused_parameters: bool | None = False


def documents(args: PretrainArguments) -> IterableDataset:
    """A stream of `{"text": ...}`."""
    if (args.dataset is None) == (not args.text):
        raise ValueError("give either --dataset or --text" + (", not both" if args.text else ""))
    if args.dataset is not None:
        stream = load_dataset(args.dataset, args.subset, split=args.split, streaming=True)
        columns = stream.column_names or list(next(iter(stream), {}))
        if args.text_column not in columns:
            raise ValueError(f"{args.dataset} has columns {', '.join(columns)}: name one of them by --text_column")
        if args.text_column != "text":
            stream = stream.rename_column(args.text_column, "text")
    else:
        files = text_files(args.text)
        stream = load_dataset("text", data_files=files, sample_by=args.sample_by, split="train", streaming=True)
    return stream.select_columns(["text"]).filter(lambda document: document["text"].strip() != "")


def text_files(names: list[str]) -> list[str]:
    """The files themselves, and all text in folders among them."""
    files = []
    for name in map(Path, names):
        if not name.exists():
            raise ValueError(f"--text {name}: no such file")
        below = sorted(p for p in name.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file())
        if name.is_dir() and not below:
            raise ValueError(f"--text {name}: the folder holds no text, wanted files in {', '.join(TEXT_SUFFIXES)}")
        files += below or [name]
    return [str(file) for file in files]


def packed(stream: IterableDataset, tokenizer, length: int) -> IterableDataset:
    """Rows of `length` tokens: documents, each with its end, one after another. `position_ids` start again with every
    document, from which the model knows its borders; no token has to predict the beginning of the next document."""

    def pack(batch: dict) -> dict:
        ids, positions, labels = [], [], []
        for document in tokenizer(batch["text"], add_special_tokens=False, verbose=False).input_ids:
            document = document + [tokenizer.eos_token_id]
            ids += document
            positions += range(len(document))
            labels += [-100, *document[1:]]
        padding = -len(ids) % length  # a document of its own, from which nothing is learned
        ids += [tokenizer.eos_token_id] * padding
        positions += range(padding)
        labels += [-100] * padding
        columns = {"input_ids": ids, "position_ids": positions, "labels": labels}
        starts = range(0, len(ids), length)
        return {name: [column[i : i + length] for i in starts] for name, column in columns.items()}

    return stream.map(pack, batched=True, batch_size=DOCUMENTS_AT_ONCE, remove_columns=["text"])


def load_tokenizer(args: PretrainArguments, stream: IterableDataset, folder: Path, trainer_args: TrainingArguments):
    """The tokenizer that was asked for; or one trained on the beginning of the data, by the first process for all."""
    if args.tokenizer is not None:
        tokenizer = load(AutoTokenizer, args.tokenizer, "--tokenizer")
        if tokenizer.eos_token_id is None:
            raise ValueError(f"--tokenizer {args.tokenizer} has no token for the end of a text (eos_token)")
        return tokenizer
    with trainer_args.main_process_first():
        # The one that lies there is this run's only if the run has begun.
        if trainer_args.local_process_index == 0 and not (folder.parent / SETTINGS).exists():
            beginning = (document["text"] for document in islice(stream, 20_000))
            train_tokenizer(beginning, args.vocab_size).save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)


def make_config(args: PretrainArguments, tokenizer) -> DeltaNetConfig:
    fields = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": args.length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if args.preset == "none":
        fields |= {"hidden_size": args.hidden_size, "num_hidden_layers": args.layers}
        heads = max(1, args.hidden_size // 64)
        fields |= {"linear_num_key_heads": heads, "num_attention_heads": heads}
        if args.hybrid is not None:
            fields["layer_types"] = DeltaNetConfig.hybrid_layer_types(args.hybrid, args.layers)
        if args.hybrid == "sliding":
            fields["sliding_window"] = min(2048, args.length)
        return DeltaNetConfig(**fields)
    return DeltaNetConfig.preset(args.preset, hybrid=args.hybrid, **fields)


def prepare(args: PretrainArguments, trainer_args: TrainingArguments):
    """Trainer, ready to start, and the tokenizer. All that can be wrong with the input is found here."""
    check_setup(trainer_args)
    out, settings = Path(trainer_args.output_dir), dataclasses.asdict(args)
    check_run(out, settings)
    stream = documents(args)
    if next(iter(stream), None) is None:
        raise ValueError(f"{args.dataset or ', '.join(args.text)}: there is no text in it")
    tokenizer = load_tokenizer(args, stream, out / "tokenizer", trainer_args)
    rows = packed(stream, tokenizer, args.length)
    if args.held_out and (found := sum(1 for _ in rows.take(args.held_out + 1))) <= args.held_out:
        raise ValueError(
            f"the text is too short: rows of {args.length} tokens that it makes: {found}, and --held_out "
            f"{args.held_out} leaves none to train on"
        )
    set_seed(trainer_args.seed)  # the same weights in every process
    trainer = Trainer(
        model=DeltaNetForCausalLM(make_config(args, tokenizer)),
        args=trainer_args,
        train_dataset=rows.skip(args.held_out).shuffle(seed=trainer_args.seed, buffer_size=args.shuffle_buffer),
        eval_dataset=rows.take(args.held_out) if args.held_out else None,
    )
    if trainer.is_world_process_zero():
        claim(out, settings)
    return trainer, tokenizer


def main():
    parser = Parser(PretrainArguments, Defaults, description=__doc__)
    with refusals(parser):
        args, trainer_args = parser.parse()
        trainer, tokenizer = prepare(args, trainer_args)
    if trainer.is_world_process_zero():
        layer_types = trainer.model.config.layer_types
        pattern = ", ".join(f"{layer_types.count(t)} {t}" for t in dict.fromkeys(layer_types))
        print(f"{trainer.model.num_parameters():,} parameters ({pattern}), {trainer_args.world_size} process(es)")
    train(trainer)
    if args.held_out:
        loss = trainer.evaluate()["eval_loss"]
        print(f"held out: loss {loss:.4f}, perplexity {math.exp(loss):.2f}")
    register_remote_code()  # the folder then loads where this package is not installed, with trust_remote_code=True
    folder = Path(trainer_args.output_dir) / "model"
    trainer.save_model(folder)
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(folder)
        print(f"saved: {folder}")


if __name__ == "__main__":
    run(main)
