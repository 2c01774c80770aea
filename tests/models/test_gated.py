"""The decay of a linear layer (`linear_use_decay`, Gated DeltaNet): how it starts, in which precision it stays, and
that without it a model is what it was. What every kind of layer has to do, the other files' variant "decay" does.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import LINEAR, VARIANTS, redraw, tiny_config, tiny_model, tokens

from modeling_deltanet import DeltaNetForCausalLM


DECAY = VARIANTS["decay"]
NAMES = ("A_log", "dt_bias")


def decays(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if name.endswith(NAMES)}


def cast(model, how: str, dtype: torch.dtype, folder) -> DeltaNetForCausalLM:
    if how == "to":
        return model.to(dtype)
    if how == "method":
        return model.bfloat16() if dtype == torch.bfloat16 else model.half()
    model.save_pretrained(folder)
    return DeltaNetForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("how", ["to", "method", "loaded"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.08), (torch.float16, 0.01)])
@torch.no_grad()
def test_the_decay_stays_fp32_in_half_precision(how, dtype, tolerance, tmp_path):
    """A model cast to bf16 would forget at another rate, by what hundreds of tokens make of a rounded A."""
    model, x = tiny_model(**DECAY), tokens(2, 70)
    expected, before = model(x).logits, {name: p.clone() for name, p in decays(model).items()}
    model = cast(model, how, dtype, tmp_path)
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if name in before else dtype), name
    assert all(torch.equal(p, before[name]) for name, p in decays(model).items())
    logits = model(x).logits
    assert logits.dtype == dtype and (logits.float() - expected).norm() < tolerance * expected.norm()
    # what is saved is what is trained
    model.save_pretrained(tmp_path / "again")
    again = DeltaNetForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert again.dtype == dtype
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert p.dtype == q.dtype and torch.equal(p, q), name


def test_a_model_made_in_half_precision_has_its_decay_in_fp32():
    """Training from scratch in bf16 would round the decay, a checkpoint would not, and the two would differ."""
    model = DeltaNetForCausalLM._from_config(tiny_config(**DECAY), dtype=torch.bfloat16)
    assert {p.dtype for p in decays(model).values()} == {torch.float32} and model.dtype == torch.bfloat16
    assert {p.dtype for p in decays(model.double()).values()} == {torch.float64}
    assert {p.dtype for p in decays(model.float()).values()} == {torch.float32}
    assert {p.device.type for p in decays(model.to("meta")).values()} == {"meta"}


def assert_as_published(model):
    parameters = decays(model)
    A, dt = (torch.cat([p for name, p in parameters.items() if name.endswith(end)]).detach() for end in NAMES)
    A, dt = A.exp(), F.softplus(dt)
    assert 0 < A.min() < 4 and 12 < A.max() <= 16
    assert 1e-3 * (1 - 1e-4) <= dt.min() < 4e-3 and 0.025 < dt.max() <= 0.1 * (1 + 1e-4)
    assert abs(dt.log10().mean() + 2) < 0.25  # log-uniform: the middle is 0.01


def test_the_decay_starts_as_published(tmp_path):
    """Training from scratch would start with a memory that forgets everything, or nothing; so would the layers of a
    checkpoint that lacks their decay.
    """
    torch.manual_seed(0)
    fields = {"layer_types": [LINEAR] * 2, "linear_num_key_heads": 64, "linear_key_head_dim": 4}
    model = DeltaNetForCausalLM(tiny_config(linear_use_decay=True, linear_value_head_dim=4, **fields))
    assert_as_published(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({n: x for n, x in load_file(file).items() if not n.endswith(NAMES)}, file, metadata={"format": "pt"})
    loaded, info = DeltaNetForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == set(decays(model))
    assert_as_published(loaded)


def test_optimizers_are_told_not_to_decay_the_decay(tmp_path):
    """Weight decay would pull every head to the same rate of forgetting."""
    model = tiny_model(**DECAY)
    model.save_pretrained(tmp_path)
    for m in (model, DeltaNetForCausalLM.from_pretrained(tmp_path), model.bfloat16()):
        marked = {name for name, p in m.named_parameters() if getattr(p, "_no_weight_decay", False)}
        assert marked == set(decays(m))


@torch.no_grad()
def test_without_decay_the_memory_is_the_plain_one():
    """A model whose gates are open would not be the plain DeltaNet, from which conversions start."""
    x, mask = tokens(2, 70), torch.ones(2, 70, dtype=torch.long)
    mask[0, :9] = 0
    plain = tiny_model(**DECAY | {"linear_use_decay": False})
    gated = tiny_model(**DECAY)
    missing, unexpected = gated.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(name.endswith((*NAMES, "a_proj.weight")) for name in missing)
    expected = plain(x, attention_mask=mask).logits
    for name, p in decays(gated).items():
        p.fill_(-40.0 if name.endswith("A_log") else 0.0)
    torch.testing.assert_close(gated(x, attention_mask=mask).logits, expected, atol=0, rtol=0)
    redraw(gated)
    gated.load_state_dict(plain.state_dict(), strict=False)
    assert (gated(x, attention_mask=mask).logits - expected).abs().max() > 0.1  # so that the comparison can tell


@torch.no_grad()
def test_padding_lets_nothing_decay():
    """What a prompt has said would fade by the padding of the batch that it is answered in."""
    model, x = tiny_model(**DECAY, layer_types=[LINEAR] * 2), tokens(1, 12)
    padded = torch.cat((x[:, :6], torch.zeros(1, 40, dtype=torch.long), x[:, 6:]), dim=1)
    mask = (padded != 0).long()
    outputs, expected = model(padded, attention_mask=mask), model(x)
    torch.testing.assert_close(outputs.logits[mask.bool()], expected.logits[0], atol=1e-5, rtol=1e-5)
    for i in range(2):
        state, wanted = (y.past_key_values.get_recurrent_state(i) for y in (outputs, expected))
        torch.testing.assert_close(state, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_gate_comes_after_the_norm():
    """A checkpoint of fla's would compute something else: there are published layers of either order."""
    model = tiny_model(**DECAY, layer_types=[LINEAR]).double()
    mixer, seen = model.model.layers[0].linear_attn, {}
    for name in ("o_norm", "g_proj", "o_proj"):
        getattr(mixer, name).register_forward_hook(lambda _, args, y, name=name: seen.update({name: (args[0], y)}))
    model(tokens(2, 20))
    o, gate = seen["o_norm"][0], seen["g_proj"][1].unflatten(-1, (4, 16))
    rstd = (o.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).rsqrt()
    expected = o * rstd * mixer.o_norm.weight * gate * gate.sigmoid()
    torch.testing.assert_close(seen["o_proj"][0], expected.flatten(-2), atol=1e-12, rtol=1e-12)


def test_a_plain_model_is_what_it_was(tmp_path):
    """Checkpoints and configs of the plain DeltaNet would change, and older versions would not read them."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert "linear_use_decay" not in json.loads((tmp_path / "config.json").read_text())
    assert not any("a_proj" in name or name.endswith(NAMES) for name in model.state_dict())
    assert not any("a_proj" in rule or rule.endswith(NAMES) for rule in model.config.base_model_tp_plan)
