"""Model cards: facts of a checkpoint and figures with their source, filled into `model_cards/TEMPLATE.md`.

What stands in a card is read from files: the configuration, the weights' headers, `trainer_state.json`,
`conversion.json`, and evaluation files. A figure without the command that made it is refused, and a section for which
there is no figure says so. An evaluation file is JSON, either what lm-evaluation-harness writes, or:

    {
      "command": "python examples/quickstart.py",
      "hardware": "2 CPU cores, torch 2.13.0",
      "results": [
        {"dataset": "documentation, held out", "metric": "perplexity", "value": 57.1},
        {"dataset": "documentation, held out", "metric": "perplexity", "value": 2100.3, "of": "before training"}
      ],
      "speed": [{"what": "one decode step after 32K tokens", "value": 2.2, "unit": "ms"}]
    }

`of` names another model that was measured beside this checkpoint (a teacher, a stage of the conversion): it gets a
column of its own and stays out of the metadata's `model-index`.
"""

import importlib.metadata
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

import modeling_deltanet
from modeling_deltanet import DeltaNetConfig
from modeling_deltanet.cache_deltanet import new_file
from modeling_deltanet.versions_deltanet import NEWEST, OLDEST

from .card_check import MISSING
from .files import is_hub_id, own_file, read_json
from .hub_names import language_problem, license_problem


EVALUATION_KEYS = {"command", "hardware", "results", "speed"}
RESULT_KEYS = {"dataset", "dataset_id", "metric", "value", "of", "split"}
SPEED_KEYS = {"what", "value", "unit"}  # and, as of a result, "of"


@dataclass(frozen=True)
class Figure:
    """One measured value: of which model (`""` is this checkpoint), on what, and the command that made it."""

    dataset: str
    metric: str
    value: float
    command: str
    hardware: str = ""
    of: str = ""
    split: str | None = None
    dataset_id: str | None = None


@dataclass(frozen=True)
class Speed:
    """One measured time or rate, as text with its unit."""

    what: str
    value: str
    command: str
    hardware: str = ""


def make_card(
    checkpoint: str | os.PathLike,
    repo_id: str,
    *,
    title: str | None = None,
    summary: str | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    datasets: list[str] | None = None,
    base_model: str | None = None,
    training: str | None = None,
    limits: str | None = None,
    evaluations: list[str | os.PathLike] | None = None,
    trainer_state: str | os.PathLike | None = None,
    conversion: str | os.PathLike | None = None,
    template: str | os.PathLike | None = None,
) -> ModelCard:
    """The card of a DeltaNet checkpoint or adapter in a local folder; writes nothing.

    Args:
        checkpoint: folder with `config.json` and safetensors, or with `adapter_config.json`.
        repo_id: where it will be published, `owner/name`; the usage example loads from there. A name alone will do:
            `deltanet push` fills in the owner.
        title, summary, limits: text; the repository's name, and a mark that `deltanet push` refuses, by default.
        license, language: the Hub's identifiers, such as "apache-2.0" and "en".
        datasets: names of those on the Hub.
        base_model: Hub id of the model that an adapter belongs to, or that this one was made from. Beside a `repo_id`
            without an owner it may lack one, too.
        training: text about the training, put before what `trainer_state.json` says.
        evaluations: evaluation files; every `evaluation*.json` in the folder by default.
        trainer_state: a Trainer's `trainer_state.json`; the folder's own by default.
        conversion: `conversion.json`, an object with `teacher` and whatever else is to be told; the folder's own by
        default. template: another Jinja template.

    Raises:
        ValueError: a folder that is neither a DeltaNet nor an adapter, an adapter without a base that the Hub could
            know, a licence or a language that the Hub does not know, a damaged file, or a figure without a number or
            a source. The file and the place in it are named.
    """
    validate_repo_id(repo_id)
    for problem in (license is not None and license_problem(license), language and language_problem(language)):
        if problem:
            raise ValueError(problem)
    folder = Path(checkpoint)
    if evaluations is None:
        evaluations = [own_file(folder, file.name) for file in sorted(folder.glob("evaluation*.json"))]
    figures, speeds = read_evaluations(evaluations, repo_id)
    converted = _conversion(_own(folder, conversion, "conversion.json"), figures)
    if converted and base_model is None and converted["on_hub"]:
        base_model = converted["teacher"]

    adapter = None
    if (folder / "adapter_config.json").exists():
        adapter, architecture, layers, auto_class = _adapter(folder, base_model, needs_owner="/" in repo_id)
        base_model = base_model or adapter["base_model"]
    elif (folder / "config.json").exists():
        architecture, layers, auto_class = _architecture(folder)
    else:
        raise ValueError(f"{folder} holds neither a config.json nor an adapter_config.json")

    data = ModelCardData(
        language=language,
        license=license,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation" if auto_class == "AutoModelForCausalLM" else None,
        tags=["deltanet", "linear-attention"] + ([adapter["kind"].lower()] if adapter else []),
        base_model=base_model,
        base_model_relation="adapter" if adapter else "finetune" if base_model else None,
        datasets=datasets,
        model_name=repo_id.split("/")[-1],
        eval_results=_model_index(figures),
    )
    commands = list(dict.fromkeys((x.command, x.hardware) for x in [*figures, *speeds]))
    return ModelCard.from_template(
        data,
        template_str=Path(template).read_text(encoding="utf-8") if template else _template(),
        title=title or repo_id.split("/")[-1],
        summary=summary or MISSING,
        repo_id=repo_id,
        repository=repository(),
        transformers=(OLDEST, NEWEST),
        adapter=adapter,
        auto_class=auto_class,
        base_model=base_model,
        architecture=architecture,
        layers=layers,
        training=_training(training, _own(folder, trainer_state, "trainer_state.json")),
        conversion=converted,
        has_curve=(folder / "loss.png").exists(),
        evaluation=_table(figures, commands),
        speed=[
            {
                "what": _inline(s.what),
                "value": _inline(s.value),
                "commands": commands.index((s.command, s.hardware)) + 1,
            }
            for s in speeds
        ],
        commands=[{"text": text, "code": _code(text), "hardware": _inline(hardware)} for text, hardware in commands],
        limits=limits or MISSING,
    )


