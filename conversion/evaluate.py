"""`deltanet evaluate`: a model's perplexity, what it recalls by length, and how far it is from its teacher.

The figures go into the folder's `evaluation.json`, with the command that made them: what `deltanet card` fills cards
from and `deltanet push` asks for. Perplexity alone hides that a converted model has lost its recall, so recall is
always measured.
"""

import dataclasses
import difflib
import json
import math
import os
import platform
import shlex
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import AutoPeftModelForCausalLM
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

import modeling_deltanet  # noqa: F401  makes `model_type: deltanet` known to the Auto classes
from modeling_deltanet.cache_deltanet import new_file

from .checkpoint import fetch, has_tokenizer, load_tokenizer
from .files import is_hub_id, own_file, public_name, read_json
from .recall_tasks import KEYS, RecallTasks
from .sample import go_on


RECALL_LENGTHS = (256, 1024, 4096)  # those up to the model's max_position_embeddings
DTYPES = ("float32", "bfloat16", "float16")
AGREEMENT_TOKENS = 32
PROMPT_TOKENS = 64  # of a text to go on from, at most
DECODED = 16  # tokens whose time is taken
THIS, TEACHER = "", "teacher"  # what a figure is of, as evaluation files say it


@dataclass(frozen=True)
class Evaluation:
    """What to measure, and of which model.

    Args:
        folder: a checkpoint or an adapter.
        teacher: the model that it was converted from, folder or repository: measured beside it.
        beside: more models to measure, "NAME=FOLDER" or a folder: other choices of layers, stages of the conversion.
        data: text for perplexity, see `load_text`, that neither model was trained on.
        split: of a dataset on the Hub.
        length, blocks: of the text, so many blocks of so many tokens.
        recall_lengths: tokens of a text to recall from; 256, 1024 and 4096 by default, as far as the model's
            positions go.
        episodes: texts per length.
        chats: held-out chats, or prompts with completions, for how far greedy answers agree with the teacher's;
            pieces of `data` by default.
        speed_lengths: tokens after which the cache is weighed and a token's time taken, `speed_batch` texts at once.
        batch_size: blocks at a time; for recall, as many texts as have together the tokens of so many blocks.
        tasks: of lm-evaluation-harness, by name or YAML file; `limit` examples of each, all by default.
        dtype: to compute in; bfloat16 on a GPU and float32 on a CPU by default.
        output: the file to write; by default `evaluation.json` in the folder, or `evaluation-recall.json` beside one
            that something else has written.
    """

    folder: str
    teacher: str | None = None
    data: tuple[str, ...] = ()
    text_column: str = "text"
    split: str = "test"
    length: int = 512
    blocks: int = 64
    recall_lengths: tuple[int, ...] = ()
    episodes: int = 64
    batch_size: int = 4
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    seed: int = 0
    dtype: str | None = None
    output: str | None = None
    beside: tuple[str, ...] = ()
    chats: tuple[str, ...] = ()
    speed_lengths: tuple[int, ...] = ()
    speed_batch: int = 1

    def command(self) -> str:
        """The command line, with what is not a default, and nothing of where things lie on this machine."""
        words = ["deltanet evaluate", shlex.quote(public_name(self.folder))]
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if value == field.default or field.name == "output":
                continue
            option = {"tasks": "--task"}.get(field.name, f"--{field.name.replace('_', '-')}")
            if field.name.endswith("_lengths"):
                value = ",".join(map(str, value))
            for one in value if isinstance(value, tuple) else (value,):
                if field.name == "beside":
                    name, source = _named(one)
                    one = f"{name}={public_name(source)}"
                words += [option, shlex.quote(public_name(str(one)))]
        return " ".join(words)


