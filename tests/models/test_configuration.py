"""DeltaNetConfig: what it accepts, what it derives, and what it refuses with which words."""

import copy
import dataclasses
import importlib.util
import inspect
import json
import logging
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny import FULL, LINEAR, SLIDING, VARIANTS, marks_for_remote_code_undone, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils.logging import warning_once

import modeling_deltanet
from modeling_deltanet import DeltaNetConfig, DeltaNetForCausalLM, DeltaNetModel


def test_round_trip(tmp_path):
    """A saved configuration would come back as another model."""
    config = tiny_config(linear_use_output_gate=True, linear_value_head_dim=24, use_qk_norm=True)
    config.save_pretrained(tmp_path)
    for loaded in (DeltaNetConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is DeltaNetConfig
        # name_or_path is where it came from
        assert {**loaded.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
        assert loaded.uses_rope


def test_round_trip_of_a_model_without_softmax_layers(tmp_path):
    """The defaults of a pure DeltaNet would contradict themselves when they are read back."""
    DeltaNetConfig().save_pretrained(tmp_path)
    loaded = DeltaNetConfig.from_pretrained(tmp_path)
    assert loaded.layer_types == [LINEAR] * 24 and loaded.sliding_window is None and not loaded.uses_rope


def test_no_rope_survives_a_round_trip(tmp_path):
    """A model without positions would rotate its queries after it is reloaded."""
    tiny_config(rope_parameters={"rope_theta": None}).save_pretrained(tmp_path)
    assert not DeltaNetConfig.from_pretrained(tmp_path).uses_rope


@pytest.mark.parametrize(
    "size, parameters",
    [("1.3B", 1_365_677_056), ("340M", 374_362_112), ("0.4B-gated", 565_989_830), ("1.3B-gated", 1_387_859_704)],
)
def test_presets_have_the_published_size(size, parameters):
    """A user who asks for the published model would get another one (weights of it would not load)."""
    with torch.device("meta"):
        model = DeltaNetForCausalLM(DeltaNetConfig.preset(size))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_sliding_hybrid_in_one_call():
    """The paper's hybrid would have its windows in the wrong layers."""
    config = DeltaNetConfig.preset("1.3B", hybrid="sliding")
    assert config.layer_types == [LINEAR, SLIDING] * 12
    assert config.sliding_window == 2048
    assert DeltaNetConfig.preset("340M", hybrid="sliding", sliding_window=64).sliding_window == 64


def test_global_hybrid_in_one_call():
    """The paper's hybrid would have its full attention in the wrong layers."""
    config = DeltaNetConfig.preset("340M", hybrid="global")
    assert [i for i, name in enumerate(config.layer_types) if name != LINEAR] == [1, 12]
    assert config.layer_types[1] == config.layer_types[12] == FULL
    assert DeltaNetConfig.preset("340M", hybrid="global", num_hidden_layers=6).layer_types == [
        LINEAR, FULL, LINEAR, FULL, LINEAR, LINEAR,
    ]  # fmt: skip


def test_unknown_preset_and_hybrid_are_named():
    """A misspelt preset would give a KeyError that lists nothing."""
    with pytest.raises(ValueError, match="'7B'.*340M, 1.3B"):
        DeltaNetConfig.preset("7B")
    with pytest.raises(ValueError, match="'slide'.*sliding, global"):
        DeltaNetConfig.preset("340M", hybrid="slide")


CONTRADICTIONS = {
    "linear heads do not divide the width": (
        {"linear_num_key_heads": 3}, ["hidden_size", "32", "linear_num_key_heads", "3"]
    ),
    "linear value heads do not divide the width": (
        {"linear_num_key_heads": 2, "linear_num_value_heads": 6}, ["hidden_size", "32", "linear_num_value_heads", "6"]
    ),
    "softmax heads do not divide the width": (
        {"num_attention_heads": 5, "num_key_value_heads": 5}, ["hidden_size", "32", "num_attention_heads", "5"]
    ),
    "no heads": ({"num_attention_heads": 0}, ["num_attention_heads", "0"]),
    "no layers": ({"layer_types": [], "num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
    "a head of no size": ({"linear_key_head_dim": 0}, ["linear_key_head_dim", "0"]),
    "value heads no multiple of key heads": (
        {"linear_num_key_heads": 4, "linear_num_value_heads": 6, "linear_value_head_dim": 8},
        ["linear_num_value_heads", "6", "linear_num_key_heads", "4"],
    ),
    "query heads no multiple of key-value heads": (
        {"num_key_value_heads": 3}, ["num_attention_heads", "4", "num_key_value_heads", "3"]
    ),
    "layer_types of another length": (
        {"num_hidden_layers": 3}, ["layer_types", "4", "num_hidden_layers", "3"]
    ),
    "a layer type that only other models have": (
        {"layer_types": [LINEAR, "conv"]}, ["layer_types", "conv", LINEAR, SLIDING, FULL]
    ),
    "a layer type that nobody has": ({"layer_types": [LINEAR, "linear"]}, ["layer_types", "linear"]),
    "sliding layers without a window": (
        {"layer_types": [LINEAR, SLIDING], "sliding_window": None}, ["sliding_attention", "sliding_window", "None"]
    ),
    "a window without sliding layers": (
        {"layer_types": [LINEAR, FULL], "sliding_window": 7}, ["sliding_window", "7", "sliding_attention"]
    ),
    "a window of nothing": ({"sliding_window": 0}, ["sliding_window", "0"]),
    "a window of one token, which a cache would not keep to": ({"sliding_window": 1}, ["sliding_window", "2", "1"]),
    "a convolution of one tap": ({"linear_conv_kernel_dim": 1}, ["linear_conv_kernel_dim", "1"]),
    "sum norm with SiLU": ({"linear_qk_norm": "sum"}, ["linear_qk_norm", "sum", "linear_qk_activation", "silu"]),
    "sum norm with identity": (
        {"linear_qk_norm": "sum", "linear_qk_activation": "identity"}, ["linear_qk_norm", "sum", "identity"]
    ),
    "negative eigenvalues without beta": (
        {"linear_allow_neg_eigval": True, "linear_use_beta": False},
        ["linear_allow_neg_eigval", "True", "linear_use_beta", "False"],
    ),
    "negative eigenvalues without the delta rule": (
        {"linear_allow_neg_eigval": True, "linear_use_delta_rule": False},
        ["linear_allow_neg_eigval", "True", "linear_use_delta_rule", "False"],
    ),
    "a decay without the delta rule": (
        {"linear_use_decay": True, "linear_use_delta_rule": False},
        ["linear_use_decay", "True", "linear_use_delta_rule", "False"],
    ),
    "linear layers rotate by nothing": (
        {"linear_use_rope": True, "head_dim": 16, "rope_parameters": {"rope_theta": None}},
        ["linear_use_rope", "True", "rope_theta"],
    ),
    "linear heads of another size than the rotary embedding": (
        {"linear_use_rope": True, "linear_key_head_dim": 16}, ["linear_key_head_dim", "16", "head_dim", "8"]
    ),
    "an odd head with rotary embedding": ({"head_dim": 7}, ["head_dim", "7", "rotary"]),
    "a partly rotated head": ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
    "a rotary embedding for each layer type": (
        {"rope_parameters": {SLIDING: {"rope_theta": 1e3, "rope_type": "default"}}},
        ["rope_parameters", SLIDING, "1000"]
    ),
    "an unknown rotary embedding": ({"rope_parameters": {"rope_type": "linaer"}}, ["rope_type", "linaer", "linear"]),
    "an unknown activation": ({"hidden_act": "swoosh"}, ["hidden_act", "swoosh", "silu"]),
    "an unknown feature map": ({"linear_qk_activation": "gelu"}, ["linear_qk_activation", "gelu"]),
    "an unknown norm": ({"linear_qk_norm": "rms"}, ["linear_qk_norm", "rms"]),
    "a size that is no integer": ({"linear_num_key_heads": "2"}, ["linear_num_key_heads", "2"]),
}  # fmt: skip


@pytest.mark.parametrize("fields, words", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictions_are_refused_with_both_values(fields, words):
    """A contradictory model would be built, or fail later at a tensor shape that says nothing."""
    with pytest.raises((ValueError, StrictDataclassError)) as error:
        tiny_config(**fields)
    for word in words:
        assert word in str(error.value)


def test_an_odd_head_without_rope_is_fine():
    """A check that is too strict would refuse a model that works."""
    assert tiny_config(head_dim=7, rope_parameters={"rope_theta": None}).head_dim == 7
    assert tiny_config(head_dim=7, layer_types=[LINEAR]).head_dim == 7


def test_unknown_field_is_refused_with_a_hint():
    """A misspelt field would be ignored and the default trained instead."""
    with pytest.raises(ValueError, match="'linear_num_heads' .got 4.; did you mean 'linear_num_.*heads'"):
        tiny_config(linear_num_heads=4)
    with pytest.raises(ValueError, match="no field 'n_experts'"):
        tiny_config(n_experts=8)


def write_config_json(folder, **changes):
    tiny_model().save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def from_json_file(folder):
    return DeltaNetConfig.from_json_file(folder / "config.json")


@pytest.mark.parametrize("load", [AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize(
    "changes, words",
    [
        ({"to_dict": 2}, ["to_dict", "2"]),
        ({"num_hidden_layers": 3}, ["layer_types", "4", "num_hidden_layers", "3"]),
        ({"linear_num_value_heads": 3}, ["linear_num_value_heads", "3", "linear_num_key_heads", "2"]),
        ({"sliding_window": None}, ["sliding_window", "None", "sliding_attention"]),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_bad_config_json_is_refused(tmp_path, load, changes, words):
    """An edited config.json would load as a model that its author did not mean."""
    write_config_json(tmp_path, **changes)
    with pytest.raises((ValueError, StrictDataclassError)) as error:
        load(tmp_path)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("load", [DeltaNetConfig.from_pretrained, AutoConfig.from_pretrained, from_json_file])
def test_fields_that_another_tool_wrote_are_kept(tmp_path, load, caplog):
    """A model that Unsloth, or a later Transformers, has saved could not be loaded, or would lose what they wrote."""
    write_config_json(tmp_path, unsloth_version="2026.1", linear_num_haeds=2)
    warning_once.cache_clear()
    for _ in range(2):
        config = load(tmp_path)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    for word in ("'unsloth_version' ('2026.1')", "'linear_num_haeds' (2; did you mean 'linear_num_", "keeps"):
        assert word in warning
    config.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config.unsloth_version == saved["unsloth_version"] == "2026.1" and saved["linear_num_haeds"] == 2
    assert not [name for name in saved if "foreign" in name]


def test_a_field_set_on_a_config_is_saved_and_loaded(tmp_path):
    """Transformers' own common tests set a field, save the model and load it: they failed for this family."""
    model = tiny_model()
    model.config.some_field = 3
    model.save_pretrained(tmp_path)
    assert DeltaNetForCausalLM.from_pretrained(tmp_path).config.some_field == 3


def test_an_override_of_a_field_that_does_not_exist_is_refused(tmp_path):
    """A misspelt argument of `from_pretrained` would pass for a field of the file."""
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="linear_num_haeds"):
        AutoModelForCausalLM.from_pretrained(tmp_path, linear_num_haeds=2)


def test_a_saved_config_has_an_auto_map_only_as_remote_code(tmp_path):
    """An empty `auto_map` in each config.json would look like remote code."""
    config = tiny_config()
    assert config.auto_map == {} and "auto_map" not in config.to_dict()
    with marks_for_remote_code_undone():
        DeltaNetConfig._auto_class = None  # as in a process that has published nothing
        config.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    config.auto_map["AutoConfig"] = "here.There"
    assert copy.deepcopy(config).to_dict()["auto_map"] == {"AutoConfig": "here.There"}
    assert tiny_config().auto_map == {}


@pytest.mark.parametrize(
    "override, words",
    [
        ({"num_hidden_layers": 3}, ["num_hidden_layers", "3", "layer_types", "4"]),
        ({"sliding_window": None}, ["sliding_window", "None"]),
        ({"linear_qk_norm": "sum"}, ["linear_qk_norm", "sum", "silu"]),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_an_override_into_a_contradiction_is_refused(tmp_path, override, words):
    """`from_pretrained(..., num_hidden_layers=3)` would quietly drop a layer and keep the rest of the pattern."""
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises((ValueError, StrictDataclassError)) as error:
        AutoModelForCausalLM.from_pretrained(tmp_path, **override)
    for word in words:
        assert word in str(error.value)


def test_an_override_that_fits_is_taken(tmp_path):
    """A user could not change the window at load time."""
    tiny_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, sliding_window=3)
    assert model.model.layers[1].self_attn.sliding_window == 3


# Another value for every field, and what it may be compared on: the logits of a random input unless said otherwise.
OTHER_VALUES = {
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": {"num_hidden_layers": 5, "layer_types": [LINEAR, SLIDING, LINEAR, FULL, LINEAR]},
    "layer_types": {"layer_types": [LINEAR, SLIDING, FULL, LINEAR]},
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
    "linear_qk_activation": "elu",
    "linear_qk_norm": {"linear_qk_norm": "sum", "linear_qk_activation": "relu"},
    "linear_use_beta": False,
    "linear_allow_neg_eigval": True,
    "linear_use_delta_rule": False,
    "linear_use_decay": True,
    "linear_use_output_gate": True,
    "linear_attention_bias": True,
    "linear_use_rope": {"linear_use_rope": True, "head_dim": 16},
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "sliding_window": 3,
    "rope_parameters": {"rope_parameters": {"rope_theta": 100.0}},
    "use_qk_norm": True,
    "attention_bias": True,
    "attention_out_bias": True,
    "attention_dropout": 0.9,
    "max_position_embeddings": {
        "max_position_embeddings": 8,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    },
    "hidden_act": "gelu",
    "rms_norm_eps": 0.5,
    "initializer_range": 0.5,
    "use_cache": False,
    "tie_word_embeddings": True,
    "pad_token_id": 3,
}
# What a value needs beside it belongs to the baseline as well: "sum" another feature map than the default.
BASELINES = {
    "linear_qk_norm": {"linear_qk_activation": "relu"},
    "linear_use_rope": {"head_dim": 16},
    "max_position_embeddings": {"rope_parameters": OTHER_VALUES["max_position_embeddings"]["rope_parameters"]},
}
# Read by Transformers, not by the model: `generate` stops at eos and begins with bos.
READ_BY_GENERATION = {"bos_token_id", "eos_token_id"}


def own_fields() -> set[str]:
    return {name for name in DeltaNetConfig.__annotations__ if name != "model_type"}


def test_every_field_is_in_the_table_below():
    """A new field would escape the test that it is read."""
    assert own_fields() - READ_BY_GENERATION == set(OTHER_VALUES)


@pytest.mark.parametrize("field", OTHER_VALUES)
def test_every_field_is_read(field):
    """A setting would be accepted, saved and have no effect."""

    def fingerprint(**overrides):
        torch.manual_seed(0)
        config = tiny_config(**overrides)
        model = DeltaNetForCausalLM(config)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        with torch.no_grad():
            drawn = model.lm_head.weight.std().item()
            generator = torch.Generator().manual_seed(0)
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
            model.train()
            torch.manual_seed(0)
            outputs = model(torch.arange(2, 26).unsqueeze(0))
        return shapes, model.model.embed_tokens.padding_idx, round(drawn, 2), outputs

    other = OTHER_VALUES[field]
    baseline = fingerprint(**BASELINES.get(field, {}))
    changed = fingerprint(**(other if isinstance(other, dict) else {field: other}))
    assert (
        baseline[:3] != changed[:3]
        or (baseline[3].past_key_values is None) != (changed[3].past_key_values is None)
        or (baseline[3].logits - changed[3].logits).abs().max() > 1e-3
    )


def test_generation_starts_and_stops_at_the_configured_tokens():
    """`generate` would run past the end-of-sequence token that the configuration names."""
    model = tiny_model(bos_token_id=5, eos_token_id=7)
    assert model.generation_config.bos_token_id == 5 and model.generation_config.eos_token_id == 7


def test_every_public_name_is_documented():
    """`help(...)` would have nothing to say."""
    for name in modeling_deltanet.__all__:
        assert inspect.getdoc(getattr(modeling_deltanet, name)), name
    documented = set(re.findall(r"^\s+(\w+) \(`", DeltaNetConfig.__doc__, flags=re.MULTILINE))
    assert own_fields() - documented <= {"pad_token_id", "bos_token_id", "eos_token_id"}


def test_a_config_changed_after_it_was_made_is_checked_again():
    """`config.num_hidden_layers = 2` before the model is made would build a model that contradicts its config."""
    config = tiny_config()
    with pytest.raises(StrictDataclassError, match="layer_types"):
        config.num_hidden_layers = 2
        DeltaNetModel(config)


def test_the_configuration_for_vllm_is_the_same():
    """vLLM's environment cannot import this package: its copy of a field or a default, once it is another, would serve
    another model without a word.
    """
    file = Path(__file__).parents[2] / "serving" / "vllm_deltanet" / "vllm_deltanet" / "configuration.py"
    spec = importlib.util.spec_from_file_location("configuration_for_vllm", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ours, theirs = (
        {f.name: f.default for f in dataclasses.fields(x)} for x in (DeltaNetConfig, module.DeltaNetConfig)
    )
    assert ours == theirs

    def values(config) -> dict:
        own = ours.keys() - {f.name for f in dataclasses.fields(PreTrainedConfig)} | {"tie_word_embeddings"}
        return {name: getattr(config, name) for name in (*own, "uses_rope")}

    pairs = [(DeltaNetConfig(), module.DeltaNetConfig())]  # sizes that are worked out
    configs = [tiny_config(**options) for options in VARIANTS.values()]
    pairs += [(config, module.DeltaNetConfig.from_dict(config.to_dict())) for config in configs]
    for config, copied in pairs:
        assert values(config) == values(copied)