def repository() -> str | None:
    """Where this package can be installed from: `Repository` of [project.urls] in pyproject.toml, if it is set."""
    try:
        urls = importlib.metadata.metadata("modeling-deltanet").get_all("Project-URL") or []
    except importlib.metadata.PackageNotFoundError:  # run from its source
        return None
    return next((url for label, _, url in (entry.partition(", ") for entry in urls) if label == "Repository"), None)


def write_card(card: ModelCard, file: str | os.PathLike) -> None:
    """Save a card; one that stands there is replaced whole or not at all."""
    with new_file(file) as unfinished:
        card.save(unfinished)


def read_evaluations(paths: list[str | os.PathLike], repo_id: str) -> tuple[list[Figure], list[Speed]]:
    """Figures and speeds of evaluation files, ours or lm-evaluation-harness's, in their order.

    Raises:
        ValueError: what is not such a file; a figure that is no number or has no command; an unknown key.
    """
    figures, speeds = [], []
    for path in paths:
        content = read_json(path)
        if isinstance(content.get("results"), dict):
            figures += _harness_figures(path, content, repo_id)
            continue
        _refuse_unknown(path, content, EVALUATION_KEYS)
        results, timings = content.get("results") or [], content.get("speed") or []
        if not isinstance(results, list) or not isinstance(timings, list):
            raise ValueError(f'{path}: "results" and "speed" must be lists')
        if not results and not timings:
            raise ValueError(f'{path}: neither "results" nor "speed" holds a figure')
        if not isinstance(content.get("command"), str):
            raise ValueError(f'{path}: no "command": a figure needs the command that made it')
        source = {
            "command": _text(f"{path}: command", content["command"]),
            "hardware": _text(f"{path}: hardware", content.get("hardware", ""), may_be_empty=True),
        }
        for i, entry in enumerate(results):
            _refuse_unknown(f"{path}: results[{i}]", entry, RESULT_KEYS, required=("dataset", "metric", "value"))
            texts = {
                key: _text(f"{path}: results[{i}], {key}", entry[key], may_be_empty=key == "of")
                for key in RESULT_KEYS - {"value"}
                if entry.get(key) is not None or key in ("dataset", "metric")
            }
            figures.append(Figure(**texts, value=_number(f"{path}: results[{i}]", entry["value"]), **source))
        for i, entry in enumerate(timings):
            _refuse_unknown(f"{path}: speed[{i}]", entry, {*SPEED_KEYS, "of"}, required=SPEED_KEYS)
            value = _number(f"{path}: speed[{i}]", entry["value"])
            what, unit = (_text(f"{path}: speed[{i}], {key}", entry[key]) for key in ("what", "unit"))
            if entry.get("of"):
                what += f", {_text(f'{path}: speed[{i}], of', entry['of'])}"
            speeds.append(Speed(what, f"{_format(value)} {unit}", **source))
    return figures, speeds


