"""fla's DeltaNet checkpoints and ours: round trips without fla; on a GPU with fla, `benchmarks/fla_parity.py`."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import FULL, LINEAR, SLIDING, VARIANTS, tiny_config, tiny_model

from deltanet_conversion import Checkpoint, convert_from_fla, convert_to_fla
from deltanet_conversion.checkpoint import expected_tensors
from deltanet_conversion.fla import config_from_fla, config_to_fla, fla_name
from modeling_deltanet import DeltaNetConfig


PURE = {"layer_types": [LINEAR] * 2}
DECAY = VARIANTS["decay"]
CASES = {
    "pure": PURE,
    "narrow heads": PURE | {"linear_num_key_heads": 4},
    "wide values": PURE | {"linear_key_head_dim": 8, "linear_value_head_dim": 32},
    "gate": PURE | {"linear_use_output_gate": True},
    "decay": PURE | DECAY,
    "decay, no output gate, no convolution": PURE
    | {
        "linear_use_decay": True,
        "linear_conv_kernel_dim": None,
        "linear_key_head_dim": 11,
        "linear_value_head_dim": 15,  # int(11 * (15 / 11)) is 14
    },
    "decay, sliding attention": DECAY | {"layer_types": [LINEAR, SLIDING, LINEAR], "tie_word_embeddings": True},
    "negative eigenvalues": PURE | {"linear_allow_neg_eigval": True},
    "sum norm": PURE | {"linear_qk_activation": "elu", "linear_qk_norm": "sum"},
    "relu": PURE | {"linear_qk_activation": "relu"},
    "identity": PURE | {"linear_qk_activation": "identity"},
    "fixed beta, no convolution": PURE | {"linear_use_beta": False, "linear_conv_kernel_dim": None},
    "tied": PURE | {"tie_word_embeddings": True},
    "full attention": {"layer_types": [LINEAR, FULL], "num_key_value_heads": 4, "attention_bias": True},
    "sliding attention, grouped heads": {"layer_types": [LINEAR, SLIDING, LINEAR], "num_key_value_heads": 1},
    "both": {"layer_types": [SLIDING, LINEAR, FULL], "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
}
cases = pytest.mark.parametrize("case", CASES)


def all_tensors(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def saved(folder, dtype=torch.float32, max_shard_size="5GB", **fields):
    model = tiny_model(**fields).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def assert_same_bits(one, other):
    one, other = all_tensors(one), all_tensors(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


@cases
@pytest.mark.parametrize("dtype, max_shard_size", [(torch.float32, "5GB"), (torch.bfloat16, "10KB")])
def test_a_round_trip_is_exact_to_the_bit(tmp_path, case, dtype, max_shard_size):
    """A checkpoint that went to fla and back would not be the one that was trained."""
    model = saved(tmp_path / "ours", dtype, max_shard_size, **CASES[case])
    theirs = convert_to_fla(tmp_path / "ours", tmp_path / "fla")
    assert not any(
        part in name for name in all_tensors(tmp_path / "fla") for part in ("linear_attn", "self_attn", "layernorm")
    )
    config = convert_from_fla(tmp_path / "fla", tmp_path / "back")
    assert_same_bits(tmp_path / "ours", tmp_path / "back")
    ours, back = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("ours", "back"))
    assert (tmp_path / "fla" / "model.safetensors.index.json").exists() == (max_shard_size == "10KB")
    if set(config.layer_types) == {LINEAR}:  # fla knows nothing of softmax layers that are not there
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim"):
            del ours[name], back[name]
    assert ours == back
    assert theirs["model_type"] == ("gated_deltanet" if model.config.linear_use_decay else "delta_net")


def test_the_published_size_has_the_published_tensors():
    """The 1.3B checkpoint would be refused, or written under names that fla does not read."""
    shapes = {fla_name(name): shape for name, shape in expected_tensors(DeltaNetConfig.preset("1.3B")).items()}
    assert len(shapes) == 339
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 1_365_677_056
    layer = {name.removeprefix("model.layers.7."): shape for name, shape in shapes.items() if ".layers.7." in name}
    H, I, heads = 2048, 5632, 16
    assert layer == {
        "attn_norm.weight": (H,),
        "mlp_norm.weight": (H,),
        "attn.q_proj.weight": (H, H),
        "attn.k_proj.weight": (H, H),
        "attn.v_proj.weight": (H, H),
        "attn.b_proj.weight": (heads, H),
        "attn.o_proj.weight": (H, H),
        "attn.q_conv1d.weight": (H, 1, 4),
        "attn.k_conv1d.weight": (H, 1, 4),
        "attn.v_conv1d.weight": (H, 1, 4),
        "attn.o_norm.weight": (128,),
        "mlp.gate_proj.weight": (I, H),
        "mlp.up_proj.weight": (I, H),
        "mlp.down_proj.weight": (H, I),
    }
    assert shapes["model.embeddings.weight"] == shapes["lm_head.weight"] == (32000, H)


def test_fields_that_a_config_leaves_out_have_flas_defaults():
    """An old config.json names few fields; another guess would give a model of another size."""
    config = config_from_fla({"model_type": "delta_net", "num_heads": 16, "transformers_version": "4.40.0"})
    assert config.to_diff_dict() == DeltaNetConfig.preset("1.3B", architectures=config.architectures).to_diff_dict()
    odd = config_from_fla({"model_type": "delta_net", "hidden_size": 1000, "num_heads": 8, "hidden_ratio": 3})
    assert odd.intermediate_size == 2048  # int(1000 * 3 * 2 / 3) = 2000, to the next multiple of 256
    assert config_from_fla({"model_type": "delta_net", "use_short_conv": False}).linear_conv_kernel_dim is None


def test_fields_that_a_gated_config_leaves_out_have_flas_defaults():
    """As above, where fla's defaults are others: the output gate is on, and a value head twice a key head."""
    config = config_from_fla({"model_type": "gated_deltanet"})
    heads = {"linear_num_key_heads": 6, "linear_key_head_dim": 256, "linear_value_head_dim": 512}
    preset = DeltaNetConfig.preset("1.3B-gated", **heads, architectures=config.architectures)
    softmax = {"num_attention_heads", "num_key_value_heads", "head_dim"}  # of layers that are not there
    ours, wanted = ({n: x for n, x in c.to_dict().items() if n not in softmax} for c in (config, preset))
    assert ours == wanted
    grouped = config_from_fla({"model_type": "gated_deltanet", "num_heads": 4, "num_v_heads": 8, "expand_v": 0.5})
    assert (grouped.linear_num_value_heads, grouped.linear_value_head_dim) == (8, 128)
    assert not config_from_fla({"model_type": "gated_deltanet", "use_gate": False}).linear_use_output_gate


