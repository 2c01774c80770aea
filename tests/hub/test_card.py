"""`deltanet card`: what stands in a card comes from a file, and what the Hub reads of it is valid."""

import email
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import typer
from folders import REPO, add_card, write_checkpoint
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

from deltanet_conversion.card import make_card
from deltanet_conversion.card_check import card_problems, is_stub, with_owner
from deltanet_conversion.cli_publish import register
from modeling_deltanet import DeltaNetForCausalLM
from modeling_deltanet.versions_deltanet import NEWEST, OLDEST


EVALUATION = {
    "command": "python evaluate.py --length 96",
    "hardware": "2 CPU cores",
    "results": [
        {"dataset": "Python source", "metric": "perplexity", "value": 5.4321, "of": "teacher"},
        {"dataset": "Python source", "metric": "perplexity", "value": 6.25, "split": "test"},
        {"dataset": "overwriting recall", "metric": "accuracy", "value": 0.9953},
    ],
    "speed": [{"what": "one decode step after 32K tokens", "value": 2.2, "unit": "ms"}],
}
HARNESS = {
    "results": {
        "lambada_openai": {"alias": "lambada", "acc,none": 0.41, "acc_stderr,none": 0.01, "perplexity,none": 12.5}
    },
    "config": {"model": "hf", "model_args": "pretrained=/somewhere/on/this/machine"},
    "n-shot": {"lambada_openai": 0},
}


@pytest.fixture(scope="session")
def bare(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("bare"))


@pytest.fixture
def folder(bare, tmp_path) -> Path:
    return Path(shutil.copytree(bare, tmp_path / "folder"))


def write(folder: Path, name: str, content) -> Path:
    (folder / name).write_text(json.dumps(content))
    return folder / name


def test_every_figure_stands_in_the_table_and_in_the_metadata(folder):
    """A reader, or the Hub's leaderboard, would see another figure than the one that was measured."""
    write(folder, "evaluation.json", EVALUATION)
    card = make_card(folder, REPO, license="apache-2.0", summary="Small.", limits="Many.")
    assert "| data | metric | teacher | this checkpoint | by |" in card.content
    assert "| Python source | perplexity | 5.432 | 6.25 | 1 |" in card.content
    assert "| overwriting recall | accuracy |  | 0.9953 | 1 |" in card.content
    assert "| one decode step after 32K tokens | 2.2 ms | 1 |" in card.content
    assert "1. `python evaluate.py --length 96` on 2 CPU cores" in card.content
    read = ModelCard(card.content).data.eval_results  # by the library's own check of `model-index`
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in read] == [
        ("Python source", "perplexity", 6.25),
        ("overwriting recall", "accuracy", 0.9953),
    ]
    assert read[0].dataset_split == "test"
    assert card_problems(card.content, REPO, set()) == []


def test_what_was_not_measured_is_said_to_be_so(folder):
    """An empty table reads like a figure that was forgotten, and an invented one would be worse."""
    card = make_card(folder, REPO)
    for section in ("Evaluation", "Speed"):
        assert f"## {section}\n\nNot measured.\n" in card.content
    assert "## Training\n\nNot recorded.\n" in card.content
    assert card.data.eval_results is None
    assert "model-index" not in card.content


def test_the_architecture_is_the_checkpoints(folder):
    """The page would describe another model: its size, its layers, its options."""
    content = make_card(folder, REPO).content
    model = DeltaNetForCausalLM.from_pretrained(folder)
    assert f"| parameters | {model.num_parameters():,}, stored in F32 |" in content
    assert "| layers | 2 x `linear_attention`, 1 x `sliding_attention`, 1 x `full_attention` |" in content
    assert (
        "Layers, in order: `linear_attention`, `sliding_attention`, `linear_attention`, `full_attention`." in content
    )
    assert "2 key heads of 16, 2 value heads of 16; silu and l2 norm on q and k; convolution of 4 |" in content
    assert "4 heads of 8, 2 for keys and values; rotary embedding, theta 10000; window of 5 tokens |" in content
    write_checkpoint(folder, linear_use_decay=True, linear_use_output_gate=True)
    assert "convolution of 4; a decay per value head; output gate |" in make_card(folder, REPO).content