def _harness_figures(path, content: dict, repo_id: str) -> list[Figure]:
    """What lm-evaluation-harness measured. Its file has no command line, but everything that one is made of."""
    config, shots = content.get("config"), content.get("n-shot") or {}
    if not isinstance(config, dict) or "model" not in config:
        raise ValueError(f'{path}: "config" does not name the model: not a file of lm-evaluation-harness')
    if not isinstance(shots, dict) or not all(isinstance(m, dict) for m in content["results"].values()):
        raise ValueError(
            f'{path}: "n-shot" and each of "results" must be an object: not a file of lm-evaluation-harness'
        )
    model = _text(f"{path}: config, model", config["model"])
    figures = []
    for task, metrics in content["results"].items():
        task = _text(f"{path}: results", task)
        command = f"lm_eval --model {model} --model_args pretrained={repo_id},trust_remote_code=True --tasks {task}"
        if shots.get(task):
            command += f" --num_fewshot {_number(f'{path}: n-shot, {task}', shots[task])}"
        for metric, value in harness_metrics({_text(f"{path}: {task}", k, True): v for k, v in metrics.items()}):
            figures.append(Figure(task, metric, _number(f"{path}: {task}, {metric}", value), command, dataset_id=task))
    return figures


def harness_metrics(metrics: dict) -> Iterator[tuple[str, object]]:
    """The metrics of one of lm-evaluation-harness's tasks, which are named `metric,filter`, without their errors."""
    for name, value in metrics.items():
        metric, _, metric_filter = name.partition(",")
        if metric_filter and not metric.endswith("_stderr"):
            yield metric if metric_filter == "none" else f"{metric} ({metric_filter})", value


def _template() -> str:
    return files("deltanet_conversion.model_cards").joinpath("TEMPLATE.md").read_text(encoding="utf-8")


def _architecture(folder: Path) -> tuple[list[tuple[str, str]], str, str]:
    """Rows of the table, the layer pattern in words, and the Auto class, from the configuration and the weights."""
    content = read_json(own_file(folder, "config.json"))
    if (model_type := content.get("model_type")) != "deltanet":
        raise ValueError(f"{folder / 'config.json'} is of model_type {model_type!r}, not 'deltanet'")
    try:
        config = DeltaNetConfig.from_dict(content)
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    count, dtypes = _parameters(folder)
    linear = f"{config.linear_num_key_heads} key heads of {config.linear_key_head_dim}, "
    linear += f"{config.linear_num_value_heads} value heads of {config.linear_value_head_dim}; "
    linear += f"{config.linear_qk_activation} and {config.linear_qk_norm} norm on q and k; "
    linear += f"convolution of {config.linear_conv_kernel_dim}" if config.linear_conv_kernel_dim else "no convolution"
    if not config.linear_use_beta:
        linear += "; step size 1"
    if not config.linear_use_delta_rule:
        linear += "; no delta rule, writes only add"
    if config.linear_allow_neg_eigval:
        linear += "; step sizes up to 2"
    if config.linear_use_decay:
        linear += "; a decay per value head"
    if config.linear_use_output_gate:
        linear += "; output gate"
    if config.linear_use_rope:
        linear += "; rotary embedding"
    rows = [
        ("model type", "DeltaNet (`model_type: deltanet`)"),
        ("parameters", f"{count:,}, stored in {', '.join(dtypes)}"),
        ("layers", ", ".join(f"{config.layer_types.count(t)} x `{t}`" for t in dict.fromkeys(config.layer_types))),
        ("hidden size, MLP, vocabulary", f"{config.hidden_size}, {config.intermediate_size}, {config.vocab_size}"),
    ]
    if "linear_attention" in config.layer_types:
        rows.append(("linear layers", linear))
    if set(config.layer_types) != {"linear_attention"}:
        softmax = f"{config.num_attention_heads} heads of {config.head_dim}, "
        softmax += f"{config.num_key_value_heads} for keys and values; "
        softmax += (
            f"rotary embedding, theta {config.rope_parameters['rope_theta']:g}"
            if config.uses_rope
            else "no rotary embedding"
        )
        if config.sliding_window is not None:
            softmax += f"; window of {config.sliding_window} tokens"
        rows.append(("softmax layers", softmax))
    rows.append(("context that positions were made for", f"{config.max_position_embeddings} tokens"))
    architecture = (config.architectures or ["DeltaNetForCausalLM"])[0]
    if architecture not in modeling_deltanet.__all__:
        raise ValueError(f"{folder / 'config.json'} names {architecture!r} as its architecture, which is no DeltaNet")
    return rows, _pattern(config.layer_types), architecture.replace("DeltaNet", "AutoModel", 1)


