"""Any file may lie: whatever stands in it, a command gives a valid result or one error that names what is wrong.

Hypothesis draws the lies from `MUTATIONS_SEED` (0 by default); `MUTATIONS` times as many as CI tries are drawn on
demand:

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
from mutations import SECRET, json_texts, paths, safetensors
from safetensors.torch import save_file
from tiny import FULL, LINEAR, SLIDING, tiny_llama, tiny_model, tokens

from deltanet_conversion import card, checkpoint, convert_checkpoint, convert_to_fla, inspect_checkpoint
from deltanet_conversion.card import make_card, write_card
from deltanet_conversion.card_check import SECTIONS, card_problems
from modeling_deltanet import DeltaNetConfig, cache_deltanet, load_cache, save_cache


push, scan = (importlib.import_module(f"deltanet_conversion.{name}") for name in ("push", "scan"))
SEED, TIMES = int(os.environ.get("MUTATIONS_SEED", 0)), float(os.environ.get("MUTATIONS", 1))
SHARDS = "model.safetensors.index.json"
REPOSITORY = Path(__file__).resolve().parents[2]
# What Python and its packages read of themselves.
OWN_PLACES = [Path(p).resolve() for p in (sys.prefix, sys.base_prefix, Path(torch.__file__).parents[1], "/proc",
    "/sys", "/dev",
              REPOSITORY)]  # fmt: skip
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
            words |= {repr(path[-1]) for path in paths(parsed(content))[1:]}
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


# ---------------------------------------------------------------------------------------- the folders that are changed


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
    "ours": make_ours, "shards": make_shards, "fla": make_fla, "llama": make_llama, "adapter": make_adapter,
    "cache": make_cache,
}  # fmt: skip


# -------------------------------------------------------------------------------------------------------- the commands


def load_config(place: Place) -> None:
    try:
        fields = DeltaNetConfig.from_pretrained(place.folder).to_dict()
    except (OSError, RecursionError, ValueError) as error:  # Transformers reads the file, in its own words
        if isinstance(error, ValueError) and "Exceeds the limit" not in str(error):
            raise
        raise ValueError(f"config.json: {error}") from error
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
        assert any(word in problem[1] for word in ("recall", "filled in", "picture")), problem


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
                frame
                for frame in traceback.extract_tb(error.__traceback__)
                if Path(frame.filename).is_relative_to(REPOSITORY)
            ]
            cause = f"{type(error).__name__} in {frames[-1].name}:{frames[-1].lineno}: {str(error)[:150]}"
            key = f"{type(error).__name__} {frames[-1].lineno} {str(error)[:40]}"
            if key not in causes or len(lie) < len(causes[key][1]):
                causes[key] = cause, lie

    run()
    print(f"seed {SEED}: {sum(outcomes.values())} mutations, {dict(outcomes)}")
    assert not causes, "\n".join(f"CAUSE {cause}\n  LIE {difference(honest, lie)}" for cause, lie in causes.values())


def parsed(content: bytes):
    """The JSON value of a file's content, None for what is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def difference(honest: bytes, lie: bytes) -> str:
    """The lines in which they differ, of JSON at least."""
    if parsed(lie) is None:
        return repr(lie[:300])
    one, other = (json.dumps(parsed(x), indent=1).splitlines() for x in (honest, lie))
    return " ".join(line[:100] for line in difflib.unified_diff(one, other, n=0, lineterm="") if line[0] in "+-")[:600]


# -------------------------------------------------------------------------------------------- what the mutations found