def test_layers_are_told_by_their_period(tmp_path):
    """A page of 24 names hides the pattern."""
    linear, full = "linear_attention", "full_attention"
    for layer_types, told in (
        ([linear] * 6, "6 x `linear_attention`"),
        ([linear, linear, linear, full] * 2, "2 times (3 x `linear_attention`, `full_attention`)"),
        ([linear, full, linear, linear], "`linear_attention`, `full_attention`, 2 x `linear_attention`"),
    ):
        folder = write_checkpoint(tmp_path / str(len(told)), layer_types=layer_types)
        assert f"Layers, in order: {told}." in make_card(folder, REPO).content


def test_what_the_trainer_recorded_is_told(folder):
    """How a checkpoint came to be would be lost with the folder that it was trained in."""
    history = [{"loss": 5.0, "step": 10}, {"loss": 4.25, "step": 900}, {"eval_loss": 4.5, "step": 800}]
    state = {
        "global_step": 900,
        "train_batch_size": 8,
        "epoch": 1.5,
        "num_input_tokens_seen": 1843200,
        "log_history": history,
    }
    write(folder, "trainer_state.json", state)
    content = make_card(folder, REPO, training="On help topics.").content
    facts = (
        "900 steps, 8 sequences per step and device, 1.50 epochs, 1,843,200 tokens, training loss 4.250 at step 900, "
    )
    assert f"On help topics.\n\nFrom `trainer_state.json`: {facts}held-out loss 4.500 at step 800." in content


def test_a_conversion_tells_its_teacher_and_wants_recall(folder):
    """Perplexity alone hides that a converted model has lost its recall."""
    write(
        folder,
        "conversion.json",
        {"teacher": "them/teacher", "kept_layers": [1, 3], "alignment": {"tokens": 1000, "seed": 0}},
    )
    texts = {"license": "mit", "summary": "Converted.", "limits": "Many."}
    card = make_card(folder, REPO, **texts)
    assert card.data.base_model == "them/teacher"
    assert "Converted from [them/teacher]" in card.content
    assert "| kept layers | [1, 3] |" in card.content
    assert "| alignment | tokens 1000, seed 0 |" in card.content
    assert "Recall was not measured (`deltanet evaluate` does)." in card.content
    [(line, problem)] = card_problems(card.content, REPO, set())
    assert card.content.splitlines()[line - 1] == "## Conversion"
    assert "recall" in problem and "`deltanet evaluate FOLDER --teacher TEACHER`" in problem

    write(folder, "evaluation.json", EVALUATION)
    card = make_card(folder, REPO, **texts)
    assert "Recall was not measured" not in card.content
    assert card_problems(card.content, REPO, set()) == []
    write(folder, "conversion.json", {"teacher": "a-teacher-of-ours"})
    card = make_card(folder, REPO, **texts)
    assert "Converted from a-teacher-of-ours.\n" in card.content  # no link, no base_model: the Hub has no such model
    assert card.data.base_model is None
    write(folder, "conversion.json", {"kept_layers": [1, 3]})
    with pytest.raises(ValueError, match='conversion.json: no "teacher"'):
        make_card(folder, REPO)


def test_the_evaluation_harness_is_read(folder):
    """Figures would have to be copied by hand, and the folder of this machine would be published with them."""
    content = make_card(folder, REPO, evaluations=[write(folder, "harness.json", HARNESS)]).content
    assert "| lambada_openai | acc | 0.41 | 1 |" in content
    assert "| lambada_openai | perplexity | 12.5 | 1 |" in content
    assert (
        f"`lm_eval --model hf --model_args pretrained={REPO},trust_remote_code=True --tasks lambada_openai`" in content
    )
    assert "stderr" not in content
    assert "/somewhere" not in content


