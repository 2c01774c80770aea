"""What the delta rule repairs, and what its negative eigenvalues buy, on a CPU.

    python benchmarks/quality/evidence_cpu.py                      # shows what there is, and trains what is missing
    python benchmarks/quality/evidence_cpu.py --out mine.json      # all of it anew: 35 minutes on two cores

Overwriting recall: eight keys are written four times each, the value that was written last has to be returned; it is
learned from texts in which writes and questions come in any order. State tracking: products of swaps (the groups S3
and S5) and parity, learned from 32 tokens and asked up to 256. Writes `results/evidence_cpu.json` after every
training, then the tables and, beside it, the picture.
"""

import argparse
import json
import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parent.parent))
import figures  # noqa: E402
import figures_quality  # noqa: E402
from quality_record import conditions  # noqa: E402


SEEDS = 0, 1, 2
LENGTHS = 32, 64, 128, 256
PLAIN, DOUBLED = "DeltaNet, no convolution", "DeltaNet, no convolution, beta to 2"
TASKS = {
    "S3": {
        "models": (DOUBLED, PLAIN),
        "sizes": {"width": 64, "layers": 1, "heads": 2, "vocab_size": 16, "intermediate_size": 128},
        "recipe": {"steps": 1500, "batch": 64, "learning_rate": 5e-3},
        "data": {"length": LENGTHS[0]},
    },
    "S5": {
        "models": (DOUBLED, PLAIN),
        "sizes": {"width": 64, "layers": 1, "heads": 2, "vocab_size": 144, "intermediate_size": 128},
        "recipe": {"steps": 1500, "batch": 64, "learning_rate": 5e-3},
        "data": {"length": LENGTHS[0], "items": 5},
    },
    "parity": {
        "models": (DOUBLED, PLAIN),
        "sizes": {"width": 64, "layers": 1, "heads": 2, "vocab_size": 16, "intermediate_size": 128},
        "recipe": {"steps": 600, "batch": 64, "learning_rate": 5e-3},
        "data": {"length": LENGTHS[0]},
    },
    "overwriting recall": {
        "models": ("DeltaNet", "DeltaNet with a decay", "Gated DeltaNet", "additive", "2021 form"),
        "sizes": {"width": 64, "layers": 2, "heads": 2, "vocab_size": 256, "intermediate_size": 128},
        "recipe": {"steps": 600, "batch": 64, "learning_rate": 5e-3},
        "data": {"keys": 8, "vocab_size": 256},
    },
}


def work(cell: dict, steps: int | None = None) -> dict:
    import tasks
    from models import make_model
    from train import Recipe, accuracy, fit
    from transformers import set_seed

    task = TASKS[cell["task"]]
    draw = {
        "overwriting recall": tasks.overwriting, "S3": tasks.swaps, "S5": tasks.swaps, "parity": tasks.parity,
    }[cell["task"]]  # fmt: skip
    learn = tasks.overwriting_stream if draw is tasks.overwriting else draw
    recipe = Recipe(**task["recipe"] | ({"steps": steps} if steps else {}))
    set_seed(cell["seed"])
    model = make_model(cell["model"], **task["sizes"])
    took = fit(model, learn(1000 + cell["seed"], recipe.steps * recipe.batch, **task["data"]), recipe, cell["seed"])
    if "length" in task["data"]:
        asked = {length: draw(1, 512, **task["data"] | {"length": length}) for length in LENGTHS}
    else:
        asked = {"all": draw(1, 1024, **task["data"])}
    right = {str(name): round(accuracy(model, questions), 4) for name, questions in asked.items()}
    return {"accuracy": right, "parameters": model.num_parameters(), **took}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=figures.RESULTS / "evidence_cpu.json")
    parser.add_argument("--seconds", type=float, default=3600, help="when to stop (default 3600)")
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time (default 2)")
    args = parser.parse_args()
    from cells import run_cells

    cells = [
        {"task": name, "model": model, "seed": seed}
        for name, task in TASKS.items()
        for seed in SEEDS
        for model in task["models"]
    ]
    record = conditions("overwriting recall and state tracking", __file__) | {"tasks": TASKS, "seeds": SEEDS}
    done = run_cells(cells, work, record, args.out, args.seconds, args.workers)
    if done:
        figures.plot(json.loads(args.out.read_text()), args.out.with_suffix(".png"), figures_quality.plot_evidence_cpu)
    if done and args.out.parent == figures.RESULTS:
        figures.write_documents()
    print(figures_quality.overwriting_recall(record), figures_quality.state_tracking(record), sep="\n")


if __name__ == "__main__":
    main()
