"""A start that is computed from text, and layers chosen by what they are worth on it."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_stages import pair, tokenizer, weights  # noqa: F401  fixtures
from tiny import tiny_model, tokens
from transformers import AutoModelForCausalLM

from deltanet_conversion import calibrate as calibrate_module
from deltanet_conversion import convert_checkpoint, convert_from_llama
from deltanet_conversion.calibrate import RIDGE, Calibration
from deltanet_conversion.card import make_card


@pytest.fixture
def teacher(pair, tmp_path):  # noqa: F811
    """A teacher of which one layer's attention, the third, matters."""
    model = AutoModelForCausalLM.from_pretrained(pair["teacher"])
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.weight.mul_(1.5 if i == 2 else 0.2)
    model.save_pretrained(pair["teacher"])
    return model


@pytest.fixture
def options(pair):  # noqa: F811
    return {"calibrate": pair["data"], "calibration_tokens": 1024}


def kl(student, teacher, ids):
    got, wanted = (model.eval()(ids).logits.flatten(0, 1).log_softmax(-1) for model in (student, teacher))
    return F.kl_div(got, wanted, reduction="batchmean", log_target=True).item()


@torch.no_grad()
def test_a_calibrated_student_is_nearer_to_its_teacher(teacher, options, pair, tmp_path):  # noqa: F811
    """Calibration would cost time and change nothing, or change what was copied from the teacher."""
    found = {}
    (tmp_path / "calibrated.scores.json").write_text("somebody's")
    for name, more in (("fresh", {}), ("calibrated", options)):
        convert_checkpoint(pair["teacher"], tmp_path / name, keep="0", **more)
        found[name] = kl(AutoModelForCausalLM.from_pretrained(tmp_path / name), teacher, tokens(4, 60) % 90)
    assert found["calibrated"] < 0.5 * found["fresh"], found
    assert (tmp_path / "calibrated.scores.json").read_text() == "somebody's"  # which is of `auto` only
    fresh, calibrated = (weights(tmp_path / name) for name in found)
    changed = {name for name in fresh if not torch.equal(fresh[name], calibrated[name])}
    assert changed == {f"model.layers.{i}.linear_attn.o_proj.weight" for i in (1, 2, 3)}
    facts = json.loads((tmp_path / "calibrated" / "conversion.json").read_text())["calibration"]
    assert facts["data"] == ["text"] and facts["tokens"] == 1024 and len(facts["missed"]) == 3


@torch.no_grad()
def test_the_fit_is_the_least_squares_solution(teacher, pair, tmp_path):  # noqa: F811
    """Another layer's inputs, or tokens weighted otherwise, would give a start that is worse and still looks right."""
    convert_from_llama(pair["teacher"], tmp_path / "fresh", keep="0,2,3")
    calibration = Calibration(pair["data"], tokens=512, length=64)
    convert_from_llama(pair["teacher"], tmp_path / "out", keep="0,2,3", calibration=calibration)
    ids = calibrate_module_rows(pair, tmp_path, 64)[:8]
    mixer = AutoModelForCausalLM.from_pretrained(tmp_path / "fresh").double().model.layers[1].linear_attn
    seen = {}
    mixer.o_proj.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    teacher = teacher.double().eval()

    def remember(module, args, kwargs, output):
        seen.update(y=output[0])
        mixer(kwargs["hidden_states"], position_embeddings=kwargs["position_embeddings"])

    teacher.model.layers[1].self_attn.register_forward_hook(remember, with_kwargs=True)
    teacher.model.layers[1].post_attention_layernorm.register_forward_pre_hook(lambda module, a: seen.update(r=a[0]))
    teacher(ids)
    size = seen["r"].square().mean(-1, keepdim=True).sqrt()
    x, y = ((seen[name] / size).flatten(0, 1) for name in "xy")
    ridge = (RIDGE * x.square().sum(0).mean()).sqrt() * torch.eye(x.shape[1])
    zeros = torch.zeros(len(ridge), y.shape[1])
    wanted = torch.linalg.lstsq(torch.cat([x, ridge.double()]), torch.cat([y, zeros.double()])).solution.T
    got = weights(tmp_path / "out")["model.layers.1.linear_attn.o_proj.weight"]
    torch.testing.assert_close(got.double(), wanted, atol=1e-4, rtol=1e-4)
    assert (got - mixer.o_proj.weight).abs().max() > 0.1


def calibrate_module_rows(pair, folder, length):  # noqa: F811
    from deltanet_conversion.checkpoint import load_tokenizer
    from deltanet_conversion.text import blocks, load_text

    tokenizer = load_tokenizer(pair["teacher"])  # noqa: F811
    return torch.tensor(blocks(load_text(list(pair["data"])), tokenizer, length)["input_ids"][:])


