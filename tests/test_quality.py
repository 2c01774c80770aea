"""The experiments under benchmarks/quality/: tasks ask what they say, and runs go on where they stopped."""

import json
import random
import sys
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path += [str(BENCHMARKS), str(BENCHMARKS / "quality")]
import cells  # noqa: E402
import figures_quality  # noqa: E402
import lm  # noqa: E402
import lm_data  # noqa: E402
import local_tasks  # noqa: E402
import models  # noqa: E402
import tasks  # noqa: E402
import train  # noqa: E402
from slow_square import slow_square  # noqa: E402


def asked(questions):
    """`(the text, the place, the answer)` of every question."""
    for ids, at, answers in zip(questions.ids.tolist(), questions.at.tolist(), questions.answers.tolist()):
        for place, answer in zip(at, answers):
            if answer != tasks.NOT_ASKED:
                yield ids, place, answer


@pytest.mark.parametrize("draw", [tasks.overwriting, tasks.overwriting_stream])
def test_the_value_that_was_written_last_is_asked_for(draw):
    """Overwriting recall would ask for another value, and reward a memory that does not overwrite."""
    found = list(asked(draw(0, 20)))
    assert len(found) > 100
    for ids, place, answer in found:
        memory, t = {}, 0
        while t < place - 1:
            t += ids[t] == 0  # a question is written like a value, and changes nothing
            memory[ids[t]] = ids[t + 1]
            t += 2
        assert ids[place - 1] == 0 and memory[ids[place]] == answer


