"""Tasks for lm-evaluation-harness from held-out text, for a machine without a hub.

    python benchmarks/quality/local_tasks.py runs/lm       # writes tasks/*.jsonl and *.yaml, and held_out.jsonl there
    deltanet evaluate MODEL --task runs/lm/tasks/cloze.yaml --task runs/lm/tasks/value.yaml
    lm_eval --model hf --model_args pretrained=MODEL,trust_remote_code=True --include_path runs/lm/tasks \\
        --tasks heldout_cloze,heldout_continuation,heldout_value

- `cloze`: the last word of a paragraph, which the paragraph has had before (in the form of LAMBADA)
- `continuation`: which of four endings is the text's own (as HellaSwag asks)
- `value`: a document that says `name: value`, or `name = value`, then `name:` once more (in the form of SWDE and FDA)
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path


sys.path.append(str(Path(__file__).parent.parent))

COUNT = 500  # examples of each
FIELD = re.compile(r"^[ \t*:-]*([A-Za-z][\w -]{3,30})(:| =) +(\S{3,24})$", re.MULTILINE)
YAML = """task: heldout_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{target}}}}"
target_delimiter: ""
{more}metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


def documents(folder: Path) -> list[str]:
    from lm import tokens
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    ids, texts, start = tokens(folder, "held_out"), [], 0
    for end in (ids == 0).nonzero()[0]:
        texts.append(tokenizer.decode(ids[start:end].tolist()))
        start = end + 1
    return texts


def cloze(texts: list[str], draw: random.Random) -> Iterator[dict]:
    paragraphs = [part for text in texts for part in text.split("\n\n") if 300 < len(part) < 1200]
    for paragraph in draw.sample(paragraphs, len(paragraphs)):
        words = paragraph.split()
        last = words[-1].strip(".,;:()'\"")
        if len(last) > 4 and last.isalpha() and last in words[:-1]:
            yield {"text": paragraph[: paragraph.rindex(last)].rstrip(), "target": f" {last}"}


def continuation(texts: list[str], draw: random.Random, size: int = 600, end: int = 120) -> Iterator[dict]:
    pieces = [text[i : i + size + end] for text in texts for i in range(0, min(len(text) - size - end, 20_000), 2000)]
    draw.shuffle(pieces)
    for i in range(0, len(pieces) - 3, 4):
        endings = [piece[size:] for piece in pieces[i : i + 4]]
        label = draw.randrange(4)
        endings[0], endings[label] = endings[label], endings[0]
        yield {"text": pieces[i][:size], "choices": endings, "target": label}


def value(texts: list[str], draw: random.Random, size: int = 2500) -> Iterator[dict]:
    for text in draw.sample(texts, len(texts)):
        text = text[:size]
        fields = [x for x in FIELD.findall(text) if text.count(x[0]) == text.count(x[2]) == 1]
        if fields:
            name, sign, answer = draw.choice(fields)
            yield {"text": f"{text}\n\n{name}{sign}", "target": f" {answer}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder of lm_data.py")
    write_tasks(parser.parse_args().folder)


def write_tasks(folder: Path) -> None:
    """`held_out.jsonl`, a document per row, and `tasks/`."""
    texts, target = documents(folder), folder.resolve() / "tasks"
    (folder / "held_out.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    target.mkdir(exist_ok=True)
    for make in (cloze, continuation, value):
        name = make.__name__
        rows = [row for row, _ in zip(make(texts, random.Random(0)), range(COUNT))]
        file = target / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        is_choice = make is continuation
        kind, more = ("multiple_choice", 'doc_to_choice: "{{choices}}"\n') if is_choice else ("loglikelihood", "")
        (target / f"{name}.yaml").write_text(YAML.format(name=name, file=file, kind=kind, more=more))
        print(f"{name}: {len(rows)} examples")


if __name__ == "__main__":
    main()