ours, fla, llama = ({"kind": kind, "name": "config.json"} for kind in ("ours", "fla", "llama"))
CONV, EVAL, LM, TRAINER, LORA = (
    {"kind": kind, "name": f"{name}.json", "command": describe}
    for kind, name in (
        ("ours", "conversion"), ("ours", "evaluation"), ("ours", "evaluation_harness"), ("ours", "trainer_state"),
        ("adapter", "adapter_config"),
    )
)  # fmt: skip
RESULT = EVALUATION["results"][0]
# What was an error of another kind, a riddle, or accepted: the file, the fields that are changed, what the error says.
FINDINGS = {
    "dtype that is a function of torch": (ours, load_config, {"dtype": "load"}, "dtype must name a dtype of torch"),
    "dtype that torch does not have": (ours, inspect, {"dtype": "NaNfloat32"}, "dtype"),
    "dtype in a list": (ours, load_config, {"dtype": ["float32"]}, "dtype must be str"),
    "labels with words for numbers": (
        ours, load_config, {"id2label": {"a": "b"}}, "id2label must have numbers as keys"
    ),
    "labels in a list": (ours, load_config, {"id2label": [1]}, "id2label must be dict"),
    "labels that fill the memory": (ours, load_config, {"num_labels": 10**12}, "num_labels must be from 0"),
    "labels that are counted in letters": (ours, load_config, {"num_labels": "a"}, "num_labels must be int"),
    "layers that fill the memory": (
        ours, load_config, {"num_hidden_layers": 10**9, "layer_types": None}, "num_hidden_layers must be at most"
    ),
    "more layers than tensors": (
        ours, inspect, {"num_hidden_layers": 900_000, "layer_types": None}, "900000 layers; the files hold"
    ),
    "layers of their own in a list": (ours, load_config, {"per_layer_config": [1]}, "per_layer_config must be dict"),
    "quantization that is a number": (
        ours, load_config, {"quantization_config": 3}, "quantization_config must be dict"
    ),
    "a class instead of a field": (ours, load_config, {"__class__": 3}, "'__class__' cannot be a field"),
    "a theta that is no number": (ours, load_config, {"rope_parameters": {"rope_theta": "x"}}, "rope_theta = 'x'"),
    "a theta of nothing": (
        ours, load_config, {"rope_parameters": {"rope_theta": 0}}, "rope_theta must be greater than 0"
    ),
    "a stretched rotation without its factor": (
        ours, load_config, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "'factor'"
    ),
    "an epsilon that is NaN": (
        ours, load_config, {"rms_norm_eps": float("nan")}, "rms_norm_eps must be from 0 to 1, got nan"
    ),
    "a negative deviation": (ours, load_config, {"initializer_range": -1.0}, "initializer_range must be from 0"),
    "dropout of more than all": (
        ours, load_config, {"attention_dropout": 5.0}, "attention_dropout must be from 0 to 1"
    ),
    "no position at all": (
        ours, load_config, {"max_position_embeddings": -5}, "max_position_embeddings must be from 1"
    ),
    "padding beyond the vocabulary": (ours, converted(to="fla"), {"pad_token_id": 10**6}, "pad_token_id must be from"),
    "a size beyond any tensor": (ours, prepare, {"hidden_size": 10**400}, "hidden_size must be at least 1, and below"),
    "a convolution beyond any tensor": (ours, prepare, {"linear_conv_kernel_dim": 10**30}, "linear_conv_kernel_dim"),
    "an architecture that is code": (
        ours, describe, {"architectures": ["DeltaNetForCausalLM\nimport os"]}, "which is no DeltaNet"
    ),
    "an architecture that is a number": (ours, prepare, {"architectures": -515}, "architectures"),
    "an architecture that no JSON holds": (llama, inspect, {"architectures": {"x": float("nan")}}, "architectures"),
    "fla: no number of heads": (fla, inspect, {"num_heads": None}, "num_heads: None"),
    "fla: no heads": (fla, inspect, {"num_heads": 0}, "num_heads: 0"),
    "fla: a ratio in letters": (fla, inspect, {"expand_k": "0"}, "expand_k: '0'"),
    "fla: an infinite ratio": (fla, inspect, {"expand_v": float("inf")}, "expand_v: inf"),
    "fla: a width in letters": (fla, inspect, {"hidden_size": "x"}, "hidden_size: 'x'"),
    "fla: softmax layers that are a number": (fla, inspect, {"attn": [0]}, "attn must describe softmax layers"),
    "fla: softmax layers without layers": (fla, inspect, {"attn": {"num_heads": 4}}, "attn has layers: None"),
    "fla: a softmax layer without number": (
        fla, inspect, {"attn": {"layers": [None], "num_heads": 4}}, "layers: [None]"
    ),
    "fla: softmax layers without heads": (fla, inspect, {"attn": {"layers": [1]}}, "num_heads: None"),
    "fla: a theta in letters": (
        fla, inspect, {"attn": {"layers": [1], "num_heads": 4, "rope_theta": "`x`"}}, "rope_theta: '`x`'"
    ),
    "a teacher of no heads": (llama, inspect, {"num_attention_heads": 0}, "config.json"),
    "a teacher with heads in a list": (llama, inspect, {"num_key_value_heads": [2]}, "num_key_value_heads"),
    "adapted modules that are a number": (LORA, None, {"target_modules": 3}, "target_modules 3"),
    "adapted modules that are objects": (LORA, None, {"target_modules": [1, {}]}, "target_modules [1, {}]"),
    "a method that is a heading": (LORA, None, {"peft_type": "x\n## Limits"}, "peft_type"),
    "a rank in letters": (LORA, None, {"r": "8 |"}, "r: a figure must be a finite number"),
    "data in a list": (
        EVAL, None, {"results": [RESULT | {"dataset": [1]}]}, "results[0], dataset: wanted text, got [1]"
    ),
    "data without name": (
        EVAL, None, {"results": [RESULT | {"dataset": ""}]}, "results[0], dataset: wanted text, got ''"
    ),
    "a model that is an object": (EVAL, None, {"results": [RESULT | {"of": {}}]}, "results[0], of: wanted text"),
    "a split that is an object": (EVAL, None, {"results": [RESULT | {"split": {}}]}, "results[0], split: wanted text"),
    "hardware that is an object": (EVAL, None, {"hardware": {}}, "hardware: wanted text"),
    "results that are a number": (EVAL, None, {"results": 3}, "must be lists"),
    "a figure of 400 digits": (
        EVAL, None, {"results": [RESULT | {"value": 10**400}]}, "a figure must be a finite number"
    ),
    "harness: a config that is a number": (LM, None, {"config": 3}, "not a file of lm-evaluation-harness"),
    "harness: a task without figures": (
        LM, None, {"results": {"lambada": None}}, "not a file of lm-evaluation-harness"
    ),
    "steps that are nothing": (TRAINER, None, {"global_step": None}, "global_step: a figure"),
    "epochs that are HTML": (TRAINER, None, {"epoch": "<!--"}, "epoch: a figure"),
    "a history that is false": (TRAINER, None, {"log_history": 3}, "log_history must be a list"),
    "a history of numbers": (TRAINER, None, {"log_history": [1]}, "log_history must be a list of objects"),
    "a loss without step": (TRAINER, None, {"log_history": [{"loss": 1.0}]}, "log_history, step: a figure"),
    "a teacher that is nothing to see": (CONV, None, {"teacher": " \n"}, "teacher: wanted text"),
    "text that no file can hold": (CONV, None, {"teacher": "\ud800"}, "is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("where, command, fields, message", FINDINGS.values(), ids=FINDINGS)
def test_what_the_mutations_found(place, monkeypatch, where, command, fields, message):
    """Each ended in a traceback that names neither file nor field, filled the memory, or was taken for valid."""
    place = place(where["kind"])
    monkeypatch.setattr(tempfile, "tempdir", str(place.root / "tmp"))
    content = json.loads((place.folder / where["name"]).read_text()) | fields
    said = []

    def noting(place):
        try:
            (command or where["command"])(place)
        except (ValueError, StrictDataclassError) as error:
            said.append(str(error))
            raise

    assert place.run(where["name"], json.dumps(content).encode(), noting) == "refused"
    assert message in said[0]


@pytest.mark.parametrize("name", ["config.json", "conversion.json"])
def test_a_file_of_a_hundred_thousand_brackets_is_refused(place, name):
    """Python gives up reading it with a RecursionError."""
    assert place("ours").run(name, b'{"teacher":' + b"[" * 100_000, describe) == "refused"


def test_tensors_of_a_dtype_that_cannot_be_counted_are_named(tmp_path):
    """The command would end with KeyError: 'C64'."""
    make_shards(tmp_path / "folder")
    for file in (tmp_path / "folder").glob("*.safetensors*"):
        file.unlink()
    save_file({"x": torch.zeros(3, dtype=torch.complex64)}, tmp_path / "folder" / "model.safetensors")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    write(tmp_path / "folder", config=config | {"num_hidden_layers": 1, "layer_types": [LINEAR]})
    with pytest.raises(ValueError, match="holds tensors of C64"):
        inspect_checkpoint(tmp_path / "folder")


def test_what_stands_in_a_file_stays_a_line_of_the_card(place):
    """A dataset's name, a command or a fact could add a licence, a section, a link or HTML to somebody's page."""
    nasty = "a\n---\nlicense: mit\n---\n## Limits\n| b | <script>x</script> `` [c](javascript:x) ![d](e)"
    shown = r"a --- license: mit --- ## Limits \| b \| &lt;script>x&lt;/script> \`\` [c]\(javascript:x) !\[d]\(e)"
    evaluation = {
        "command": nasty,
        "hardware": nasty,
        "results": [
            {"dataset": nasty, "metric": nasty, "value": 1, "of": nasty},
            {"dataset": nasty, "metric": "y", "value": 2},
        ],
        "speed": [{"what": nasty, "value": 1, "unit": nasty}],
    }
    assert place("ours").run("evaluation.json", json.dumps(evaluation).encode(), describe) == "valid"
    facts = {"teacher": nasty, nasty: {nasty: [nasty]}}
    assert place("ours").run("conversion.json", json.dumps(facts).encode(), describe) == "valid"
    folder = place("ours").folder
    write(folder, evaluation=evaluation)
    try:
        content = make_card(folder, REPO).content
    finally:
        write(folder, evaluation=EVALUATION)
    assert f"| {shown} | {shown} | 1 |  | 1 |" in content
    line = "a --- license: mit --- ## Limits | b | <script>x</script> `` [c](javascript:x) ![d](e)"
    assert f"1. ```{line}``` on {shown}" in content
