"""The language models of `lm.py` on the way that leads to the Hub: tasks of lm-evaluation-harness, evaluation, card.

    python benchmarks/quality/lm_publish.py --data runs/lm --work runs/lm-work --out lm.json --cards model_cards

Calls what `deltanet evaluate` and `deltanet card` call, for the first seed of each model that `--out` has and whose
folder still lies in `--work`; 4 minutes a model on two cores. What the tasks say goes into the rows of `--out`, too.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parent.parent))
TASKS = ("cloze", "continuation", "value")
LIMITS = (
    "An experiment of 30M parameters, which shows what a kind of layer does and is of no other use. It was trained on "
    "documentation and source code under many licences."
)


def publish(row: dict, folder: Path, data: Path, cards: Path, length: int) -> None:
    """Evaluates the model in `folder`, puts what the tasks say into `row`, and writes the card and its files."""
    from deltanet_conversion import Evaluation, evaluate_checkpoint
    from deltanet_conversion.card import make_card, write_card

    if not (folder / "evaluation.json").exists():
        tasks = tuple(str(data / "tasks" / f"{name}.yaml") for name in TASKS)
        text = (str(data / "held_out.jsonl"),)
        evaluate_checkpoint(Evaluation(str(folder), data=text, length=length, recall_lengths=(length,), tasks=tasks))
    results = json.loads((folder / "evaluation.json").read_text())["results"]
    found = {result["dataset"].removeprefix("heldout_"): result["value"] for result in results}
    row["tasks"] = {name: found[name] for name in TASKS}
    name = f"{re.sub('[^a-z0-9]+', '-', row['model'].lower())}-30m"
    card = make_card(
        folder, name, license="other", language="en", limits=LIMITS,
        summary=f"{row['model']}: one of the language models of 30M parameters in `benchmarks/RESULTS.md`, which says "
        "beside which others it was trained, on what, and what can be concluded.",
    )  # fmt: skip
    (cards / name).mkdir(parents=True, exist_ok=True)
    write_card(card, cards / name / "README.md")
    for file in ("evaluation.json", "trainer_state.json"):
        shutil.copy(folder / file, cards / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of lm_data.py")
    parser.add_argument("--work", type=Path, default=Path("runs/lm-work"), help="of lm.py")
    parser.add_argument("--out", type=Path, required=True, help="of lm.py")
    parser.add_argument("--cards", type=Path, default=Path("model_cards"), help="default model_cards")
    args = parser.parse_args()
    from lm import folder_of
    from local_tasks import write_tasks
    from results_file import write

    if not (args.data / "held_out.jsonl").exists():
        write_tasks(args.data)
    record = json.loads(args.out.read_text())
    for row in record["rows"]:
        folder = folder_of(args.work, row["model"], row["seed"]) / f"model-{row['steps']}"
        if row["seed"] == 0 and folder.exists():
            publish(row, folder, args.data, args.cards, record["options"]["length"])
            write(args.out, record)
            print(f"{row['model']}: {row['tasks']}", flush=True)


if __name__ == "__main__":
    main()