def test_a_gated_layer_has_flas_tensors():
    """The checkpoint would be refused, or written under names that fla does not read."""
    config = DeltaNetConfig.preset("1.3B-gated", num_hidden_layers=1)
    layer = {
        fla_name(name).removeprefix("model.layers.0.attn."): shape
        for name, shape in expected_tensors(config).items()
        if ".linear_attn." in name
    }
    H, keys, values, heads = 2048, 1536, 3072, 12
    assert layer == {
        "q_proj.weight": (keys, H),
        "k_proj.weight": (keys, H),
        "v_proj.weight": (values, H),
        "a_proj.weight": (heads, H),
        "b_proj.weight": (heads, H),
        "g_proj.weight": (values, H),
        "o_proj.weight": (H, values),
        "A_log": (heads,),
        "dt_bias": (heads,),
        "q_conv1d.weight": (keys, 1, 4),
        "k_conv1d.weight": (keys, 1, 4),
        "v_conv1d.weight": (values, 1, 4),
        "o_norm.weight": (256,),
    }


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_cast_leaves_the_decay_as_wide_as_it_was(tmp_path, stored):
    """`--dtype bfloat16` would change how long every head remembers."""
    model = saved(tmp_path / "ours", **CASES["decay"])
    tensors = {n: x.to(stored) for n, x in load_file(tmp_path / "ours" / "model.safetensors").items()}
    save_file(tensors, tmp_path / "ours" / "model.safetensors", metadata={"format": "pt"})
    convert_to_fla(tmp_path / "ours", tmp_path / "fla", dtype=torch.bfloat16)
    convert_from_fla(tmp_path / "fla", tmp_path / "back", dtype=torch.float16)
    for name, tensor in all_tensors(tmp_path / "back").items():
        kept = name.endswith(("A_log", "dt_bias"))
        assert tensor.dtype == (torch.float32 if kept else torch.float16), name
        assert not kept or torch.equal(tensor, model.state_dict()[name].to(stored).float()), name


