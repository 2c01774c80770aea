"""`deltanet export`: what the folder holds, which tests/serving runs, and what is refused before it is made."""

import ast
import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_llama import make_teacher
from tiny import FULL, LINEAR, tiny_model, tiny_tokenizer

from deltanet_conversion import export, export_checkpoint
from modeling_deltanet import DeltaNetForSequenceClassification


MODEL_FILE = Path(export.__file__).with_name(export.MODEL_FILE)


def saved(folder, model=None, **fields):
    """A model and a tokenizer in `folder`, with other `fields` in its config.json."""
    (tiny_model() if model is None else model).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


@pytest.fixture(scope="module")
def tree():
    """The model file, which cannot be imported here."""
    return ast.parse(MODEL_FILE.read_text())


def test_the_folder_is_complete(tmp_path, tree):
    """mlx-lm would not load it, or compute with a default where the model has something else."""
    model = tiny_model(tie_word_embeddings=True, linear_use_rope=True, head_dim=16)
    source = saved(
        tmp_path / "model", model.bfloat16(), auto_map={"AutoConfig": "configuration_deltanet.DeltaNetConfig"}
    )
    found = export_checkpoint(source, tmp_path / "mlx")
    assert found["layer_types"] == model.config.layer_types
    assert found["parameters"] == sum(x.numel() for x in model.parameters())
    assert (tmp_path / "mlx" / found["model_file"]).read_text() == MODEL_FILE.read_text()

    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert config["model_file"] == found["model_file"] and "auto_map" not in config and config["dtype"] == "bfloat16"
    arguments = next(x for x in tree.body if isinstance(x, ast.ClassDef) and x.name == "ModelArgs").body
    assert {x.target.id for x in arguments} <= config.keys() and all(x.value is None for x in arguments)
    assert config["linear_use_decay"] is False and config["linear_conv_kernel_dim"] == 4
    torch.testing.assert_close(torch.tensor(config["rope_frequencies"]), model.model.rotary_emb.inv_freq)
    weights, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "mlx", source))
    assert weights.keys() == wanted.keys() and all(torch.equal(weights[name], wanted[name]) for name in wanted)
    names = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert names <= {file.name for file in (tmp_path / "mlx").iterdir()}


def test_without_rotation_there_are_no_frequencies(tmp_path):
    """A model without positions would be given some."""
    export_checkpoint(saved(tmp_path / "model", tiny_model(layer_types=[LINEAR])), tmp_path / "mlx")
    assert json.loads((tmp_path / "mlx" / "config.json").read_text())["rope_frequencies"] is None


def test_the_model_file_stands_alone(tree):
    """It runs where this package is not, with what mlx-lm installs, and knows what the export lets through."""
    imports = [x for x in ast.walk(tree) if isinstance(x, ast.Import | ast.ImportFrom)]
    modules = [x.module if isinstance(x, ast.ImportFrom) else x.names[0].name for x in imports]
    packages = {name.partition(".")[0] for name in modules} - sys.stdlib_module_names
    assert packages == {"mlx", "mlx_lm", "transformers"}
    named = {x.targets[0].id: x.value for x in tree.body if isinstance(x, ast.Assign)}
    assert tuple(key.value for key in named["ACTIVATIONS"].keys) == export.ACTIVATIONS


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: saved(f, tiny_model(hidden_act="tanh")), "hidden_act must be one of silu, .*, got 'tanh'"),
        (lambda f: saved(f, tiny_model(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})),
         "rope_type must be .* got 'dynamic'"),
        (lambda f: saved(f, tiny_model().double()), "must be of F32, BF16, F16 for MLX, got F64"),
        (lambda f: saved(f, quantization_config={"quant_method": "bitsandbytes"}), "quantization_config"),
        (lambda f: saved(f, tiny_model(DeltaNetForSequenceClassification)), "DeltaNetForSequenceClassification"),
        (lambda f: make_teacher("llama", f), r"is 'llama', .* 'deltanet' \(`deltanet convert` makes one of it\)"),
        (lambda f: get_peft_model(tiny_model(), LoraConfig()).save_pretrained(f), "is an adapter"),
        (lambda f: tiny_model().save_pretrained(f), "has no tokenizer"),
        (lambda f: saved(f, layer_types=[LINEAR, LINEAR, LINEAR, FULL], sliding_window=None), "lacks .*linear_attn"),
        (lambda f: saved(f, model_type="delta_net"), "is 'delta_net', .*deltanet convert"),
        (lambda f: saved(f, hidden_size="many"), "config.json.*hidden_size"),
        (lambda f: saved(f, tiny_model(linear_use_delta_rule=False)), "linear_use_delta_rule = False"),
    ],
    ids=["activation", "rotation", "fp64", "quantised", "classifier", "llama", "adapter", "no tokenizer",
         "other weights", "fla", "broken config", "additive"],
)  # fmt: skip
def test_what_mlx_cannot_run_is_refused_by_name(tmp_path, make, message):
    """The folder would be made, and fail or speak nonsense on the machine that it was made for."""
    make(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        export_checkpoint(tmp_path / "model", tmp_path / "mlx")
    assert [x.name for x in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_is_there_is_not_overwritten(tmp_path):
    """Whatever lay in it would be lost, or mixed with a model."""
    source = saved(tmp_path / "model")
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "mine").touch()
    with pytest.raises(ValueError, match="mlx is there already"):
        export_checkpoint(source, tmp_path / "mlx")
    with pytest.raises(ValueError, match="to must be 'mlx', got 'gguf'"):
        export_checkpoint(source, tmp_path / "other", to="gguf")
    assert [x.name for x in (tmp_path / "mlx").iterdir()] == ["mine"] and not (tmp_path / "other").exists()
