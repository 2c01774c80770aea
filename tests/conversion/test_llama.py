"""Llama-like transformers as hybrids: kept layers to the bit, new mixers from a useful start."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import FULL, LINEAR, SLIDING, VOCAB, redraw, tokens
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    OlmoHybridConfig,
    Qwen2Config,
    Qwen3Config,
)

from deltanet_conversion import choose_layers, convert_checkpoint, convert_from_llama


LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
TEACHERS = {
    "llama": LlamaConfig,
    "llama with tied embeddings and stretched rotation": (
        LlamaConfig, {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}
    ),
    "llama with biases": (LlamaConfig, {"attention_bias": True}),
    "mistral": (MistralConfig, {"sliding_window": None, "head_dim": 16}),
    "mistral with a window": (MistralConfig, {"sliding_window": 5}),
    "qwen2": Qwen2Config,
    "qwen2 with windows": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
}  # fmt: skip


def make_teacher(kind: str, folder, **overrides):
    entry = TEACHERS[kind]
    config_class, fields = entry if isinstance(entry, tuple) else (entry, {})
    torch.manual_seed(0)
    config = config_class(**{
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None,
    } | fields | overrides)  # fmt: skip
    teacher = redraw(AutoModelForCausalLM.from_config(config)).eval()
    teacher.save_pretrained(folder)
    return teacher


@pytest.mark.parametrize("kind", TEACHERS)
@torch.no_grad()
def test_with_every_layer_kept_the_student_is_the_teacher(tmp_path, kind):
    """A converted model would be worse than its teacher before a single layer was exchanged."""
    teacher = make_teacher(kind, tmp_path / "teacher")
    config = convert_from_llama(tmp_path / "teacher", tmp_path / "student", keep="all")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert student.config.layer_types == config.layer_types
    assert LINEAR not in config.layer_types and (SLIDING in config.layer_types) == ("window" in kind)
    ids = tokens(2, 40)
    wanted = teacher(ids).logits
    torch.testing.assert_close(student(ids).logits, wanted, atol=1e-5, rtol=1e-5)
    assert wanted.std() > 0.5


@pytest.mark.parametrize("kind", ["llama", "qwen2 with windows", "qwen3"])
def test_what_is_kept_is_kept_to_the_bit(tmp_path, kind):
    """Embeddings, MLPs or the kept attention would be slightly off, in bf16 or after a cast."""
    make_teacher(kind, tmp_path / "teacher", dtype="bfloat16").to(torch.bfloat16).save_pretrained(tmp_path / "teacher")
    config = convert_from_llama(tmp_path / "teacher", tmp_path / "student", keep="2")
    teacher, student = (
        {name: x for file in (tmp_path / folder).glob("*.safetensors") for name, x in load_file(file).items()}
        for folder in ("teacher", "student")
    )
    assert [i for i, name in enumerate(config.layer_types) if name != LINEAR] == [2]
    for name, tensor in teacher.items():
        if ".self_attn." not in name or ".2.self_attn." in name:
            assert torch.equal(student.pop(name), tensor), name
    assert all(".linear_attn." in name for name in student)
    assert {tensor.dtype for tensor in student.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "student" / "config.json").read_text())["dtype"] == "bfloat16"


def linear_attention_of(teacher, layer: int, x: torch.Tensor) -> torch.Tensor:
    """The linear attention nearest to a teacher's softmax attention, with a step size of 1/2: `[T, D]` from `[T, D]`.

    As softmax attention does, it scores a query against all earlier keys, here by the cosine of the angle between
    them, and corrects what a key already holds. Each head's output has the size of its values.
    """
    attention, config = teacher.model.layers[layer].self_attn, teacher.config
    T, heads, d = len(x), config.num_attention_heads, attention.head_dim
    groups = heads // config.num_key_value_heads
    q, k, v = (getattr(attention, f"{name}_proj")(x).view(T, -1, d) for name in "qkv")
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    cos, sin = (y[0, :, None] for y in teacher.model.rotary_emb(x[None], torch.arange(T)[None]))
    q, k = (y * cos + torch.cat((-y[..., d // 2 :], y[..., : d // 2]), dim=-1) * sin for y in (q, k))
    outputs = []
    for head in range(heads):
        S = torch.zeros(d, d, dtype=x.dtype)
        for t in range(T):
            q_t, k_t, v_t = (
                F.normalize(q[t, head], dim=0),
                F.normalize(k[t, head // groups], dim=0),
                v[t, head // groups],
            )
            S = S + 0.5 * torch.outer(k_t, v_t - k_t @ S)
            outputs.append(q_t @ S)
    o = torch.stack(outputs).view(heads, T, d)
    W = attention.v_proj.weight * teacher.model.layers[layer].input_layernorm.weight
    size = W.square().sum(1)
    if attention.v_proj.bias is not None:
        size = size + attention.v_proj.bias.square()
    size = size.view(-1, d).mean(1).sqrt().repeat_interleave(groups)
    o = F.normalize(o, dim=-1) * d**0.5 * size[:, None, None]
    return attention.o_proj(o.transpose(0, 1).reshape(T, -1))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
@torch.no_grad()
def test_a_new_mixer_starts_as_the_nearest_linear_attention(tmp_path, kind):
    """Alignment would start from noise: heads exchanged, keys not rotated, biases or q/k norms dropped."""
    teacher = make_teacher(kind, tmp_path / "teacher")
    for layer in teacher.model.layers:
        layer.self_attn.v_proj.weight[: layer.self_attn.head_dim] *= 0.2  # heads whose values differ in size
    teacher.save_pretrained(tmp_path / "teacher")
    convert_from_llama(tmp_path / "teacher", tmp_path / "student", keep="0,2")
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).double() for name in ("teacher", "student")
    )
    x = torch.randn(20, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = student.model.rotary_emb(x[None], torch.arange(20)[None])
    got = student.model.layers[1].linear_attn(x[None], position_embeddings=positions)[0]
    wanted = linear_attention_of(teacher, 1, x)
    # What is left is SiLU on v, which is linear only near zero.
    error = (got - wanted).norm() / wanted.norm()
    assert error < 0.15, error
    without_rope = student.model.layers[1].linear_attn(
        x[None], position_embeddings=(torch.ones_like(positions[0]), torch.zeros_like(positions[1]))
    )[0]
    assert (without_rope - wanted).norm() / wanted.norm() > 0.3  # so the bound can tell


@torch.no_grad()
def test_linear_layers_without_rotation(tmp_path):
    """`--no-linear-rope` would be accepted and do nothing."""
    make_teacher("llama", tmp_path / "teacher")
    config = convert_from_llama(tmp_path / "teacher", tmp_path / "student", keep="none", linear_use_rope=False)
    assert not config.linear_use_rope and not config.uses_rope and set(config.layer_types) == {LINEAR}
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert student(tokens(1, 20)).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_a_decay_starts_open(tmp_path, kind):
    """With `--linear-decay` the student would begin by forgetting, and alignment have to undo that first."""
    make_teacher(kind, tmp_path / "teacher")
    logits = []
    for decay in (False, True):
        folder = tmp_path / f"student-{decay}"
        convert_checkpoint(tmp_path / "teacher", folder, keep="0,2", linear_use_decay=decay)
        student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert student.config.linear_use_decay == decay
        logits.append(student(tokens(2, 100)).logits)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)
    assert logits[0].std() > 0.5
    assert json.loads((folder / "conversion.json").read_text())["linear_use_decay"]


def test_a_decay_can_close(tmp_path):
    """A decay that starts open would stay so, whatever the data says."""
    make_teacher("llama", tmp_path / "teacher")
    convert_from_llama(tmp_path / "teacher", tmp_path / "student", keep="none", linear_use_decay=True)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    decay = [p for name, p in student.named_parameters() if name.endswith(("a_proj.weight", "A_log", "dt_bias"))]
    x = tokens(2, 20)
    student(x, labels=x).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in decay)


def test_a_decay_is_for_transformers_only(tmp_path):
    """`--linear-decay` would be accepted for a DeltaNet and do nothing."""
    make_teacher("llama", tmp_path / "teacher")
    convert_from_llama(tmp_path / "teacher", tmp_path / "student", keep="none")
    with pytest.raises(ValueError, match="linear_use_decay .*is for llama.*'deltanet'"):
        convert_checkpoint(tmp_path / "student", tmp_path / "fla", to="fla", linear_use_decay=True)
    all_kept = convert_from_llama(tmp_path / "teacher", tmp_path / "kept", keep="all", linear_use_decay=True)
    assert not all_kept.linear_use_decay


def test_what_an_olmo_hybrid_has_that_ours_have_not_is_named(tmp_path):
    """Its linear layers are ours: a user would take a refusal without a reason for a mistake in the command."""
    config = OlmoHybridConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        pad_token_id=None, eos_token_id=None,
    )  # fmt: skip
    olmo = AutoModelForCausalLM.from_config(config)
    olmo.save_pretrained(tmp_path / "olmo")
    with pytest.raises(ValueError, match="olmo_hybrid.*post_feedforward_layernorm.*q_norm") as error:
        convert_checkpoint(tmp_path / "olmo", tmp_path / "out")
    softmax = dict(olmo.model.layers[3].named_modules())
    named = re.findall(r"\w+_norm|post_\w+_layernorm", str(error.value))
    assert len(named) == 4 and all(name in softmax or f"self_attn.{name}" in softmax for name in named)
    assert "input_layernorm" not in softmax and softmax["self_attn.q_norm"].weight.shape == (32,)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "keep, layers",
    [
        ("all", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("none", []),
        ("0.25", [3, 7]),
        ("25%", [3, 7]),
        ("50%", [1, 3, 5, 7]),
        ("0.0", []),
        ("1.0", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("5, 2", [2, 5]),
        ("3", [3]),
    ],
)
def test_keep_names_layers(keep, layers):
    """Another layer than the one asked for would keep its attention, which decides what the student recalls."""
    assert choose_layers(keep, 8) == layers


@pytest.mark.parametrize("keep, layers, count", [("25%", 30, 7), ("25%", 6, 1), ("25%", 11, 3), ("50%", 3, 1)])
def test_a_ratio_between_two_counts_keeps_the_lesser(keep, layers, count):
    """A quarter of SmolLM2's 30 layers would be 8, of which nobody would say that they are at most a quarter."""
    assert len(choose_layers(keep, layers)) == count


