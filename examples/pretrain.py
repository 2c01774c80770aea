"""Pretrain a DeltaNet from nothing, on one process or many: text is streamed, and packed into full rows.

    # local text, one document a line (or --sample_by paragraph | document); a tokenizer is trained on its beginning
    python examples/pretrain.py --text data/*.txt --preset none --hidden_size 256 --layers 4 --max_steps 1000

    # a data set of the Hub, streamed, and a published tokenizer; the same flags on 8 GPUs, and on 2 machines
    python examples/pretrain.py --dataset HuggingFaceFW/fineweb-edu --subset sample-10BT \\
        --tokenizer fla-hub/delta_net-1.3B-100B --preset 340M --hybrid sliding --length 2048 --bf16 True
    accelerate launch --num_processes 8 examples/pretrain.py  ...the same...
    accelerate launch --num_machines 2 --machine_rank 0 ...  examples/pretrain.py  ...the same...

    # faster on a GPU, with less memory, and with curves
    ... --use_liger_kernel True --torch_compile True --activation_checkpointing True --report_to tensorboard

The same command goes on from the last checkpoint in --output_dir; Ctrl-C (once) saves one first. Every flag of
Transformers' TrainingArguments works, FSDP's included; below, this script's own come first.
"""

import math
import sys
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from datasets import IterableDataset, load_dataset
from shared import Help, SaveOnInterrupt, train_tokenizer
from transformers import AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from modeling_deltanet import DeltaNetConfig, DeltaNetForCausalLM, register_remote_code


DOCUMENTS_AT_ONCE = 1000  # that are packed together; what does not fill a row of them is left out


@dataclass
class PretrainArguments:
    """What to learn from, and what to build."""

    dataset: str | None = field(default=None, metadata={"help": "a data set's name on the Hub, or its folder"})
    subset: str | None = field(default=None, metadata={"help": "its configuration, e.g. sample-10BT"})
    split: str = field(default="train", metadata={"help": "its split"})
    text_column: str = field(default="text", metadata={"help": "the column that holds the text"})
    text: list[str] = field(default_factory=list, metadata={"help": "local text files, in place of --dataset"})
    sample_by: str = field(default="line", metadata={"help": "a document in --text is a line, paragraph or document"})
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


def documents(args: PretrainArguments) -> IterableDataset:
    """A stream of `{"text": ...}`."""
    if (args.dataset is None) == (not args.text):
        raise ValueError(f"give either --dataset or --text, got {args.dataset} and {args.text}")
    if args.dataset is not None:
        stream = load_dataset(args.dataset, args.subset, split=args.split, streaming=True)
    else:
        stream = load_dataset("text", data_files=args.text, sample_by=args.sample_by, split="train", streaming=True)
    if args.text_column != "text":
        stream = stream.rename_column(args.text_column, "text")
    return stream.select_columns(["text"]).filter(lambda document: document["text"].strip() != "")


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
        starts = range(0, len(ids) - length + 1, length)
        columns = {"input_ids": ids, "position_ids": positions, "labels": labels}
        return {name: [column[i : i + length] for i in starts] for name, column in columns.items()}

    return stream.map(pack, batched=True, batch_size=DOCUMENTS_AT_ONCE, remove_columns=["text"])


def load_tokenizer(args: PretrainArguments, stream: IterableDataset, folder: Path, trainer_args: TrainingArguments):
    """The tokenizer that was asked for; or one trained on the beginning of the data, by the first process for all."""
    if args.tokenizer is not None:
        return AutoTokenizer.from_pretrained(args.tokenizer)
    with trainer_args.main_process_first():
        if not (folder / "tokenizer.json").exists():
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


def main():
    parser = HfArgumentParser((PretrainArguments, Defaults), description=__doc__, formatter_class=Help)
    args, trainer_args = parser.parse_args_into_dataclasses()
    out = Path(trainer_args.output_dir)
    stream = documents(args)
    tokenizer = load_tokenizer(args, stream, out / "tokenizer", trainer_args)
    rows = packed(stream, tokenizer, args.length)
    train_rows = rows.skip(args.held_out).shuffle(seed=trainer_args.seed, buffer_size=args.shuffle_buffer)

    set_seed(trainer_args.seed)  # the same weights in every process
    model = DeltaNetForCausalLM(make_config(args, tokenizer))
    interrupt = SaveOnInterrupt()
    trainer = Trainer(
        model=model,
        args=trainer_args,
        train_dataset=train_rows,
        eval_dataset=rows.take(args.held_out) if args.held_out else None,
        callbacks=[interrupt],
    )
    if trainer.is_world_process_zero():
        layer_types = model.config.layer_types
        pattern = ", ".join(f"{layer_types.count(t)} {t}" for t in dict.fromkeys(layer_types))
        print(f"{model.num_parameters():,} parameters ({pattern}), {trainer_args.world_size} process(es)")
    last = get_last_checkpoint(out) if out.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    if interrupt.interrupted:
        print(f"Stopped at step {trainer.state.global_step}; the same command goes on from there.")
        sys.exit(130)
    if args.held_out:
        loss = trainer.evaluate()["eval_loss"]
        print(f"held out: loss {loss:.4f}, perplexity {math.exp(loss):.2f}")
    register_remote_code()  # the folder then loads where this package is not installed, with trust_remote_code=True
    trainer.save_model(out / "model")
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(out / "model")
        print(f"saved: {out / 'model'}")


if __name__ == "__main__":
    main()
