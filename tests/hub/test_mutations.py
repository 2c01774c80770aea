"""Any file may lie: whatever stands in it, a command gives a valid result or one error that names what is wrong.

Hypothesis draws the lies from `MUTATIONS_SEED` (0 by default); `MUTATIONS` times as many as CI tries are drawn on demand:

    MUTATIONS=10 MUTATIONS_SEED=1 python -m pytest tests/hub/test_mutations.py -rP
"""

import collections
import difflib
import importlib
import json
import os
import re
import shutil
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from folders import REPO, add_card, write_checkpoint
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from mutations import SECRET, json_texts, safetensors
from safetensors.torch import save_file
from tiny import FULL, LINEAR, SLIDING, tiny_llama, tiny_model, tokens

from deltanet_conversion import card, checkpoint, convert_checkpoint, convert_to_fla, inspect_checkpoint
from deltanet_conversion.card import SECTIONS, card_problems, make_card, write_card
from modeling_deltanet import DeltaNetConfig, cache_deltanet, load_cache, save_cache


push, scan = (importlib.import_module(f"deltanet_conversion.{name}") for name in ("push", "scan"))
SEED, TIMES = int(os.environ.get("MUTATIONS_SEED", 0)), float(os.environ.get("MUTATIONS", 1))
SHARDS = "model.safetensors.index.json"
# What Python and its packages read of themselves.
OWN_PLACES = [Path(p).resolve() for p in (sys.prefix, sys.base_prefix, Path(torch.__file__).parents[1], "/proc", "/sys", "/dev",
              Path(__file__).parents[2])]  # fmt: skip
METADATA = {
    "license",
    "library_name",
    "tags",
    "pipeline_tag",
    "base_model",
    "base_model_relation",
    "model-index",
    "model_name",
}


# ------------------------------------------------------------------------------------------- what is read and written

opened: list[tuple[str, str]] | None = None


def note(event: str, arguments: tuple) -> None:
    if opened is not None and event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        opened.append((os.path.abspath(os.fsdecode(arguments[0])), f"{arguments[1]} {arguments[2]}"))


sys.addaudithook(note)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


class Place:
    """A folder whose files are exchanged for others, a secret beside it, and what a command leaves."""

    def __init__(self, root: Path, folder: Path):
        self.root, self.folder, self.out = root, folder, root / "out"
        self.files = files_in(root)

    def run(self, name: str, content: bytes, command) -> str:
        """What came of a command on the folder with another content of one file: "valid" or "refused"."""
        global opened
        file = self.folder / name
        honest = self.files[str(file.relative_to(self.root))]
        file.write_bytes(content)
        opened, outcome = [], "failed"
        try:
            command(self)
            outcome = "valid"
        except (ValueError, StrictDataclassError) as error:
            outcome = "refused"
            words = {word.decode() for word in re.findall(rb"\w{3,}", honest + content)} | {name}
            assert any(word in str(error) for word in words), f"a riddle: {error!r}"
        finally:
            seen, opened = opened, None
            left = self.out.exists()
            if left:
                (shutil.rmtree if self.out.is_dir() else Path.unlink)(self.out)
            file.write_bytes(honest)
        assert outcome == "valid" or not left, "a refused file has left an output"
        for path, how in seen:
            assert self.may_open(Path(path)), f"opened {path} ({how})"
        assert files_in(self.root) == self.files, "a file was left, or changed"
        return outcome

    def may_open(self, file: Path) -> bool:
        places = [self.folder, self.out, self.root / "tmp", *OWN_PLACES]
        if file.is_relative_to(self.root) and file.relative_to(self.root).parts[0].startswith(".out."):
            return True  # what becomes the output
        return any(f.is_relative_to(p) for f in (file, file.resolve()) for p in places)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """kind -> a `Place` of that kind of folder, made when it is first asked for."""
    made = {}

    def get(kind: str) -> Place:
        if kind not in made:
            root = tmp_path_factory.mktemp(kind)
            folder = root / "folder"
            MAKERS[kind](folder)
            (root / "tmp").mkdir()
            (root / "sentinel").mkdir()
            (root / SECRET.replace("..", ".")).with_suffix(".json").write_text('{"teacher": "secret"}')
            save_file({"secret": torch.zeros(3)}, (root / SECRET.replace("..", ".")).with_suffix(".safetensors"))
            made[kind] = Place(root, folder)
        return made[kind]

    return get