@pytest.mark.parametrize("keep", ["some", "8", "-1", "1.5", "120%", "", "1,x"])
def test_keep_that_means_nothing_is_refused(keep):
    """A typing error would convert all layers, or none."""
    with pytest.raises(ValueError, match="keep must"):
        choose_layers(keep, 8)


@pytest.mark.parametrize(
    "kind, overrides, words",
    [
        ("llama", {"mlp_bias": True}, ["mlp_bias"]),
        ("llama with biases", {}, ["o_proj", "bias"]),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
    ],
)
def test_teachers_with_parts_that_we_do_not_have_are_refused(tmp_path, kind, overrides, words):
    """The part would be dropped, and no training could find out why the student is worse."""
    make_teacher(kind, tmp_path / "teacher", **overrides)
    with pytest.raises(Exception) as error:  # noqa: B017  a StrictDataclassError where the config itself says no
        convert_from_llama(tmp_path / "teacher", tmp_path / "student", keep="0.25")
    assert all(word in str(error.value) for word in words), error.value
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_keep_must_be_said(tmp_path):
    """Which layers keep softmax matters most: a silent default would be a silent loss of recall."""
    make_teacher("llama", tmp_path / "teacher")
    with pytest.raises(ValueError, match="keep"):
        convert_checkpoint(tmp_path / "teacher", tmp_path / "student")


def test_computed_tensors_of_old_llama_checkpoints_are_passed_over(tmp_path):
    """Llamas saved by Transformers before 4.32 hold the rotary frequencies, and would be refused for them."""
    make_teacher("llama", tmp_path / "teacher")
    file = tmp_path / "teacher" / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, file)
    convert_from_llama(tmp_path / "teacher", tmp_path / "student", keep="0.25")


@torch.no_grad()
def test_verify_reports_the_logits(tmp_path):
    """`--verify` would say nothing, or the difference of a model with itself."""
    make_teacher("llama", tmp_path / "teacher")
    exact = convert_checkpoint(tmp_path / "teacher", tmp_path / "all", keep="all", verify=True)["logits"]
    hybrid = convert_checkpoint(tmp_path / "teacher", tmp_path / "some", keep="0.5", verify=True)["logits"]
    assert exact["max_difference"] < 1e-5 < 0.1 < hybrid["max_difference"]
    assert exact["logit_std"] > 0.5
    assert FULL in convert_checkpoint(tmp_path / "teacher", tmp_path / "more", keep="0.5")["layer_types"]
