"""Fine-tune a DeltaNet with LoRA by TRL's SFTTrainer, documents packed into rows, nothing left out.

    # data: JSON lines with "text", with "prompt" and "completion", or with "messages" (chats)
    python examples/finetune_lora.py --model runs/pretrain/model --data notes.jsonl --max_steps 200
    python examples/finetune_lora.py --model runs/pretrain/model --data notes.jsonl \\
        --r 64 --max_length 4096 --merge True
    accelerate launch --num_processes 8 examples/finetune_lora.py  ...the same...

    # two processes on a CPU, where `accelerate launch` starts one, whatever --num_processes says
    torchrun --nproc_per_node 2 examples/finetune_lora.py  ...the same...

The adapter is written to OUTPUT_DIR/adapter, with --merge True also the merged model to OUTPUT_DIR/merged. Ctrl-C
saves a checkpoint and stops; the same command goes on from the last one. A document that is longer than --max_length
goes on in another row. Chats need a tokenizer with a chat template, or --chat_template_path FILE. Curves come by
--report_to tensorboard, after `pip install '.[tensorboard]'`.

Every flag of TRL's SFTConfig works; below, this script's own come first.
"""

import quiet  # noqa: F401


# isort: split
import copy
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.compute as pc
import torch
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from peft import LoraConfig
from shared import Parser, check_run, check_setup, claim, load, refusals, run, train
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import modeling_deltanet  # noqa: F401  (registers the family)


KINDS = ({"text"}, {"prompt", "completion"}, {"messages"})
WANTED = '"text", "prompt" and "completion", or "messages"'


@dataclass
class LoraArguments:
    """What to fine-tune, and how much of it."""

    model: str = field(metadata={"help": "a model's folder or name on the Hub"})
    data: list[str] = field(metadata={"help": "JSON lines files"})
    r: int = field(default=16, metadata={"help": "rank of the adapter; alpha is twice that"})
    merge: bool = field(default=False, metadata={"help": "also write the model with the adapter merged into it"})


@dataclass
class Defaults(SFTConfig):
    """SFTConfig with this script's defaults."""

    output_dir: str = "runs/lora"
    packing: bool = True
    packing_strategy: str = "bfd_split"  # TRL's own default cuts off what is longer than a row
    max_length: int | None = 1024
    learning_rate: float = 2e-4
    logging_steps: float = 10
    bf16: bool | None = torch.cuda.is_available()
    dataloader_pin_memory: bool = torch.cuda.is_available()
    ddp_find_unused_parameters: bool | None = False
    gradient_checkpointing: bool | None = None

    def __post_init__(self):
        if self.gradient_checkpointing is None and self.activation_checkpointing is None:
            self.activation_checkpointing = True  # as TRL does, which still calls it by its old name
        super().__post_init__()


class CountingTrainer(SFTTrainer):
    """SFTTrainer that knows how many tokens its data had before they were packed or cut off."""

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        whole = copy.copy(args)
        whole.max_length = None
        tokens = super()._prepare_dataset(dataset, processing_class, whole, False, formatting_func, dataset_name)
        self.tokens_in_all, self.tokens_that_count = count(tokens)
        if not any(label != -100 for row in tokens for label in row["labels"][1:]):
            raise ValueError(f"the {dataset_name} data holds nothing to learn: no document of two tokens")
        return super()._prepare_dataset(tokens, processing_class, args, packing, None, dataset_name)


def count(rows: Dataset) -> tuple[int, int]:
    """How many tokens there are, and how many of them are to be predicted (prompts are not)."""
    labels = [batch["labels"].combine_chunks().flatten() for batch in rows.with_format("arrow").iter(1000)]
    return sum(map(len, labels)), sum(pc.sum(pc.not_equal(x, -100)).as_py() or 0 for x in labels)