def test_the_layer_that_matters_is_kept(teacher, options, pair, tmp_path):  # noqa: F811
    """`auto` would be even spacing by another name, and the card could not say why a layer was kept."""
    result = convert_checkpoint(pair["teacher"], tmp_path / "out", keep="auto:25%", **options)
    assert [i for i, name in enumerate(result["layer_types"]) if name != "linear_attention"] == [2]
    facts = json.loads((tmp_path / "out" / "conversion.json").read_text())
    scores = facts["layer_scores"]["scores"]
    assert facts["kept_layers"] == [2] and len(scores) == 4 and max(scores) == scores[2] > 3 * sorted(scores)[-2] > 0
    assert str(tmp_path) not in json.dumps(facts)
    card = str(make_card(tmp_path / "out", "me/out"))
    assert f"{scores[2]}" in card and "when this layer alone is linear" in card
    assert not (tmp_path / "out.scores.json").exists()


class Copying(torch.nn.Module):
    """Attention to what came after a token's first occurrence: hidden states are tokens here, its output logits."""

    def forward(self, hidden_states, **kwargs):
        logits, ids = torch.zeros(1, hidden_states.shape[1], 64), hidden_states[0].tolist()
        for t, token in enumerate(ids):
            if token in ids[:t]:
                logits[0, t, ids[ids.index(token) + 1]] = 5.0
        return logits, None


class Biased(torch.nn.Module):
    def forward(self, hidden_states, **kwargs):
        return torch.linspace(0, 1, 64).expand(1, hidden_states.shape[1], 64), None


class Nothing(torch.nn.Module):
    def forward(self, hidden_states, **kwargs):
        return torch.zeros(1, hidden_states.shape[1], 64)


def test_a_layer_that_copies_is_worth_most():
    """A student would lose what it was told a page before: text as it comes says little of the layers that copy."""
    layers = [SimpleNamespace(self_attn=module) for module in (Biased(), Copying())]

    def teacher(ids, **kwargs):
        return SimpleNamespace(logits=sum(layer.self_attn(hidden_states=ids)[0] for layer in layers))

    teacher.model = SimpleNamespace(layers=layers)
    rows = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(seed)) for seed in range(2)])
    scores = calibrate_module.score_layers(teacher, {0: Nothing(), 1: Nothing()}, rows)
    assert scores[1] > 10 * scores[0] > 0


def test_an_interrupted_measurement_goes_on(teacher, options, pair, tmp_path, monkeypatch):  # noqa: F811
    """Hours of measuring a large model would be lost to Ctrl-C, or another run's scores taken for this one's."""
    measured = []

    class Interrupted(calibrate_module.Mixer):
        def forward(self, *args, **kwargs):
            measured.append(self)
            if len(measured) == 3:
                raise KeyboardInterrupt
            return super().forward(*args, **kwargs)

    convert_checkpoint(pair["teacher"], tmp_path / "whole", keep="auto:25%", **options)
    monkeypatch.setattr(calibrate_module, "Mixer", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(pair["teacher"], tmp_path / "out", keep="auto:25%", **options)
    assert (tmp_path / "out.scores.json").exists() and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="out.scores.json holds another measurement"):
        convert_checkpoint(pair["teacher"], tmp_path / "out", keep="auto:25%", linear_use_rope=False, **options)
    convert_checkpoint(pair["teacher"], tmp_path / "out", keep="auto:25%", **options)
    assert len(measured) == 3 + 2  # of four layers, two were measured before
    one, other = ((tmp_path / name / "conversion.json").read_text() for name in ("whole", "out"))
    assert one == other
    one, other = (weights(tmp_path / name) for name in ("whole", "out"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_missing_is_named(pair, options, tmp_path):  # noqa: F811
    """A user would not know where the text comes from, how much is wanted, or that an option was passed over."""
    tiny_model().save_pretrained(tmp_path / "ours")
    for source, words, more in (
        ("teacher", ["--calibrate TEXT", "'auto:25%'"], {"keep": "auto:25%"}),
        ("teacher", ["'auto:25%'", "'auto'"], options | {"keep": "auto"}),
        ("teacher", ["keep must be", "1.5"], options | {"keep": "auto:1.5"}),
        ("teacher", ["wanted 2,560", "2,048"], options | {"keep": "auto:25%", "calibration_tokens": 2048}),
        ("teacher", ["no such folder: ./typo/typo"], {"keep": "25%", "calibrate": ("./typo/typo",)}),
        ("ours", ["--calibrate"], options | {"to": "fla"}),
        ("teacher", ["--calibrate TEXT"], {"keep": "25%", "calibration_tokens": 2048}),
    ):
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(ValueError) as error:
            convert_checkpoint(tmp_path / source, tmp_path / "out", **more)
        assert all(word in str(error.value) for word in words), error.value
        assert sorted(path.name for path in tmp_path.iterdir()) == before