def test_softmax_layers_as_a_dict_and_as_a_list():
    """fla takes both forms; a hybrid in the other one would lose its softmax layers."""
    spec = {"layers": [1], "num_heads": 16, "num_kv_heads": 4, "window_size": 64, "rope_theta": 500.0}
    plain = {"model_type": "delta_net", "num_hidden_layers": 4}
    as_dict = config_from_fla(plain | {"attn": spec})
    assert as_dict.layer_types == [LINEAR, SLIDING, LINEAR, LINEAR]
    assert (as_dict.sliding_window, as_dict.num_key_value_heads, as_dict.rope_parameters["rope_theta"]) == (
        64,
        4,
        500.0,
    )
    assert config_from_fla(plain | {"attn": [spec]}).to_diff_dict() == as_dict.to_diff_dict()
    both = config_from_fla(plain | {"attn": [spec, spec | {"layers": [3], "window_size": None}]})
    assert both.layer_types == [LINEAR, SLIDING, LINEAR, FULL]
    assert config_from_fla(plain | {"attn": {"layers": [0], "num_heads": 8}}).num_key_value_heads == 8


def test_old_checkpoints_with_one_tensor_for_gate_and_up(tmp_path):
    """Checkpoints from before February 2025 would not load, or with gate and up exchanged."""
    saved(tmp_path / "ours", **CASES["both"])
    convert_to_fla(tmp_path / "ours", tmp_path / "fla")
    tensors = load_file(tmp_path / "fla" / "model.safetensors")
    for name in [name for name in tensors if ".gate_proj." in name]:
        tensors[name] = torch.cat((tensors[name], tensors.pop(name.replace("gate_proj", "up_proj"))))
    save_file(tensors, tmp_path / "fla" / "model.safetensors")
    convert_from_fla(tmp_path / "fla", tmp_path / "back")
    assert_same_bits(tmp_path / "ours", tmp_path / "back")


def test_old_checkpoints_with_norms_inside(tmp_path):
    """Checkpoints with `norm_first` would be refused."""
    saved(tmp_path / "ours", **CASES["both"])
    convert_to_fla(tmp_path / "ours", tmp_path / "fla")
    tensors = load_file(tmp_path / "fla" / "model.safetensors")
    tensors = {
        name.replace("attn_norm.", "attn.norm.").replace("mlp_norm.", "mlp.norm."): x for name, x in tensors.items()
    }
    save_file(tensors, tmp_path / "fla" / "model.safetensors")
    change_config(tmp_path / "fla", norm_first=True)
    convert_from_fla(tmp_path / "fla", tmp_path / "back")
    assert_same_bits(tmp_path / "ours", tmp_path / "back")


def test_norms_of_a_softmax_layers_queries_and_keys_are_read_from_the_tensors(tmp_path, caplog):
    """fla's config does not mention them: they would be refused as unknown tensors."""
    saved(tmp_path / "ours", **CASES["both"])
    convert_to_fla(tmp_path / "ours", tmp_path / "fla")
    tensors = load_file(tmp_path / "fla" / "model.safetensors")
    norms = {f"model.layers.{i}.attn.{name}_norm.weight": torch.rand(8) for i in (0, 2) for name in "qk"}
    save_file(tensors | norms, tmp_path / "fla" / "model.safetensors")
    assert convert_from_fla(tmp_path / "fla", tmp_path / "back").use_qk_norm
    assert "1e-5" in caplog.text
    back = all_tensors(tmp_path / "back")
    for name, norm in norms.items():
        assert torch.equal(back[name.replace(".attn.", ".self_attn.")], norm)


def test_a_head_that_is_the_embeddings_may_be_written_out(tmp_path):
    """A tied checkpoint that stores its head twice would be refused for a tensor too many."""
    saved(tmp_path / "ours", **CASES["tied"])
    convert_to_fla(tmp_path / "ours", tmp_path / "fla")
    tensors = load_file(tmp_path / "fla" / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embeddings.weight"].clone()},
        tmp_path / "fla" / "model.safetensors",
    )
    convert_from_fla(tmp_path / "fla", tmp_path / "back")
    assert_same_bits(tmp_path / "ours", tmp_path / "back")