def evaluate_checkpoint(evaluation: Evaluation) -> dict:
    """Measure and write the evaluation file; the same seed gives the same figures on the same machine.

    Returns what was written (`command`, `hardware`, `results`, `speed`), and `output`, the file's name.

    Raises:
        ValueError: a folder without model or tokenizer, a teacher of another vocabulary, text that is too short, a
            length that recall does not fit into, unknown tasks, or a file in the way. Nothing has been measured then.
    """
    e = evaluation
    output = _output(e)
    tasks = _harness_tasks(e.tasks)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if e.dtype not in (None, *DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {e.dtype!r}")
    dtype = getattr(torch, e.dtype or ("bfloat16" if device == "cuda" else "float32"))
    tokenizer = _tokenizer(e.folder)
    rows = _blocks(e, tokenizer) if e.data else None
    recall = RecallTasks(tokenizer, None if rows is None else [i for row in rows for i in row])
    if e.chats and e.teacher is None:
        raise ValueError("chats (--chats) are for how far answers agree with a teacher's: give it (--teacher)")
    prompts = _prompts(e, tokenizer, rows) if e.teacher is not None else []
    sources = {} if e.teacher is None else {TEACHER: e.teacher}
    for name, source in (*map(_named, e.beside), (THIS, e.folder)):
        if name in sources:
            raise ValueError(f"beside (--beside) names two models {name!r}: name them, as in NAME=FOLDER")
        sources[name] = source
    models = {name: _model(source, dtype).to(device).eval() for name, source in sources.items()}
    size = models[THIS].config.vocab_size
    for name, model in models.items():
        if model.config.vocab_size != size:
            what = "no teacher" if name == TEACHER else "nothing to compare"
            raise ValueError(
                f"{e.folder} has a vocabulary of {size}, {sources[name]} one of {model.config.vocab_size}: {what}"
            )
    lengths = e.recall_lengths or _recall_lengths(models[THIS], recall)
    for length in lengths:
        next(recall.overwriting(length, 1, e.seed))  # refused before anything is measured

    results = []
    if rows is not None:
        results += _text_figures(models, rows, e)
    if prompts:
        results += _agreement_figures(models, tokenizer, prompts, e)
    where = f" of {', '.join(map(public_name, e.data))}" if e.data else ""
    for length in lengths:
        for metric, name, draw in (
            ("overwriting recall", f"{KEYS} keys overwritten within {length} tokens{where}", recall.overwriting),
            ("needle retrieval", f"one number within {length} tokens{where}", recall.needle),
        ):
            episodes = list(draw(length, e.episodes, e.seed))
            for of, model in models.items():
                shares = share_right(model, episodes, max(1, e.batch_size * e.length // length), f"{metric} {length}")
                results.append({"dataset": name, "metric": metric, "value": round(shares, 4), "of": of})
    for of, model in models.items() if tasks else ():
        results += [figure | {"of": of} for figure in _harness_figures(model, tokenizer, tasks, e)]

    speed = [figure | {"of": of} for of, model in models.items() for figure in _speed_figures(model, e)]

    def without_this(rows):
        return [{k: v for k, v in row.items() if (k, v) != ("of", THIS)} for row in rows]

    written = {"command": e.command(), "hardware": hardware(), "results": without_this(results)}
    written |= {"speed": without_this(speed)} if speed else {}
    with new_file(output) as unfinished:
        Path(unfinished).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return {"output": str(output), **written}


def hardware() -> str:
    """The machine and the versions that figures were measured with."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return f"{device}, Python {platform.python_version()}, torch {torch.__version__}"


def _output(e: Evaluation) -> Path:
    """The file to write: never one that something else has written."""
    folder = Path(e.folder) if Path(e.folder).is_dir() else Path()  # a repository's figures go to where we are
    names = [Path(e.output)] if e.output else [folder / "evaluation.json", folder / "evaluation-recall.json"]
    for name in names:
        if not name.exists() or str(read_json(name).get("command")).startswith("deltanet evaluate "):
            return name
    raise ValueError(f"{names[-1]} is not of `deltanet evaluate`: name another file by output (--output)")


# -------------------------------------------------------------------------------------------------- models and text


def _model(source: str, dtype: torch.dtype) -> PreTrainedModel:
    folder = _folder(source)
    is_adapter = (folder / "adapter_config.json").exists()
    auto_class = AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM
    return auto_class.from_pretrained(folder, dtype=dtype)


def _named(beside: str) -> tuple[str, str]:
    """The name of a model beside this one, and where it is."""
    name, _, source = beside.rpartition("=")
    return name or public_name(source), source


def _tokenizer(source: str):
    """The folder's tokenizer; an adapter's may lie with its base."""
    folder = _folder(source)
    if (folder / "adapter_config.json").exists() and not has_tokenizer(os.listdir(folder)):
        folder = fetch(_base(folder))
    return load_tokenizer(folder)


def _folder(source: str) -> Path:
    """The folder of a checkpoint or of an adapter whose base can be found."""
    folder = fetch(source)
    if (folder / "adapter_config.json").exists():
        _base(folder)
    elif not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds neither a config.json nor an adapter_config.json")
    return folder


def _base(folder: Path) -> str:
    base = read_json(own_file(folder, "adapter_config.json")).get("base_model_name_or_path")
    if not isinstance(base, str) or not (Path(base).is_dir() or is_hub_id(base)):
        raise ValueError(f"{folder}: its base, {base!r}, is no folder here and no repository of the Hub (owner/name)")
    return base


def _blocks(e: Evaluation, tokenizer) -> list[list[int]]:
    try:
        from .text import blocks, load_text
    except ImportError as error:
        raise ValueError(f"data ({', '.join(e.data)}) needs the package `datasets`, which is not installed") from error
    rows = blocks(load_text(list(e.data), e.text_column, e.split, tokenizer), tokenizer, e.length, e.seed)
    return rows.select(range(min(len(rows), e.blocks)))["input_ids"][:]


def _prompts(e: Evaluation, tokenizer, rows: list[list[int]] | None) -> list[list[int]]:
    """What greedy continuations begin with: chats that were not answered, or the beginnings of blocks of text."""
    if not e.chats:
        return [row[: min(PROMPT_TOKENS, e.length // 2)] for row in rows or ()]
    try:
        from .text import unanswered
    except ImportError as error:
        raise ValueError(
            f"chats ({', '.join(e.chats)}) need the package `datasets`, which is not installed"
        ) from error
    texts = unanswered(list(e.chats), tokenizer, e.text_column, e.split)[: e.blocks]
    return tokenizer(texts, add_special_tokens=False, verbose=False).input_ids


def _recall_lengths(model: PreTrainedModel, recall: RecallTasks) -> list[int]:
    limit = getattr(model.config, "max_position_embeddings", None) or RECALL_LENGTHS[-1]
    shortest = recall.shortest()
    return [length for length in RECALL_LENGTHS if shortest <= length <= limit] or [shortest]


# ----------------------------------------------------------------------------------------------------------- figures


@torch.no_grad()
def _text_figures(models: dict[str, PreTrainedModel], rows: list[list[int]], e: Evaluation) -> list[dict]:
    """Perplexity of each model, and KL(teacher || student) of each student in nats per token."""
    students = [of for of in models if of != TEACHER]
    sums, divergences, count = dict.fromkeys(models, 0.0), dict.fromkeys(students, 0.0), len(rows) * (e.length - 1)
    for start in tqdm(range(0, len(rows), e.batch_size), desc="perplexity", disable=None):
        ids = torch.tensor(rows[start : start + e.batch_size], device=models[THIS].device)
        logits = {of: model(input_ids=ids, use_cache=False).logits[:, :-1] for of, model in models.items()}
        for i in range(len(ids)):  # one at a time: in fp32, a vocabulary times a block is large
            log_p = {of: x[i].float().log_softmax(-1) for of, x in logits.items()}
            for of, x in log_p.items():
                sums[of] += F.nll_loss(x, ids[i, 1:], reduction="sum").item()
            if TEACHER in log_p:
                for of in students:
                    kl = F.kl_div(log_p[of], log_p[TEACHER], reduction="sum", log_target=True)
                    divergences[of] += kl.item()
    name = f"{', '.join(map(public_name, e.data))}, {len(rows)} blocks of {e.length} tokens"
    figures = [
        {"dataset": name, "metric": "perplexity", "value": round(math.exp(min(sums[of] / count, 600)), 4), "of": of}
        for of in models
    ]
    for of in students if TEACHER in models else ():
        value = round(divergences[of] / count, 6)
        figures.append({"dataset": name, "metric": "KL to the teacher, nats per token", "value": value, "of": of})
    return figures


def _agreement_figures(models: dict[str, PreTrainedModel], tokenizer, prompts: list, e: Evaluation) -> list[dict]:
    """How much of what the teacher writes greedily in fp32 a model writes, too, before it first writes otherwise.

    The teacher's own figure is what the dtype alone costs.
    """

    def written(model, title):
        rows = []
        for start in tqdm(range(0, len(prompts), 4 * e.batch_size), desc=f"agreement, {title}", disable=None):
            batch = prompts[start : start + 4 * e.batch_size]
            rows += go_on(model, tokenizer, batch, AGREEMENT_TOKENS, do_sample=False)
        return rows

    exact = models[TEACHER]
    if exact.dtype != torch.float32:
        exact = _model(e.teacher, torch.float32).to(exact.device).eval()
    wanted = written(exact, "the teacher in float32")
    text = ", ".join(map(public_name, e.chats or e.data))
    figures = []
    for of, model in models.items():
        found = wanted if model is exact else written(model, of or "this model")
        shares = [_common(one, other) for one, other in zip(wanted, found)]
        figures.append(
            {
                "dataset": f"{text}, {len(prompts)} prompts",
                "metric": f"greedy agreement with the fp32 teacher, first {AGREEMENT_TOKENS} tokens",
                "value": round(sum(shares) / len(shares), 4),
                "of": of,
            }
        )
    return figures


def _common(wanted: list[int], found: list[int]) -> float:
    """The share of `wanted`, and of its end where that is within reach, up to the first difference."""
    one, other = ([*row, -1][:AGREEMENT_TOKENS] for row in (wanted, found))
    same = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    return same / len(one)


@torch.no_grad()
def _speed_figures(model: PreTrainedModel, e: Evaluation) -> list[dict]:
    """What the cache weighs after so many tokens, and what the next token costs."""
    figures = []
    of_texts = f" of {e.speed_batch} texts" if e.speed_batch > 1 else ""
    for length in e.speed_lengths:
        ids = torch.randint(model.config.vocab_size, (e.speed_batch, length), device=model.device)
        seconds, size = time_decoding(model, ids, DECODED)
        figures += [
            {"what": f"cache after {length} tokens{of_texts}", "value": round(size / 1e6, 6), "unit": "MB"},
            {"what": f"the next token after {length}{of_texts}", "value": round(1000 * seconds, 3), "unit": "ms"},
        ]
    return figures


@torch.no_grad()
def time_decoding(model: PreTrainedModel, ids: torch.Tensor, steps: int, part: int | None = None) -> tuple[float, int]:
    """Seconds of a token after `ids` (`[B, T]`), the median of `steps`, and the bytes of the cache after `ids`: eager,
    with a cache that grows. `ids` are read `part` tokens at a time, by default at once.

    All of it is done twice, and the second time counts: cuDNN's attention plans anew for every length that it has not
    seen, tens of milliseconds each, which would be charged to the model that is timed first.
    """
    for _ in range(2):
        cache = None
        for tokens in ids.split(part or ids.shape[1], dim=1):
            cache = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
        size = cache_bytes(cache)
        token, times = ids[:, -1:], []
        for _ in range(steps):
            start = time.perf_counter()
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
            token.tolist()  # waits for the device
            times.append(time.perf_counter() - start)
        del cache
    return statistics.median(times), size


def cache_bytes(cache) -> int:
    """Of all tensors that a cache holds: keys, values, states, convolutions' inputs."""

    def tensors(x):
        if isinstance(x, torch.Tensor):
            return {x.untyped_storage().data_ptr(): x.numel() * x.element_size()}
        values = x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else ()
        return {pointer: size for value in values for pointer, size in tensors(value).items()}

    return sum(size for layer in cache.layers for size in tensors(vars(layer)).values())


@torch.no_grad()
def share_right(model: PreTrainedModel, episodes: list, batch_size: int, title: str) -> float:
    """Of all the questions, how many are answered by the likeliest tokens."""
    right = asked = 0
    for start in tqdm(range(0, len(episodes), batch_size), desc=title, disable=None):
        batch = episodes[start : start + batch_size]
        ids = torch.tensor([episode.ids for episode in batch], device=model.device)
        columns = sorted({at - 1 for episode in batch for answer in episode.answers for at in answer})
        keep = torch.tensor(columns, device=model.device)
        likeliest = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits.argmax(-1).tolist()
        for episode, row in zip(batch, likeliest):
            after = dict(zip(columns, row))
            for answer in episode.answers:
                right += all(after[at - 1] == episode.ids[at] for at in answer)
                asked += 1
    return right / asked


# ------------------------------------------------------------------------------------------- lm-evaluation-harness


def _harness_tasks(names: tuple[str, ...]):
    """lm-evaluation-harness's task manager, which knows all of `names`. None where none were asked for."""
    if not names:
        return None
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(
            f"task {', '.join(names)} is lm-evaluation-harness's, which is not installed: pip install lm-eval"
        ) from error
    manager = TaskManager(include_defaults=not all(Path(name).is_file() for name in names))
    for name in names:
        if name not in manager.all_tasks and not Path(name).is_file():
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise ValueError(
                f"lm-evaluation-harness has no task {name!r}" + (f"; near: {', '.join(near)}" if near else "")
            )
    return manager


def _harness_figures(model: PreTrainedModel, tokenizer, manager, e: Evaluation) -> list[dict]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from .card import harness_metrics

    measured = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=e.batch_size),
        tasks=list(e.tasks),
        task_manager=manager,
        limit=e.limit,
        bootstrap_iters=0,
        random_seed=e.seed,
        numpy_random_seed=e.seed,
        torch_random_seed=e.seed,
        fewshot_random_seed=e.seed,
    )
    return [
        {"dataset": task, "dataset_id": task, "metric": metric, "value": value}
        for task, metrics in measured["results"].items()
        for metric, value in harness_metrics(metrics)
        if isinstance(value, int | float)  # a group of tasks without a mean has "N/A"
    ]