@pytest.mark.parametrize(
    "name", ["config.json", "conversion.json", "evaluation.json", "trainer_state.json", "adapter_config.json",
             "model.safetensors", "other.safetensors"]
)  # fmt: skip
def test_a_link_out_of_the_folder_is_not_read(folder, tmp_path, name):
    """A folder from elsewhere would have facts of this machine told on a public page."""
    write(tmp_path, "outside.json", {"teacher": "a secret", "command": "a secret"})
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "outside.json")
    with pytest.raises(ValueError, match=f"{name} is refused: a link to .*outside.json, outside the folder"):
        make_card(folder, REPO)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"command": None}, 'no "command"'),
        (
            {"results": [{"dataset": "x", "metric": "y", "value": "5"}]},
            r"results\[0\]: a figure must be a finite number, got '5'",
        ),
        ({"results": [{"dataset": "x", "metric": "y", "value": math.nan}]}, "finite number, got nan"),
        ({"results": [{"dataset": "x", "metric": "y"}]}, r"results\[0\] lacks value"),
        ({"results": [{"dataset": "x", "metric": "y", "value": 1, "off": "z"}]}, r"results\[0\] has no key off"),
        (
            {"results": [{"dataset": "x", "metric": "y", "value": v} for v in (1, 2)]},
            r"two figures for y on x .*\[1, 2\]",
        ),
        ({"results": [], "speed": []}, "neither"),
        ({"resluts": []}, "no key resluts"),
    ],
)
def test_a_figure_without_a_source_is_refused(folder, change, message):
    """An invented or mistyped figure would be published as a measured one."""
    write(folder, "evaluation.json", EVALUATION | change)
    with pytest.raises(ValueError, match=message):
        make_card(folder, REPO)


def test_a_damaged_checkpoint_is_named(folder):
    """The card would describe weights that are not there."""
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is not a complete safetensors file"):
        make_card(folder, REPO)
    config = json.loads((folder / "config.json").read_text())
    write(folder, "config.json", config | {"num_hidden_layers": 3})
    with pytest.raises(ValueError, match="(?s)config.json.*layer_types names 4 layers"):
        make_card(folder, REPO)
    write(folder, "config.json", {"model_type": "llama"})
    with pytest.raises(ValueError, match="'llama', not 'deltanet'"):
        make_card(folder, REPO)


def test_the_command_line_keeps_a_card_that_was_edited(folder):
    """People's edits would be lost by running the command again."""
    app = typer.Typer()
    register(app)
    arguments = ["card", str(folder), "--repo-id", REPO, "--license", "mit"]
    written = CliRunner().invoke(app, [*arguments, "--json"])
    assert written.exit_code == 0
    result = json.loads(written.stdout)
    lines = (folder / "README.md").read_text().splitlines()
    assert [lines[i - 1] for i in result["lines_to_fill_in"]] == ["[More Information Needed]"] * 2
    (folder / "README.md").write_text("edited")
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 1
    assert "--force" in refused.stderr
    assert (folder / "README.md").read_text() == "edited"
    assert CliRunner().invoke(app, [*arguments, "--force"]).exit_code == 0
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_an_adapters_card_names_its_base(folder):
    """Nobody could tell which model an adapter belongs to; a folder of this machine is no answer."""
    write(
        folder,
        "adapter_config.json",
        {"peft_type": "LORA", "r": 8, "base_model_name_or_path": str(folder), "target_modules": ["q_proj"]},
    )
    with pytest.raises(ValueError, match="no repository of the Hub"):
        make_card(folder, REPO)
    add_card(folder, base_model="me/base")
    card = ModelCard.load(folder / "README.md")
    assert (card.data.base_model, card.data.library_name) == ("me/base", "peft")
    assert f'AutoPeftModelForCausalLM.from_pretrained("{REPO}", trust_remote_code=True)' in card.content
    assert "| adapter | LORA, rank 8 |" in card.content