def _adapter(folder: Path, base_model: str | None, needs_owner: bool) -> tuple[dict, list[tuple[str, str]], str, str]:
    config = read_json(own_file(folder, "adapter_config.json"))
    base = base_model or config.get("base_model_name_or_path")
    if not is_hub_id(base) and (needs_owner or not is_hub_id(f"owner/{base_model}")):
        raise ValueError(
            f"{folder / 'adapter_config.json'}: base_model_name_or_path is {base!r}, which is no repository of the "
            "Hub (owner/name); name the base with base_model (--base-model)"
        )
    count, dtypes = _parameters(folder)
    file = folder / "adapter_config.json"
    kind, targets = config.get("peft_type"), config.get("target_modules") or []
    if not isinstance(kind, str) or not re.fullmatch(r"\w+", kind, re.ASCII):
        raise ValueError(f"{file} has peft_type {kind!r}, wanted the name of a method")
    targets = [targets] if isinstance(targets, str) else targets
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise ValueError(f"{file} has target_modules {targets!r}, wanted names")
    settings = [
        f"{name} {_number(f'{file}: {key}', config[key])}"
        for key, name in (("r", "rank"), ("lora_alpha", "alpha"))
        if config.get(key) is not None
    ]
    rows = [
        ("adapter", ", ".join([kind, *settings])),
        ("adapted modules", ", ".join(_code(_text(f"{file}: target_modules", name)) for name in sorted(targets))),
        ("parameters", f"{count:,}, stored in {', '.join(dtypes)}"),
    ]
    return {"kind": kind, "base_model": base}, rows, "", "AutoModelForCausalLM"


def _parameters(folder: Path) -> tuple[int, list[str]]:
    """How many numbers the safetensors files hold, and in which dtypes; reads headers only."""
    weights = [own_file(folder, file.name) for file in sorted(folder.glob("*.safetensors"))]
    if not weights:
        raise ValueError(f"{folder} holds no safetensors file")
    count, dtypes = 0, []
    for file in weights:
        try:
            with safe_open(file, framework="numpy") as f:
                slices = [f.get_slice(name) for name in f.keys()]  # noqa: SIM118 (safe_open is no dict)
        except SafetensorError as error:
            raise ValueError(f"{file} is not a complete safetensors file: {error}") from error
        count += sum(math.prod(x.get_shape()) for x in slices)
        dtypes += [x.get_dtype() for x in slices]
    return count, list(dict.fromkeys(dtypes))