def load_rows(files: list[str]) -> Dataset:
    """The rows of JSON lines files. What is wrong with them is told by file and line."""
    for file in map(Path, files):
        if not file.is_file():
            raise ValueError(f"--data {file}: " + ("a folder, wanted files" if file.is_dir() else "no such file"))
        if not file.stat().st_size:
            raise ValueError(f"--data {file}: the file is empty")
    try:
        rows = load_dataset("json", data_files=files, split="train")
    except DatasetGenerationError as error:
        raise ValueError(why_unreadable(files) or f"--data {', '.join(files)}: {error.__cause__ or error}") from error
    kind = next((kind for kind in KINDS if kind <= set(rows.column_names)), None)
    if kind is None:
        alpaca = {"instruction", "output"} <= set(rows.column_names)
        more = '; "instruction" and "input" together make a "prompt", "output" is its "completion"' if alpaca else ""
        raise ValueError(f"--data has the columns {', '.join(rows.column_names)}, wanted {WANTED}{more}")
    for column in kind:
        check_column(rows, column)
    return rows


def why_unreadable(files: list[str]) -> str | None:
    """The first line that is no JSON object."""
    for file in files:
        with open(file, encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    content = json.loads(line) if line.strip() else {}
                except json.JSONDecodeError as error:
                    return f"--data {file}, line {number}: no JSON ({error.msg})"
                if not isinstance(content, dict):
                    return f"--data {file}, line {number}: wanted an object with {WANTED}, got {line.strip()[:40]}"
    return None


def check_column(rows: Dataset, column: str) -> None:
    """Text in every row, or messages with role and content."""
    empty = next((i for i, value in enumerate(rows[column]) if value is None), None)
    if empty is not None:
        raise ValueError(f'--data has no "{column}" in row {empty + 1}')
    first = rows[0][column]
    chat = isinstance(first, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in first)
    if not chat and (column == "messages" or not isinstance(first, str)):
        wanted = 'a list of {"role": ..., "content": ...}' if column == "messages" else "text"
        raise ValueError(f'--data has "{column}" {first!r} in its first row, wanted {wanted}')


def is_chat(rows: Dataset) -> bool:
    return any(isinstance(rows[0].get(column), list) for column in ("messages", "prompt"))


def prepare(args: LoraArguments, trainer_args: Defaults) -> CountingTrainer:
    """Trainer, ready to start. All that can be wrong with the input is found here."""
    check_setup(trainer_args)
    out, settings = Path(trainer_args.output_dir), dataclasses.asdict(args)
    del settings["merge"]
    check_run(out, settings)
    rows = load_rows(args.data)
    tokenizer = load(AutoTokenizer, args.model, "--model")
    if is_chat(rows) and tokenizer.chat_template is None and trainer_args.chat_template_path is None:
        raise ValueError(
            f"--data holds chats, but the tokenizer of {args.model} has no chat template: name one by "
            "--chat_template_path, a Jinja file or a tokenizer that has one"
        )
    trainer = CountingTrainer(
        model=load(AutoModelForCausalLM, args.model, "--model", dtype=torch.float32),
        args=trainer_args,
        train_dataset=rows,
        processing_class=tokenizer,
        # No target_modules: the family has defaults, every projection in the mixers and the MLPs.
        peft_config=LoraConfig(r=args.r, lora_alpha=2 * args.r, task_type="CAUSAL_LM"),
    )
    if trainer.is_world_process_zero():
        claim(out, settings)
    return trainer


def show_tokens(trainer: CountingTrainer) -> None:
    kept, trained_on = count(trainer.train_dataset)
    lost = trainer.tokens_that_count - trained_on
    prompts = trainer.tokens_in_all - trainer.tokens_that_count
    print(
        f"{trained_on:,} of {trainer.tokens_in_all:,} tokens are trained on, in {len(trainer.train_dataset):,} rows"
        + (f"; {prompts:,} are of prompts" if prompts else "")
        + (f"; {lost:,} are cut off at --max_length {trainer.args.max_length}" if lost else "")
    )


def main():
    parser = Parser(LoraArguments, Defaults, description=__doc__)
    with refusals(parser):
        args, trainer_args = parser.parse()
        trainer = prepare(args, trainer_args)
    out = Path(trainer_args.output_dir)
    if trainer.is_world_process_zero():
        show_tokens(trainer)
    train(trainer)
    trainer.save_model(out / "adapter")
    if trainer.is_world_process_zero():
        saved = [out / "adapter"]
        if args.merge:
            saved.append(out / "merged")
            trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().save_pretrained(saved[-1])
            trainer.processing_class.save_pretrained(saved[-1])
        print(f"saved: {', '.join(map(str, saved))}")


if __name__ == "__main__":
    run(main)
