"""Fine-tune a DeltaNet with LoRA by TRL's SFTTrainer, documents packed into full rows.

    # data: JSON lines with "text", with "prompt" and "completion", or with "messages" (needs a chat template)
    python examples/finetune_lora.py --model runs/pretrain/model --data notes.jsonl --max_steps 200
    python examples/finetune_lora.py --model runs/pretrain/model --data notes.jsonl --r 64 --max_length 4096 --merge
    True
    accelerate launch --num_processes 8 examples/finetune_lora.py  ...the same...

The adapter is written to OUTPUT_DIR/adapter, with --merge True also the merged model to OUTPUT_DIR/merged. The same
command goes on from the last checkpoint. Every flag of TRL's SFTConfig works; below, this script's own come first.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from shared import Help
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

import modeling_deltanet  # noqa: F401  (registers the family)


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
    max_length: int | None = 1024
    learning_rate: float = 2e-4
    logging_steps: float = 10
    bf16: bool | None = torch.cuda.is_available()
    dataloader_pin_memory: bool = torch.cuda.is_available()


def main():
    parser = HfArgumentParser((LoraArguments, Defaults), description=__doc__, formatter_class=Help)
    args, trainer_args = parser.parse_args_into_dataclasses()
    out = Path(trainer_args.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        args=trainer_args,
        train_dataset=load_dataset("json", data_files=args.data, split="train"),
        processing_class=tokenizer,
        # No target_modules: the family has defaults, every projection in the mixers and the MLPs.
        peft_config=LoraConfig(r=args.r, lora_alpha=2 * args.r, task_type="CAUSAL_LM"),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(out) if out.is_dir() else None)
    trainer.save_model(out / "adapter")
    if args.merge and trainer.is_world_process_zero():
        trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().save_pretrained(out / "merged")
        tokenizer.save_pretrained(out / "merged")
    if trainer.is_world_process_zero():
        print(f"saved: {', '.join(str(out / name) for name in ('adapter', 'merged') if (out / name).exists())}")


if __name__ == "__main__":
    main()