def test_cards_install_from_an_address_or_from_nowhere(folder, monkeypatch):
    """Readers would be told to install a name of the index that is not ours, which anyone could register."""
    named = {"without": make_card(folder, REPO).content}
    metadata = email.message_from_string("Project-URL: Repository, https://example.org/us/deltanet\n")
    monkeypatch.setattr("importlib.metadata.metadata", lambda name: metadata)
    named["with"] = make_card(folder, REPO).content
    assert "is installed (`pip install git+https://example.org/us/deltanet`), which on a GPU" in named["with"]
    assert "is installed, which on a GPU" in named["without"]
    cards = [file.read_text() for file in Path(__file__).parents[2].glob("model_cards/**/*.md")]
    assert len(cards) >= 2
    for text in (*named.values(), *cards):
        assert "pip install modeling" not in text
    for text in named.values():
        assert f"Tried with Transformers {OLDEST} to {NEWEST}." in text


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("license", "Apache 2.0", "license 'Apache 2.0' is none of the Hub's (apache-2.0; otherwise: other)"),
        ("license", "gpl3", "license 'gpl3' is none of the Hub's (gpl, lgpl, gpl-3.0; otherwise: other)"),
        ("language", "english", "language 'english' is no code of the Hub's"),
        ("language", ["en", "de-AT"], "language 'de-AT' is no code of the Hub's"),
        ("language", "xx", "language 'xx' is no code of the Hub's"),
    ],
)
def test_licence_and_language_are_the_hubs(folder, field, value, wanted):
    """The Hub would refuse the commit at the end of an upload, or show an error on the page."""
    with pytest.raises(ValueError, match=re.escape(wanted)):
        make_card(folder, REPO, **{field: value})
    fields = {"license": "mit", "summary": "x", "limits": "x"}
    good = make_card(folder, REPO, **fields, language=["en", "yue", "code"]).content
    assert card_problems(good, REPO, set()) == []
    text = (
        good.replace("license: mit\n", "")
        if field == "license"
        else good.replace("language:\n- en\n- yue\n- code\n", "")
    )
    text = text.replace("---\n", f"---\n{field}: {json.dumps(value)}\n", 1)
    [(line, problem)] = card_problems(text, REPO, set())
    assert line == 1 and problem.startswith(wanted)


def test_other_licences_have_a_name(folder):
    """A page would say `other`, and nobody could tell what is allowed."""
    text = make_card(folder, REPO, license="other", summary="x", limits="x").content
    assert card_problems(text, REPO, set()) == [(1, "license: other, but no license_name in the metadata")]
    assert card_problems(text.replace("license: other\n", "license: other\nlicense_name: x\n"), REPO, set()) == []


def test_pefts_stub_gives_way_to_a_card(folder, tmp_path):
    """`save_pretrained` of an adapter would block `deltanet card`, as if somebody had edited its empty template."""
    get_peft_model(DeltaNetForCausalLM.from_pretrained(folder), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(
        tmp_path / "lora"
    )
    readme = tmp_path / "lora" / "README.md"
    stub = readme.read_text()
    assert is_stub(stub)
    app = typer.Typer()
    register(app)
    arguments = ["card", str(tmp_path / "lora"), "--repo-id", REPO, "--base-model", "me/base"]
    readme.write_text(stub.replace("Model ID", "my adapter"))
    assert CliRunner().invoke(app, arguments).exit_code == 1
    readme.write_text(stub)
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert "A LORA adapter of [me/base]" in readme.read_text()


def test_a_card_without_owner_is_given_the_one_that_publishes_it(folder, tmp_path):
    """A card could not be made before its owner is known; or a name in a text would be taken for a repository."""
    fields = {"license": "mit", "summary": "tiny is tiny.", "limits": "x"}
    write(folder, "harness.json", HARNESS)
    text = make_card(folder, "tiny", **fields, evaluations=[folder / "harness.json"]).content
    whole = make_card(folder, REPO, **fields, evaluations=[folder / "harness.json"]).content
    assert with_owner(text, REPO) == with_owner(whole, REPO) == whole
    assert with_owner(text, "me/other") == text
    write(folder, "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": str(folder)})
    text = make_card(folder, "tiny-lora", base_model="tiny", **fields).content
    assert (
        with_owner(text, "me/tiny-lora", REPO) == make_card(folder, "me/tiny-lora", base_model=REPO, **fields).content
    )
    assert with_owner(text, "me/tin") == text
    with pytest.raises(ValueError, match="no repository of the Hub"):
        make_card(folder, "me/tiny-lora", base_model="tiny")
