"""Multi-query associative recall on every GPU at once: which models find again what they have read once?

    python benchmarks/quality/mqar.py --out mqar.json                 # 8 minutes; the same command goes on
    python benchmarks/quality/mqar.py --out try.json --toy            # seconds, on a CPU

The published settings (Zoology, Arora et al. 2023): vocabulary 8192, 4 pairs of key and value in 64 tokens up to 64 in
512, 100,000 texts to learn from, two layers of width 64 to 512. Other than there: layers have an MLP of their own
width, two heads, rotary positions in the transformer; at most 8000 steps of 128 texts, the better learning rate of
7e-4 and 2e-3; a training ends early that is right in 99 of 100 held-out questions.
"""

import argparse
import functools
import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parent.parent))
from quality_record import conditions  # noqa: E402


MODELS = (
    "transformer", "additive", "DeltaNet", "DeltaNet, no convolution", "DeltaNet + global attention",
)  # fmt: skip
SETTINGS = {512: 64, 256: 16, 128: 8, 64: 4}  # pairs by length
LEARNING_RATES = (7e-4, 2e-3)
SIZES = {"layers": 2, "heads": 2, "vocab_size": 8192}
RECIPE = {"steps": 8000, "batch": 128, "enough": 0.99}
TEXTS, HELD_OUT = 100_000, 1000


def grid() -> list[dict]:
    """What matters most comes first: the hardest length, and two more seeds of its hardest width."""

    def cells(length, widths, seeds):
        return [
            {"length": length, "pairs": SETTINGS[length], "width": width, "seed": seed, "model": model, "lr": lr}
            for seed in seeds
            for width in widths
            for model in MODELS
            for lr in LEARNING_RATES
        ]

    return [
        *cells(512, (64, 128, 256), (0,)),
        *cells(512, (64,), (1, 2)),
        *cells(512, (512,), (0,)),
        *(cell for length in (256, 128, 64) for cell in cells(length, (64, 128), (0,))),
    ]


@functools.cache
def texts(seed: int, rows: int, length: int, pairs: int):
    from tasks import mqar

    return mqar(seed, rows, length, pairs, SIZES["vocab_size"])


def work(cell: dict, recipe: dict = RECIPE, rows: int = TEXTS) -> dict:
    from models import make_model
    from train import Recipe, accuracy, fit
    from transformers import set_seed

    set_seed(cell["seed"])
    model = make_model(cell["model"], width=cell["width"], intermediate_size=cell["width"], **SIZES)
    shape = cell["length"], cell["pairs"]
    held_out = texts(2, HELD_OUT, *shape)
    took = fit(model, texts(1, rows, *shape), Recipe(learning_rate=cell["lr"], **recipe), cell["seed"], held_out)
    return {"accuracy": round(accuracy(model, held_out), 4), "parameters": model.num_parameters(), **took}


def toy(cell: dict) -> dict:
    return work(cell, {"steps": 3, "batch": 4}, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of results, which the same command adds to")
    parser.add_argument("--seconds", type=float, default=480, help="when to stop (default 480)")
    parser.add_argument("--workers", type=int, default=4, help="trainings at a time on each GPU (default 4)")
    parser.add_argument("--toy", action="store_true", help="two cells, three steps each")
    args = parser.parse_args()
    from cells import run_cells

    record = conditions("multi-query associative recall", __file__) | {
        "sizes": SIZES, "recipe": RECIPE, "texts": TEXTS, "held_out": HELD_OUT,
    }  # fmt: skip
    cells = grid()
    if args.toy:
        cells = [cell for cell in cells if cell["length"] == 64 and cell["width"] == 64][::4]
    run_cells(cells, toy if args.toy else work, record, args.out, args.seconds, args.workers)


if __name__ == "__main__":
    main()
