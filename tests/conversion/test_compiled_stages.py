"""Stages whose layers are compiled: what they learn, keep and save is what they do without.

By the backend `aot_eager`, which makes Inductor's graphs and runs them as they are: g++ needs a minute for a layer.
"""

import shutil
from functools import partial

import pytest
import torch
from test_stages import StopAt, _raises, pair, tokenizer, weights  # noqa: F401 (fixtures)
from torch._dynamo.utils import counters

from deltanet_conversion import Distillation, Stage, align, distill
from deltanet_conversion.stage import StageTrainer


@pytest.fixture
def aot_eager(monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.mark.parametrize("kind", ["align", "distill"])
def test_a_compiled_stage_learns_the_same(pair, tmp_path, kind, aot_eager, monkeypatch):  # noqa: F811
    """`--compile` would do nothing, compile anew at every step, learn something else, not go on after a stop, or save
    what nobody can load.
    """
    run, make, more = align, Stage, {}
    if kind == "distill":
        run, make = distill, Distillation
        more = {"freeze": ("mlp",), "linear_decay": True, "save_steps": 5}
    text = tmp_path / "text" / "[0-9].txt"  # 37 blocks: the tenth batch is not full
    pair |= {"tokens": 11 * 4 * 16, "data": (str(text),), "device": "cpu"}
    eager = run(make(**pair | {"output": str(tmp_path / "eager")}, **more))
    assert not counters["stats"]
    if kind == "distill":  # stopped without, it goes on compiled
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="went away"):
            stop = StopAt(7, _raises("the machine went away"))
            train = StageTrainer.train
            patch.setattr(StageTrainer, "train", lambda self, **k: (self.add_callback(stop), train(self, **k)))
            run(make(**pair | more))
    compiled = run(make(**pair | more, compile=True))
    assert compiled["resumed"] == (kind == "distill")
    # Of a layer of either kind and the teacher's, and the divergence; or of a mixer and the teacher's.
    assert counters["stats"]["unique_graphs"] == {"align": 2, "distill": 4}[kind] and not counters["graph_break"]
    assert compiled["loss_before"] == eager["loss_before"]  # held-out text is read as always
    assert compiled["loss_after"] == pytest.approx(eager["loss_after"], rel=1e-5)
    one, other = weights(tmp_path / "eager"), weights(tmp_path / "out")
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=1e-4, msg=name)


def test_compiling_without_a_compiler_is_refused(pair, monkeypatch):  # noqa: F811
    """A stage would load its models and its text, and end in a page of the compiler's."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(
        ValueError, match=r"compile needs a C\+\+ compiler on a CPU \(g\+\+, .* and there is none here"
    ):
        align(Stage(**pair, compile=True, device="cpu"))