def _pattern(layer_types: list[str]) -> str:
    """The layers in order, in its shortest form: a repeated period, or runs."""
    n = len(layer_types)
    period = next(p for p in range(1, n + 1) if n % p == 0 and layer_types[:p] * (n // p) == layer_types)
    runs = []
    for layer_type in layer_types[:period]:
        if runs and runs[-1][1] == layer_type:
            runs[-1][0] += 1
        else:
            runs.append([1, layer_type])
    text = ", ".join(f"`{t}`" if count == 1 else f"{count} x `{t}`" for count, t in runs)
    return text if n == period else f"{n} x `{layer_types[0]}`" if period == 1 else f"{n // period} times ({text})"


def _training(text: str | None, file: Path | None) -> str:
    """The user's text, then what a Trainer has recorded."""
    parts = [text] if text else []
    if file is not None:
        state = read_json(file)
        history = state.get("log_history") or []
        if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
            raise ValueError(f"{file}: log_history must be a list of objects")
        facts = [
            form.format(_number(f"{file}: {key}", state[key]))
            for key, form in (
                ("global_step", "{:,} steps"),
                ("train_batch_size", "{} sequences per step and device"),
                ("epoch", "{:.2f} epochs"),
                ("num_input_tokens_seen", "{:,} tokens"),
            )
            if state.get(key) or (key == "global_step" and key in state)
        ]
        for key, name in (("loss", "training loss"), ("eval_loss", "held-out loss")):
            if entries := [entry for entry in history if key in entry]:
                loss, step = (_number(f"{file}: log_history, {k}", entries[-1].get(k)) for k in (key, "step"))
                facts.append(f"{name} {loss:.3f} at step {step}")
        parts.append(f"From {_code(file.name)}: {', '.join(facts)}.")
    return "\n\n".join(parts) or "Not recorded."


def _conversion(file: Path | None, figures: list[Figure]) -> dict | None:
    if file is None:
        return None
    content = read_json(file)
    if not isinstance(content.get("teacher"), str):
        raise ValueError(f'{file}: no "teacher": a conversion names the model it came from')
    teacher = _text(f"{file}: teacher", content["teacher"])
    return {
        "teacher": _inline(teacher),
        "on_hub": is_hub_id(teacher),
        "facts": [
            (_inline(_line(name.replace("_", " "))), _inline(_line(_fact(value))))
            for name, value in content.items()
            if name != "teacher"
        ],
        "has_recall": any("recall" in f"{f.dataset} {f.metric}".lower() for f in figures),
    }


def _fact(value) -> str:
    """A value of `conversion.json` in words; a stage of the conversion is an object of its own facts."""
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_fact(x)}" for name, x in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def _table(figures: list[Figure], commands: list[tuple[str, str]]) -> dict | None:
    """A row for each data and metric, a column for each model that was measured."""
    if not figures:
        return None
    models = list(dict.fromkeys(f.of for f in figures))
    rows = []
    for dataset, metric in dict.fromkeys((f.dataset, f.metric) for f in figures):
        of_row = [f for f in figures if (f.dataset, f.metric) == (dataset, metric)]
        cells = {f.of: f for f in of_row}
        if len(cells) < len(of_row):
            raise ValueError(f"two figures for {metric} on {dataset} of the same model: {[f.value for f in of_row]}")
        numbers = sorted({commands.index((f.command, f.hardware)) + 1 for f in cells.values()})
        rows.append(
            {
                "dataset": _inline(dataset),
                "metric": _inline(metric),
                "values": [_format(cells[model].value) if model in cells else "" for model in models],
                "commands": ", ".join(map(str, numbers)),
            }
        )
    return {"columns": [_inline(model) or "this checkpoint" for model in models], "rows": rows}


def _model_index(figures: list[Figure]) -> list[EvalResult] | None:
    own = [f for f in figures if not f.of]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=f.dataset_id or "-".join(f.dataset.lower().replace(",", " ").split()) or "unnamed",
            dataset_name=f.dataset,
            dataset_split=f.split,
            metric_type=f.metric,
            metric_name=f.metric,
            metric_value=f.value,
        )
        for f in own
    ] or None


def _own(folder: Path, given: str | os.PathLike | None, name: str) -> Path | None:
    """The file that was given, otherwise the folder's own of this name if it has one."""
    if given is not None:
        return Path(given)
    return own_file(folder, name) if os.path.lexists(folder / name) else None


def _refuse_unknown(where, entry, known: set[str], required=()) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be an object, got {entry!r}")
    if unknown := sorted(set(entry) - known):
        raise ValueError(f"{where} has no key {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    if missing := sorted(set(required) - set(entry)):
        raise ValueError(f"{where} lacks {', '.join(missing)}")


def _number(where: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e300 < value < 1e300:
        raise ValueError(f"{where}: a figure must be a finite number, got {value!r}")
    return value


def _text(where: str, value, may_be_empty: bool = False) -> str:
    """A string of a file, in one line."""
    if not isinstance(value, str) or not (may_be_empty or _line(value)):
        raise ValueError(f"{where}: wanted text, got {value!r}")
    return _line(value)


def _line(text: str) -> str:
    """Text in one line that can be shown: a line break would begin a heading, a table, or the end of the metadata."""
    text = re.sub(r"\\\r?\n", " ", text)  # a command that goes on in the next line
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _inline(text: str) -> str:
    """A line as Markdown that shows just this: no cell, code, HTML or link of its own."""
    text = re.sub(r"[\\`|]", r"\\\g<0>", text).replace("<", "&lt;")
    return re.sub(r"(\]|!)(?=[\[(])", r"\1\\", text)


def _code(text: str) -> str:
    """A line as a span of code, whatever backticks it holds."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def _format(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