@pytest.fixture(autouse=True)
def watched(monkeypatch):
    """safetensors opens files in Rust, unseen by Python; a load in another process takes too long for thousands."""
    for module in (card, checkpoint, cache_deltanet):

        def noted(file, *args, real=module.safe_open, **kwargs):
            note("open", (str(file), "safe_open", ""))
            return real(file, *args, **kwargs)

        monkeypatch.setattr(module, "safe_open", noted)
    monkeypatch.setattr(push, "_load", lambda *args: {"class": "", "parameters": 0, "new_tokens": 1, "problems": []})
    monkeypatch.setattr(scan, "get_token", lambda: None)


# -------------------------------------------------------------------------------------------- the folders that are changed


EVALUATION = {
    "command": "python evaluate.py",
    "hardware": "2 cores",
    "results": [
        {"dataset": "Python source", "metric": "perplexity", "value": 5.4321, "of": "teacher"},
        {"dataset": "Python source", "dataset_id": "x", "metric": "recall", "value": 6.25, "split": "test"},
    ],
    "speed": [{"what": "one step", "value": 2.2, "unit": "ms"}],
}
HARNESS = {
    "results": {"lambada": {"alias": "lambada", "acc,none": 0.41, "acc_stderr,none": 0.01, "ppl,strict": 12.5}},
    "config": {"model": "hf", "model_args": "pretrained=x"},
    "n-shot": {"lambada": 3},
}
STATE = {
    "global_step": 900, "train_batch_size": 8, "epoch": 1.5, "num_input_tokens_seen": 1843200,
    "log_history": [{"loss": 5.0, "step": 10}, {"eval_loss": 4.5, "step": 800}],
}  # fmt: skip
CONVERSION = {"teacher": "them/teacher", "kept_layers": [1, 3], "alignment": {"tokens": 1000, "data": ["x"]}}


def write(folder: Path, **contents) -> None:
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def make_ours(folder: Path, **options) -> None:
    write_checkpoint(folder, **options)
    write(folder, evaluation=EVALUATION, evaluation_harness=HARNESS, trainer_state=STATE, conversion=CONVERSION)
    add_card(folder)


def make_shards(folder: Path) -> None:
    tiny_model(layer_types=[LINEAR] * 2).save_pretrained(folder, max_shard_size="20KB")


def make_fla(folder: Path) -> None:
    make_ours(folder.parent / "ours", layer_types=[LINEAR, SLIDING, FULL])
    convert_to_fla(folder.parent / "ours", folder)
    shutil.rmtree(folder.parent / "ours")


def make_llama(folder: Path) -> None:
    tiny_llama().save_pretrained(folder)


def make_adapter(folder: Path) -> None:
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "base_model_name_or_path": "me/base",
        "target_modules": ["q_proj"],
    }
    write(folder, adapter_config=config)
    save_file({"a": torch.zeros(2, 8)}, folder / "adapter_model.safetensors")
    add_card(folder)


def make_cache(folder: Path) -> None:
    folder.mkdir()
    model = tiny_model()
    save_cache(model(tokens(2, 10), use_cache=True).past_key_values, folder / "cache.safetensors", model.config)


MAKERS = {
    "ours": make_ours, "shards": make_shards, "fla": make_fla, "llama": make_llama, "adapter": make_adapter, "cache": make_cache
}  # fmt: skip


# -------------------------------------------------------------------------------------------------------- the commands


def load_config(place: Place) -> None:
    fields = DeltaNetConfig.from_pretrained(place.folder).to_dict()
    again = DeltaNetConfig.from_dict(json.loads(json.dumps(fields)))
    assert json.dumps(again.to_dict(), sort_keys=True) == json.dumps(fields, sort_keys=True)


def inspect(place: Place) -> None:
    json.dumps(inspect_checkpoint(place.folder), allow_nan=False)


def converted(**options):
    def convert(place: Place) -> None:
        convert_checkpoint(place.folder, place.out, **options)
        assert inspect_checkpoint(place.out)["parameters"] > 0

    return convert


def describe(place: Place) -> None:
    write_card(make_card(place.folder, REPO, license="apache-2.0", summary="Small.", limits="Many."), place.out)
    text = place.out.read_text()
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    metadata = yaml.safe_load(front)
    assert set(metadata) <= METADATA, metadata
    assert metadata["license"] == "apache-2.0"
    assert metadata["tags"][:2] == ["deltanet", "linear-attention"]
    assert not re.search(r"(?m)^\s*(---|\.\.\.)", body.replace("|---", "")), "a second document"
    headings = [line.lstrip("# ") for line in text.splitlines() if re.match(r"\s{0,3}#", line)]
    assert [h for h in headings if h not in ("Conversion", "Citation")] == ["tiny", *SECTIONS], headings
    prose = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", body.split("## Architecture")[1])  # without spans of code
    assert not re.search(r"<[a-zA-Z!/]", prose), "HTML"
    assert len(re.findall(r"(?<!\\)!?\[[^\]]*\]\(", prose)) <= 1, "a link beside the teacher's"
    for problem in card_problems(text, REPO, set()):
        assert "recall" in problem[1] or "filled in" in problem[1], problem