def test_casting_and_shard_size(tmp_path):
    """`--dtype` and `--max-shard-size` would be accepted and do nothing."""
    saved(tmp_path / "ours", **CASES["pure"])
    convert_to_fla(tmp_path / "ours", tmp_path / "fla", dtype=torch.bfloat16, max_shard_size=8_000)
    files = list((tmp_path / "fla").glob("*.safetensors"))
    assert len(files) > 3
    for file in files:
        with safe_open(file, "pt") as weights:
            tensors = [weights.get_tensor(name) for name in weights.keys()]  # noqa: SIM118
        assert {x.dtype for x in tensors} == {torch.bfloat16}
        assert len(tensors) == 1 or sum(x.nbytes for x in tensors) <= 8_000
    assert json.loads((tmp_path / "fla" / "config.json").read_text())["dtype"] == "bfloat16"
    assert Checkpoint(tmp_path / "fla").tensors["model.norm.weight"].dtype == "BF16"


def change_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


UNKNOWN_TO_US = {
    "another architecture": ({"model_type": "gla"}, ["gla", "delta_net"]),
    "another output gate": (
        {"output_gate_activation": "sigmoid"}, ["output_gate_activation", "sigmoid", "swish"]
    ),
    "another activation": ({"hidden_act": "powlu"}, ["hidden_act", "powlu", "swish"]),
    "residual attention": ({"attnres_block_size": 4}, ["attnres_block_size", "4"]),
    "a field that nobody knows": ({"use_magic": True}, ["use_magic", "True"]),
    "softmax layers that differ": (
        {"attn": [{"layers": [0], "num_heads": 4}, {"layers": [1], "num_heads": 2}]}, ["num_attention_heads", "4", "2"]
    ),
    "a softmax layer that is not there": ({"attn": {"layers": [9], "num_heads": 4}}, ["9", "2"]),
    "an unknown field of a softmax layer": ({"attn": {"layers": [0], "num_heads": 4, "bias": 1}}, ["bias"]),
}  # fmt: skip


@pytest.mark.parametrize("fields, words", UNKNOWN_TO_US.values(), ids=UNKNOWN_TO_US)
def test_what_ours_does_not_compute_is_refused(tmp_path, fields, words):
    """A model that computes something else would be converted, and be wrong without a word."""
    saved(tmp_path / "ours", **CASES["decay" if "output_gate_activation" in fields else "pure"])
    convert_to_fla(tmp_path / "ours", tmp_path / "fla")
    change_config(tmp_path / "fla", **fields)
    with pytest.raises(ValueError) as error:
        convert_from_fla(tmp_path / "fla", tmp_path / "back")
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"linear_num_value_heads": 4, "linear_value_head_dim": 16},
        {"layer_types": [LINEAR, FULL], "use_qk_norm": True},
        {"layer_types": [LINEAR, FULL], "rope_parameters": {"rope_theta": None}},
        {"layer_types": [LINEAR, FULL], "attention_out_bias": True},
        {"layer_types": [LINEAR, FULL], "head_dim": 16},
        {"linear_use_rope": True, "head_dim": 16},
        {"linear_attention_bias": True},
        {"hidden_act": "gelu"},
        {"linear_use_delta_rule": False},
        {"linear_use_decay": True, "linear_use_beta": False},
        {"linear_use_decay": True, "linear_qk_activation": "relu"},
        {"linear_use_decay": True, "linear_qk_norm": "sum", "linear_qk_activation": "elu"},
    ],
)
def test_what_fla_does_not_compute_is_refused(fields):
    """fla would build another model from the config, or drop weights when it loads."""
    fields = PURE | fields
    with pytest.raises(ValueError) as error:
        config_to_fla(tiny_config(**fields))
    names = [
        name
        for name in fields
        if name not in ("layer_types", "linear_value_head_dim", "linear_use_decay") or len(fields) == 1
    ]
    assert any(name in str(error.value) for name in names), error.value
