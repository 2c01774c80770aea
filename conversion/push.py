"""Publishing a checkpoint or an adapter: validate, show what would be sent, one commit, pull it back and compare.

`prepare` reads the folder and refuses what is not fit to be published: it touches no network but for an adapter's
base. `publish` sends everything in one commit, on top of the head that it has seen, so that a revision is never half
updated: whatever fails before the commit leaves the branch where it was. What an interrupted push can leave behind is
an empty repository or a branch equal to main, and uploaded content that no commit names.

Retried are lost connections and failures of the server (429, 5xx) while content is uploaded, by huggingface_hub
itself. A commit that fails is not sent again: the branch is read, and if the commit has arrived after all, the push
goes on.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from huggingface_hub.utils import validate_repo_id

from .card_check import card_license, card_problems, is_license, is_stub, with_owner
from .collect import collect, strays
from .files import check_named_files, is_hub_id, read_json
from .hub_names import license_problem
from .scan import Problem, scan


# huggingface_hub's HTTP library, httpx up to 1.x and httpx2 since, has no name that fits both.
HTTP_ERROR = HfHubHTTPError.__bases__[0]

STALE_WEIGHTS = (".safetensors", ".safetensors.index.json")


class PushRefused(ValueError):
    """A folder that is not fit to be published; `problems` says why, by file and line."""

    def __init__(self, folder: Path, problems: list[Problem]):
        self.problems = problems
        super().__init__(f"{folder} cannot be published:\n" + "\n".join(f"  {problem}" for problem in problems))


class HubFailure(RuntimeError):
    """The Hub did not do what was asked; the message says in which state it is."""


class HubUnreachable(HubFailure):
    """There was no answer at all."""


class VerificationFailed(HubFailure):
    """What was pulled back is not what was sent."""


@dataclass(frozen=True)
class Content:
    """A file of the push: where its bytes are, and what identifies them, here and on the Hub."""

    source: Path | bytes
    size: int
    sha256: str
    git_oid: str


@dataclass(frozen=True)
class Plan:
    """What `prepare` found fit to be published."""

    repo_id: str
    kind: str  # "model" or "adapter"
    files: dict[str, Content]
    left_out: dict[str, str]
    loaded: dict  # what loading it has shown: class, parameters, new tokens

    @property
    def size(self) -> int:
        return sum(content.size for content in self.files.values())


@dataclass(frozen=True)
class Changes:
    """A plan against a revision of the Hub. `removed` are weights there that would shadow the new ones."""

    new: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.new or self.changed or self.removed)


@dataclass(frozen=True)
class Published:
    """What `publish` did. `commit` is the revision that holds the files; `sent` is False where it held them
    already.
    """

    repo_id: str
    commit: str
    url: str
    changes: Changes
    sent: bool
    pull_request: str | None
    verified: int


def push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    base_model: str | None = None,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    **options,
) -> Published:
    """`prepare`, then `publish` with `options`."""
    plan = prepare(folder, repo_id, base_model=base_model, include=include, exclude=exclude)
    return publish(plan, **options)


# ------------------------------------------------------------------------------------------------------------- prepare


def prepare(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    base_model: str | None = None,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
) -> Plan:
    """Read a folder and check that it can be published as `repo_id`; nothing is sent.

    The model must load in a fresh process that runs the code in the folder, not this package's, and generate a token.
    Code that is missing is added as `modeling_deltanet.register_remote_code` does it, and so are the owner in a card
    that was made for a name without one, and the text of apache-2.0; an adapter is loaded with its base.

    Args:
        folder: a DeltaNet checkpoint (config.json) or an adapter (adapter_config.json).
        repo_id: `owner/name`.
        base_model: for an adapter, the base's Hub id, written into `adapter_config.json` in place of a local folder.
        include: patterns of files to send that `collect` would leave out, or that `strays` asks about.
        exclude: patterns of files to leave out.

    Raises:
        PushRefused: with every problem, by file and line.
        ValueError: no such folder, or another architecture.
    """
    folder = Path(folder)
    validate_repo_id(repo_id)
    if repo_id.count("/") != 1:
        raise ValueError(f"the repository must be named as owner/name, got {repo_id!r}")
    is_adapter = (folder / "adapter_config.json").exists()
    if not is_adapter and not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds neither a config.json nor an adapter_config.json")
    if base_model is not None and not is_adapter:
        raise ValueError(f"{folder} is not an adapter: base_model ({base_model!r}) belongs into its card")

    sources, left_out, problems, foreign = collect(folder, tuple(include), tuple(exclude))
    if foreign:  # nothing of them is read, not even to look for more
        raise PushRefused(folder, problems + foreign)
    check_named_files(folder)
    strayed = strays(folder, sources, tuple(include))
    problems += strayed
    base = None
    if is_adapter:
        sources, base = _with_base(folder, sources, base_model)
        problems += _adapter_problems(base, sources)
    else:
        sources |= _missing_code(folder)
        if not any(name in sources for name in ("tokenizer.json", "tokenizer_config.json")):
            problems.append(Problem("tokenizer.json", None, "missing: nobody could use the model"))
    if not any(name.endswith(".safetensors") for name in sources):
        problems.append(Problem("*.safetensors", None, "missing: there are no weights"))

    problems += _foreign_code(folder, sources)
    if "README.md" not in sources:
        problems.append(Problem("README.md", None, "missing: make one with `deltanet card`"))
    elif is_stub(stored := (folder / "README.md").read_text(encoding="utf-8")):  # every line would be a problem
        del sources["README.md"]
        problems.append(Problem("README.md", None, "PEFT's stub: make a card with `deltanet card`"))
    else:
        card = with_owner(stored, repo_id, base)
        sources |= {} if card == stored else {"README.md": card.encode()}
        problems += [Problem("README.md", *problem) for problem in card_problems(card, repo_id, set(sources), base)]
        licence, missing = _license(card, sources)
        sources, problems = sources | licence, problems + missing
    to_decide = {problem.file for problem in strayed}  # gigabytes, maybe: not searched before they are wanted
    problems += scan({name: source for name, source in sources.items() if name not in to_decide})
    loaded = {}
    if not problems:  # loading takes longest, and what it would say of an incomplete folder helps nobody
        loaded = _load(folder, sources, is_adapter)
        problems += [Problem(*p) for p in loaded.pop("problems")]
    if problems:
        raise PushRefused(folder, problems)
    files = {name: _content(source) for name, source in sorted(sources.items())}
    return Plan(repo_id, "adapter" if is_adapter else "model", files, left_out, loaded)


def _missing_code(folder: Path) -> dict[str, bytes]:
    """The code files and the config.json that names them, for a folder that was saved without them.

    As `register_remote_code` does, this marks the classes for the life of the process.
    """
    config_file = folder / "config.json"
    stored = read_json(config_file)
    if stored.get("model_type") != "deltanet":
        raise ValueError(f"{config_file} is of model_type {stored.get('model_type')!r}, not 'deltanet'")
    references = _references(config_file, stored)
    if references and all(_module(reference, folder) for reference in references):
        return {}

    # Imported here: most folders have their code, and the command line should start without torch.
    import torch
    from transformers.dynamic_module_utils import custom_object_save

    import modeling_deltanet

    architectures = stored.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    if architecture not in modeling_deltanet.__all__:
        raise ValueError(
            f"{config_file} names {architectures!r} as its architectures, which is no model of this package"
        )
    modeling_deltanet.register_remote_code()
    try:
        config = modeling_deltanet.DeltaNetConfig.from_dict(stored)
        with torch.device("meta"):
            model = getattr(modeling_deltanet, architecture)(config)
    except (ValueError, RuntimeError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"{config_file}: {error}") from error
    config.auto_map = None  # a reference to another repository's code gives way to the code that goes along
    with tempfile.TemporaryDirectory() as written:
        custom_object_save(config, written, config=config)
        custom_object_save(model, written, config=config)
        code = {path.name: path.read_bytes() for path in Path(written).glob("*.py")}
    return code | {"config.json": _as_json(stored | {"auto_map": config.auto_map})}


def _references(file: Path, config: dict) -> list[str]:
    """What the `auto_map` of a config file leads to: a class, or several for a tokenizer."""
    auto_map = config.get("auto_map") or {}
    values = list(auto_map.values()) if isinstance(auto_map, dict) else [auto_map]
    references = [x for value in values for x in (value if isinstance(value, list) else [value]) if x is not None]
    if not isinstance(auto_map, dict) or not all(isinstance(reference, str) for reference in references):
        raise ValueError(f"{file} has auto_map {auto_map!r}, which does not name classes")
    return references


def _module(reference: str, folder: Path) -> Path | None:
    """The code file in the folder that a reference (`file.Class`) leads to. None for other repositories' and for
    paths.
    """
    match = re.fullmatch(r"(\w+)\.\w+", reference)
    return folder / f"{match[1]}.py" if match and (folder / f"{match[1]}.py").is_file() else None


def _license(card: str, sources: dict) -> tuple[dict[str, bytes], list[Problem]]:
    """The licence's text, where the folder lacks it and it is Apache-2.0, which is this package's own; otherwise the
    problem, unless the card links to the text.
    """
    name, has_link = card_license(card)
    if has_link or license_problem(name) or name == "unknown" or any(map(is_license, sources)):
        return {}, []
    if name == "apache-2.0":
        # of an editable install, the source's egg-info may come first, which has no text
        for found in importlib.metadata.distributions(name="modeling-deltanet"):
            if text := found.read_text("licenses/LICENSE"):
                return {"LICENSE": text.encode()}, []
    what = f"missing: put the text of {name} there, or license_link into the card's metadata"
    return {}, [Problem("LICENSE", None, what)]


def _foreign_code(folder: Path, sources: dict) -> list[Problem]:
    """References to code that does not go along: it would be run when this folder is loaded, here and there."""
    return [
        Problem(name, None, f"auto_map leads to {reference!r}, not to code in this folder")
        for name in ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
        if name in sources
        for reference in _references(folder / name, read_json(folder / name))
        if not _module(reference, folder)
    ]


def _with_base(folder: Path, sources: dict, base_model: str | None) -> tuple[dict, str]:
    config = read_json(folder / "adapter_config.json")
    if base_model is None:
        return sources, str(config.get("base_model_name_or_path"))
    renamed = _as_json(config | {"base_model_name_or_path": base_model})
    return sources | {"adapter_config.json": renamed}, base_model


def _adapter_problems(base: str, sources: dict) -> list[Problem]:
    problems = []
    if not is_hub_id(base):
        what = f"its base is {base!r}, which is no repository of the Hub (owner/name): give base_model (--base-model)"
        problems.append(Problem("adapter_config.json", None, what))
    if "config.json" in sources:
        problems.append(Problem("config.json", None, "a whole model beside an adapter: publish them separately"))
    return problems


def _load(folder: Path, sources: dict[str, Path | bytes], is_adapter: bool) -> dict:
    """Load exactly what would be sent, in a process of its own, and generate a token."""
    with tempfile.TemporaryDirectory() as staged:
        for name, source in sources.items():
            target = Path(staged, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, bytes):
                target.write_bytes(source)
            else:
                target.symlink_to(source.resolve())
        script = Path(__file__).with_name("load_check.py")
        local_base = ""
        if is_adapter:  # an adapter fresh from training knows its base by the folder
            stored = read_json(folder / "adapter_config.json")
            if Path(str(stored.get("base_model_name_or_path"))).is_dir():
                local_base = str(Path(stored["base_model_name_or_path"]).resolve())
        done = subprocess.run(
            # -P: this folder must not be searched for modules, one of which has the name of a standard one.
            [sys.executable, "-P", str(script), "adapter" if is_adapter else "model", staged, local_base],
            env={**os.environ, "HF_MODULES_CACHE": str(Path(staged, ".modules")), "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.DEVNULL,  # Transformers asks there whether to run code
            capture_output=True,
            text=True,
        )
    if done.returncode != 0:
        last = (done.stderr.strip() or "no message").splitlines()[-1].replace(staged, str(folder))
        return {
            "problems": [("config.json" if not is_adapter else "adapter_config.json", None, f"does not load: {last}")]
        }
    return json.loads(done.stdout.splitlines()[-1])


def _content(source: Path | bytes) -> Content:
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
    for block in [source] if isinstance(source, bytes) else _blocks(source):
        sha256.update(block)
        git.update(block)
    return Content(source, size, sha256.hexdigest(), git.hexdigest())


def _blocks(file: Path):
    with file.open("rb") as f:
        while block := f.read(1 << 22):
            yield block


def _as_json(content: dict) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


# ------------------------------------------------------------------------------------------------------------- publish


def preview(
    plan: Plan, *, revision: str | None = None, token: str | None = None, endpoint: str | None = None
) -> Changes:
    """What `publish` would do to a branch of the Hub; nothing is sent. Raises HubFailure if the Hub cannot be read, of
    which HubUnreachable is the kind without an answer.
    """
    api = HfApi(endpoint=endpoint, token=token)
    try:
        api.repo_info(plan.repo_id)  # where there is no network this fails at once, a listing after six tries
        return _compare(api, plan, revision)
    except RevisionNotFoundError:
        return preview(plan, token=token, endpoint=endpoint)  # the branch would be made from main
    except RepositoryNotFoundError:
        return Changes(new=list(plan.files))
    except (HTTP_ERROR, OSError) as error:
        kind = HubFailure if isinstance(error, HfHubHTTPError) else HubUnreachable
        raise kind(f"{plan.repo_id}: {_explain(error)}") from error


def _compare(api: HfApi, plan: Plan, revision: str | None) -> Changes:
    entries = api.list_repo_tree(plan.repo_id, recursive=True, revision=revision)
    there = {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}
    changes = Changes()
    for name, content in plan.files.items():
        if name not in there:
            changes.new.append(name)
        elif (
            (there[name].lfs.sha256 == content.sha256) if there[name].lfs else (there[name].blob_id == content.git_oid)
        ):
            changes.unchanged.append(name)
        else:
            changes.changed.append(name)
    # A single model.safetensors is preferred to newer shards beside it, and the other way around an index goes unread.
    changes.removed.extend(
        name for name in there if "/" not in name and name.endswith(STALE_WEIGHTS) and name not in plan.files
    )
    return changes


def publish(
    plan: Plan,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str = "Upload by `deltanet push`",
    token: str | None = None,
    endpoint: str | None = None,
) -> Published:
    """Send a plan to the Hub in one commit, then pull that commit back and compare every file's hash.

    Args:
        plan: from `prepare`.
        private: make the repository private if it does not exist; one that exists and is public is refused.
        revision: branch to commit to, made from main if it does not exist; main by default.
        create_pr: open a pull request instead of committing; not together with `revision`, and the repository must
        exist. message: the commit's.
        token, endpoint: huggingface_hub's own by default (`hf auth login`, `HF_TOKEN`, `HF_ENDPOINT`).

    Raises:
        ValueError: options that contradict each other, or metadata that the Hub refuses.
        HubFailure: the Hub could not be reached, refused, or failed. The revision is then as it was before, and the
            message says where it stands.
        VerificationFailed: what came back differs.
    """
    if create_pr and revision is not None:
        raise ValueError(f"create_pr opens a pull request against main: revision ({revision!r}) cannot be given too")
    api = HfApi(endpoint=endpoint, token=token)
    try:
        head = _head(api, plan.repo_id, private, revision, create_pr)
        changes = _compare(api, plan, head)
        if not changes:
            return Published(plan.repo_id, head, f"{api.endpoint}/{plan.repo_id}", changes, False, None, 0)
    except (HTTP_ERROR, OSError) as error:
        raise HubFailure(f"{plan.repo_id}: {_explain(error)}. Nothing was sent.") from error

    operations = [
        *(CommitOperationAdd(name, plan.files[name].source) for name in (*changes.new, *changes.changed)),
        *(CommitOperationDelete(name) for name in changes.removed),
    ]
    try:
        info = api.create_commit(
            plan.repo_id,
            operations,
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=head,
        )
        commit, pull_request = info.oid, info.pr_url
    except (HTTP_ERROR, OSError, RuntimeError) as error:  # RuntimeError: how huggingface_hub wraps a failed upload
        commit, pull_request = _arrived(api, plan, revision, head, error), None
    verified = _verify(api, plan, commit)
    return Published(plan.repo_id, commit, f"{api.endpoint}/{plan.repo_id}", changes, True, pull_request, verified)


def _head(api: HfApi, repo_id: str, private: bool, revision: str | None, create_pr: bool) -> str:
    """The commit to build on, in a repository and on a branch that exist from here on."""
    try:
        info = api.repo_info(repo_id)
    except RepositoryNotFoundError as error:
        if create_pr:
            raise HubFailure(
                f"{repo_id} does not exist, so there is nothing to open a pull request against"
            ) from error
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        info = api.repo_info(repo_id)
    if private and not info.private:
        raise HubFailure(f"{repo_id} exists and is public: make it private in its settings first. Nothing was sent.")
    if revision is None:
        return info.sha
    try:
        return api.repo_info(repo_id, revision=revision).sha
    except RevisionNotFoundError:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.repo_info(repo_id, revision=revision).sha


def _arrived(api: HfApi, plan: Plan, revision: str | None, head: str, error: Exception) -> str:
    """After a failed commit: the revision that holds the files all the same, or the failure."""
    try:
        now = api.repo_info(plan.repo_id, revision=revision).sha
        if now != head and not _compare(api, plan, now):
            return now
        state = (
            f"it is still at {head}" if now == head else f"it has moved from {head} to {now} by somebody else's commit"
        )
    except (HTTP_ERROR, OSError) as unreachable:
        state = f"it was at {head}, and cannot be read now ({_explain(unreachable)})"
    raise HubFailure(
        f"{plan.repo_id}: {_explain(error)}. Nothing was committed to {revision or 'main'}: {state}. "
        "The same push goes on from what was uploaded."
    ) from error


def _verify(api: HfApi, plan: Plan, commit: str) -> int:
    """Pull the commit back, one file at a time, and compare hashes; how many files."""
    for name, content in plan.files.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                came = _content(Path(api.hf_hub_download(plan.repo_id, name, revision=commit, local_dir=folder)))
            except (HTTP_ERROR, OSError) as error:
                raise VerificationFailed(f"{plan.repo_id} is at {commit}, but {name}: {_explain(error)}") from error
        if came.sha256 != content.sha256:
            raise VerificationFailed(
                f"{plan.repo_id} at {commit}: {name} has sha256 {came.sha256}, but {content.sha256} was sent"
            )
    return len(plan.files)


def _explain(error: BaseException) -> str:
    """What went wrong, in a sentence: by the status that the Hub answered with, or the error at the bottom."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    answered = next((e for e in chain if isinstance(e, HfHubHTTPError) and e.response is not None), None)
    if answered is None:
        return "; ".join(dict.fromkeys(f"{e}".strip().rstrip(".") or type(e).__name__ for e in chain))
    status, request = answered.response.status_code, answered.response.request
    meaning = {
        401: "the token is missing, wrong or expired (`hf auth login`, or HF_TOKEN)",
        403: "the token may not write there",
        404: "no such repository, or one that this token may not see",
        409: "the name is taken, by something that this token may not see",
        412: "somebody else has committed meanwhile",
        429: "too many requests",
    }
    what = meaning.get(status, "the server failed" if status >= 500 else str(answered).strip().splitlines()[-1])
    return f"the Hub answered {status} to {request.method} {request.url.path}: {what}"