def test_associative_recall_is_the_published_task():
    """Figures would stand beside the published ones of another task."""
    pairs = 16
    questions = tasks.mqar(0, 50, 128, pairs)
    assert questions.answers.shape == (50, pairs)
    for ids, place, answer in asked(questions):
        keys, values = ids[: 2 * pairs : 2], ids[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs and max(keys) < 4096 <= min(values)
        assert place >= 2 * pairs and place % 2 == 0 and values[keys.index(ids[place])] == answer
    assert (questions.at.sort(dim=1).values.diff(dim=1) > 0).all()
    assert questions.at.float().mean() < 64, "most questions come soon"


@pytest.mark.parametrize("items", [3, 5])
def test_products_of_swaps(items):
    """State tracking would be of something that is no group, which a model may shortcut."""
    generators = [list(range(items))]
    for i in range(items):
        for j in range(i + 1, items):
            generators.append([{i: j, j: i}.get(x, x) for x in range(items)])
    questions, elements = tasks.swaps(0, 5, 40, items), list(permutations(range(items)))
    for ids, answers in zip(questions.ids.tolist(), questions.answers.tolist()):
        things = list(range(items))
        for token, answer in zip(ids, answers):
            things = [things[x] for x in generators[token]]
            assert elements[answer - len(generators)] == tuple(things)


@pytest.mark.parametrize("draw", [tasks.parity, tasks.swaps, lambda s, n, t: tasks.mqar(s, n, t, 4)])
def test_data_is_made_by_its_seed(draw):
    """A run could not be repeated, or two seeds would be one."""
    first, same, other = draw(0, 4, 32), draw(0, 4, 32), draw(1, 4, 32)
    assert torch.equal(first.ids, same.ids) and torch.equal(first.answers, same.answers)
    assert not torch.equal(first.ids, other.ids)


def test_a_model_learns_by_trainer():
    """A loss that is taken at another place, or of another token, would teach nothing, and be blamed on the model."""
    torch.manual_seed(0)
    model = models.make_model("2021 form", width=16, layers=1, heads=1, vocab_size=8)
    recipe = train.Recipe(steps=40, batch=16, learning_rate=2e-2, enough=1.0, look=5)
    data = tasks.Questions(*(torch.arange(4).repeat(160, 1) + shift for shift in (0, 0, 1)))  # the next number
    assert train.accuracy(model, data) < 0.9
    took = train.fit(model, data, recipe, 0, held_out=data)
    assert train.accuracy(model, data) == 1 and took["steps"] < 40


def test_models_differ_by_what_their_names_say():
    """A comparison would be of models of different sizes."""
    sizes = {"width": 64, "layers": 4, "heads": 2, "vocab_size": 32, "sliding_window": 8}
    made = {name: models.make_model(name, **sizes) for name in models.MODELS}
    counts = {name: model.num_parameters() for name, model in made.items()}
    assert counts["DeltaNet"] == counts["additive"] == counts["DeltaNet, beta to 2"]
    assert counts["2021 form"] == counts["DeltaNet, no convolution"]
    assert max(counts.values()) < 1.15 * min(counts.values())
    layer_types = {name: made[name].config.layer_types for name in made}
    assert set(layer_types["transformer"]) == {"full_attention"}
    assert layer_types["DeltaNet + sliding window"][1::2] == ["sliding_attention"] * 2


def test_a_grid_goes_on_where_it_stopped(tmp_path, capfd):
    """A lease that ends would cost everything that was measured in it, and one failure the rest."""
    grid, out = [{"x": 0.0}, {"x": 0.25}, {"x": 0.5}, {"x": 60.0}], tmp_path / "not there yet" / "out.json"
    assert not cells.run_cells(grid[:2], slow_square, {}, out, 60, 1)
    assert "this one fails" in (said := capfd.readouterr().out) and "1 left" in said
    record = {}
    assert not cells.run_cells([grid[0], *grid[2:]], slow_square, record, out, 6, 2)
    assert "2 of 3 cells" in (said := capfd.readouterr().out) and "1 left" in said
    assert record["rows"] == [{"x": 0.0, "square": 0.0}, {"x": 0.5, "square": 0.25}]


def test_recalled_tokens():
    """The perplexity of recalled tokens would be that of something else."""
    rows = np.array([[5, 6, 7, 5, 6, 5, 7], [1, 1, 1, 2, 1, 2, 2]], dtype=np.uint16)
    assert lm.recalled(rows, 8).astype(int).tolist() == [[0, 0, 0, 1, 0, 0], [0, 1, 0, 0, 1, 0]]


@pytest.mark.parametrize(
    "name, content, text",
    [
        ("a/b.html", "<head><title>x</title></head><p>A &lt; B<br>" + "and so on. " * 40, "A < B\nand so on."),
        (
            "a/man1/b.1.gz",
            '.TH B 1\n.\\" hidden\n.SH NAME\nb \\- \\fBbold\\fP\n' + "and so on.\n" * 40,
            "NAME\nb - bold\n",
        ),
        ("a/b.py", "x = 1\n" * 100, "x = 1\n"),
        ("a/b.py", "x = 1\n" * 60_000, None),
        ("a/b.txt", "трудно " * 100, None),
        ("a/b.png", "x" * 1000, None),
    ],
)
def test_text_is_read_without_its_markup(name, content, text):
    """Models would learn markup, tables or another language."""
    import gzip

    raw = content.encode()
    found = lm_data.text_of(name, gzip.compress(raw) if name.endswith(".gz") else raw)
    assert found is None if text is None else found.startswith(text), found


def test_documentation_for_another_teacher(tmp_path):
    """A student would be shown the start of one manual, or more than was asked for."""
    lm_data.write_documentation(tmp_path / "docs.jsonl", [f"{i}" * 50 for i in range(8)], 190)
    rows = [json.loads(line)["text"] for line in (tmp_path / "docs.jsonl").read_text().splitlines()]
    assert rows == ["0" * 50, "3" * 50, "6" * 50]


def test_tables_of_the_grid_and_of_language_models():
    """What a GPU measured would be shown at a learning rate that failed, or under another model's name."""
    cell = {"length": 64, "pairs": 4, "width": 64}
    rows = [
        cell | {"model": model, "lr": lr, "seed": seed, "accuracy": accuracy}
        for model, lr, seed, accuracy in [
            ("a", 1e-3, 0, 0.5), ("a", 4e-3, 0, 0.9), ("a", 4e-3, 1, 0.7), ("a", 1e-3, 1, 0.6), ("b", 1e-3, 0, 1.0),
        ]
    ]  # fmt: skip
    table = figures_quality.mqar({"rows": rows})
    assert "| 4 in 64, 64 | 0.800 [0.700, 0.900] | 1.000 |" in table
    decoding = [{"context": x, "batch": 1, "ms": 1.0, "cache_bytes_per_text": 2_000_000} for x in (1024, 32768)]
    row = {
        "model": "a", "seed": 0, "parameters": 29_900_000, "lr": 2e-3, "perplexity": 9.0, "perplexity_recalled": 2.0,
        "perplexity_others": 20.0, "multiple_choice": 0.5, "needle": {"256": 1.0, "1024": 0.25},
        "tokens_per_second": 512_000, "peak_GB": 20.5, "decoding": decoding,
    }  # fmt: skip
    table = figures_quality.language_models({"rows": [row, row | {"seed": 1, "perplexity": 10.0}]})
    assert "| a | 29.9M | 0.002 | 9.50 [9.00, 10.00] | 2.00 [2.00, 2.00] |" in table
    assert "cloze" not in table
    tasks = {"cloze": 0.25, "continuation": 0.5, "value": 0.125}
    table = figures_quality.language_models({"rows": [row | {"tasks": tasks}, row | {"model": "b"}]})
    assert "| 0.500 | 0.250 | 0.500 | 0.125 |" in table and "| 0.500 | - | - | - |" in table
    assert "1.00 / 0.25" in table and "| a | 512K | 20.5 | 1.00 | 1.00 | 2.00 | 2.00 |" in table


def test_local_tasks_can_be_answered_from_their_text():
    """lm-evaluation-harness would ask what no model can know."""
    draw, filler = random.Random(0), "The engine of a boat turns the screw. " * 10
    [row] = local_tasks.cloze([f"{filler}\n\n{filler}It is the engine."], draw)
    assert row == {"text": f"{filler}It is the", "target": " engine"}
    [row] = local_tasks.value([f"{filler}\nport number: 8080\nUse it: often\nUse it: often\n{filler}"], draw)
    assert row["target"] == " 8080" and row["text"].endswith("\n\nport number:") and "port number: 8080" in row["text"]
    texts = ["".join(draw.choices("abcdefgh ", k=900)) for _ in range(4)]
    [row] = local_tasks.continuation(texts, draw)
    assert row["text"] + row["choices"][row["target"]] in {text[:720] for text in texts}
