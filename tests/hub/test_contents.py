"""What of a folder goes to the Hub: the rest is named first, and --include and --exclude decide."""

import json
import shutil
from pathlib import Path

import pytest
import typer
from folders import REPO, add_card, client, write_checkpoint
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from test_push import problems_of
from typer.testing import CliRunner

from deltanet_conversion import push
from deltanet_conversion.cli_publish import register
from deltanet_conversion.collect import BIG, collect, strays
from deltanet_conversion.push import prepare
from modeling_deltanet import DeltaNetForCausalLM


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "folder"))


@pytest.fixture
def unloaded(monkeypatch):
    """A push that does not load a model, which takes seconds and is another test's."""
    seen = {"class": "DeltaNetForCausalLM", "parameters": 1, "new_tokens": 1}
    load = push._load
    monkeypatch.setattr(push, "_load", lambda *args: seen | {"problems": []})
    return lambda: monkeypatch.setattr(push, "_load", load)


def put(folder: Path, *names: str, size: int = 3) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("wb") as file:
            file.truncate(size)  # sparse


def test_what_a_training_leaves_stays_here_and_is_named(folder):
    """Logs that name this machine, and gigabytes of checkpoints, would be published with the model."""
    put(folder, "wandb/run-1/files/output.log", "checkpoint-20/optimizer.pt", "mlruns/1", "notes/a.md", "x.log")
    put(folder, "runs/Nov27_host/events.out.tfevents.1.host.2")
    clean = set(collect(folder)[0]) - {"notes/a.md", "x.log"}
    assert collect(folder)[1] == {
        "wandb/": "logs of Weights & Biases",
        "checkpoint-20/": "a checkpoint of a training",
        "mlruns/": "logs of MLflow",
        "runs/Nov27_host/events.out.tfevents.1.host.2": "a log of TensorBoard, whose name tells this machine's",
    }
    sources, left_out, _, _ = collect(folder, include=("wandb", "*.tfevents.*"), exclude=("notes/", "*.log"))
    assert set(sources) == clean | {"runs/Nov27_host/events.out.tfevents.1.host.2"}
    assert left_out["notes/"] == left_out["wandb/run-1/files/output.log"] == left_out["x.log"] == "excluded"
    assert left_out["mlruns/1"] == "logs of MLflow"
    assert left_out["checkpoint-20/optimizer.pt"] == "training state"  # a pickle, whatever is included
    assert "wandb/run-1/files/output.log" in collect(folder, include=("wandb",))[0]


def test_data_and_big_files_are_asked_about(folder):
    """Training data, or another form of the weights, would be public because it lay in the folder."""
    put(folder, "train.jsonl", "data/part.parquet")
    put(folder, "model.gguf", "tokenizer.model", "vocab.txt", "loss.png", size=BIG + 1)
    put(folder, "small.txt", "loss.png")
    save_file({}, folder / "ema.safetensors")
    decide = "send it by include (--include), or leave it out by exclude (--exclude)"
    assert problems_of(folder) == [
        f"ema.safetensors: 16 bytes of weights that nothing loads: {decide}",
        f"model.gguf: 10.0 MB that no model needs: {decide}",
        f"train.jsonl: 3 bytes of data: {decide}",
        f"data/part.parquet: 3 bytes of data: {decide}",
    ]
    sources = collect(folder, exclude=("model.gguf", "*.safetensors"))[0]
    assert [p.file for p in strays(folder, sources, include=("data",))] == ["train.jsonl"]


def test_weights_in_shards_are_the_models(tmp_path):
    """A model too large for one file could not be pushed, or an older one beside it would go along."""
    folder = write_checkpoint(tmp_path / "sharded")
    DeltaNetForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="30kB")
    names = {file.name for file in folder.glob("*.safetensors")} - {"model.safetensors"}
    assert len(names) > 1
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert strays(folder, collect(folder)[0]) == []
    put(folder, "model-00001-of-00009.safetensors")
    assert [p.file for p in strays(folder, collect(folder)[0])] == ["model-00001-of-00009.safetensors"]


def test_a_licence_goes_along(folder, unloaded):
    """A copy would come without the terms that its licence says must come with it."""
    package = (Path(__file__).parents[2] / "LICENSE").read_bytes()
    assert prepare(folder, REPO).files["LICENSE"].source == package
    (folder / "LICENSE.md").write_text("as you like")
    assert "LICENSE" not in prepare(folder, REPO).files
    (folder / "LICENSE.md").unlink()
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("license: apache-2.0", "license: llama3.2"))
    assert problems_of(folder) == [
        "LICENSE: missing: put the text of llama3.2 there, or license_link into the card's metadata"
    ]
    linked = "license: llama3.2\nlicense_link: https://example.org/licence"
    (folder / "README.md").write_text(card.replace("license: apache-2.0", linked))
    prepare(folder, REPO)


ADAPTER = """
import sys
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "modeling_deltanet" not in sys.modules, "it ran the package's code"
print(type(model.get_base_model()).__name__)
"""


def test_a_model_its_adapter_and_their_merger_are_published_one_by_one(hub, unloaded, tmp_path):
    """What a training leaves could not be pushed by the commands that it prints: its cards know no owner, and PEFT's
    stub is in the way.
    """
    app = typer.Typer()
    register(app)

    def deltanet(*arguments):
        done = CliRunner().invoke(app, list(map(str, arguments)))
        assert done.exit_code == 0, done.output

    model, lora, merged = (tmp_path / name for name in ("tiny", "tiny-lora", "tiny-merged"))
    add_card(write_checkpoint(model), "tiny")
    card = (model / "README.md").read_text()
    adapter = get_peft_model(DeltaNetForCausalLM.from_pretrained(model), LoraConfig(r=2, task_type="CAUSAL_LM"))
    adapter.save_pretrained(lora)
    write_checkpoint(merged)
    adapter.merge_and_unload().save_pretrained(merged)
    to, texts = ("--repo-id", "me/tiny-lora"), ("--license", "apache-2.0", "--summary", "x", "--limits", "x")
    deltanet("push", model, "me/tiny", "--dry-run")
    deltanet("push", model, "me/tiny")
    deltanet("card", merged, "--repo-id", "me/tiny-merged", "--base-model", "me/tiny", *texts)
    deltanet("push", merged, "me/tiny-merged")
    deltanet("card", lora, *to, "--base-model", "me/tiny", *texts)
    unloaded()  # the adapter is loaded, on its base in a local folder
    deltanet("push", lora, "me/tiny-lora", "--base-model", "me/tiny")
    assert 'from_pretrained("me/tiny", trust' in hub.files("me/tiny")["README.md"].decode()
    assert (model / "README.md").read_text() == card
    loaded = client(ADAPTER, hub, tmp_path, "me/tiny-lora")
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.split()[-1] == "DeltaNetForCausalLM"


def test_pefts_stub_is_one_problem(folder, tmp_path):
    """A page of problems would hide that one command is missing."""
    adapter = get_peft_model(DeltaNetForCausalLM.from_pretrained(folder), LoraConfig(r=2, task_type="CAUSAL_LM"))
    adapter.save_pretrained(tmp_path / "lora")
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "me/tiny"}))
    assert problems_of(tmp_path / "lora") == ["README.md: PEFT's stub: make a card with `deltanet card`"]