def prepare(place: Place) -> None:
    plan = push.prepare(place.folder, REPO)
    assert all(isinstance(c.source, bytes) or c.source.is_relative_to(place.folder) for c in plan.files.values())


def resume(place: Place) -> None:
    model = tiny_model()
    cache = load_cache(place.folder / "cache.safetensors", model.config)
    with torch.no_grad():
        assert model(tokens(cache.layers[1].keys.shape[0], 3), past_key_values=cache).logits.isfinite().all()


CASES = [
    # folder, file, command, mutations
    ("ours", "config.json", load_config, 700),
    ("ours", "config.json", inspect, 300),
    ("ours", "config.json", converted(to="fla"), 100),
    ("ours", "config.json", describe, 150),
    ("ours", "config.json", prepare, 150),
    ("fla", "config.json", inspect, 400),
    ("fla", "config.json", converted(), 100),
    ("llama", "config.json", inspect, 300),
    ("llama", "config.json", converted(keep="0.5"), 100),
    ("shards", SHARDS, inspect, 300),
    ("shards", SHARDS, converted(to="fla"), 50),
    ("ours", "model.safetensors", inspect, 300),
    ("fla", "model.safetensors", converted(), 100),
    ("ours", "model.safetensors", describe, 100),
    ("ours", "model.safetensors", prepare, 50),
    ("cache", "cache.safetensors", resume, 600),
    ("adapter", "adapter_config.json", describe, 300),
    ("adapter", "adapter_config.json", prepare, 200),
    ("ours", "conversion.json", describe, 250),
    ("ours", "evaluation.json", describe, 250),
    ("ours", "evaluation_harness.json", describe, 200),
    ("ours", "trainer_state.json", describe, 250),
    ("ours", "tokenizer_config.json", prepare, 100),
    ("ours", "conversion.json", prepare, 50),
]


@pytest.mark.parametrize(
    "kind, name, command, count", CASES, ids=[f"{kind}-{name}-{command.__name__}" for kind, name, command, _ in CASES]
)
def test_a_file_that_lies_is_refused_or_gives_a_valid_result(place, monkeypatch, kind, name, command, count):
    """A damaged or malicious file would end in a traceback, a wrong model, or a page that says what it should not."""
    place = place(kind)
    monkeypatch.setattr(tempfile, "tempdir", str(place.root / "tmp"))
    honest = (place.folder / name).read_bytes()
    lies = (
        safetensors(honest, flip_data=kind == "cache")
        if name.endswith(".safetensors")
        else json_texts(json.loads(honest))
    )
    outcomes = collections.Counter()

    causes = {}

    @seeded(SEED)
    @settings(
        max_examples=int(count * TIMES), phases=[Phase.generate], deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(lies)
    def run(lie):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcomes[place.run(name, lie, command)] += 1
        except Exception as error:  # noqa: BLE001 (every cause is reported, each with its shortest lie)
            outcomes["failed"] += 1
            frames = [
                f
                for f in traceback.extract_tb(error.__traceback__)
                if "wt/c" in f.filename or "_deltanet" in f.filename
            ]
            cause = f"{type(error).__name__} in {frames[-1].name}:{frames[-1].lineno}: {str(error)[:150]}"
            key = f"{type(error).__name__} {frames[-1].lineno} {str(error)[:40]}"
            if key not in causes or len(lie) < len(causes[key][1]):
                causes[key] = cause, lie

    run()
    print(f"seed {SEED}: {sum(outcomes.values())} mutations, {dict(outcomes)}")
    assert not causes, "\n".join(f"CAUSE {cause}\n  LIE {difference(honest, lie)}" for cause, lie in causes.values())


def difference(honest: bytes, lie: bytes) -> str:
    """The lines in which they differ, of JSON at least."""
    try:
        one, other = (json.dumps(json.loads(x), indent=1).splitlines() for x in (honest, lie))
    except (ValueError, RecursionError):
        return repr(lie[:300])
    return " ".join(line[:100] for line in difflib.unified_diff(one, other, n=0, lineterm="") if line[0] in "+-")[:600]
