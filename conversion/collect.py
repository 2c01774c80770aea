"""Which files of a folder go to the Hub, which stay and why, and which a person has to decide about.

Three kinds stay. What must never be sent: hidden files, training state and other pickles, links to elsewhere. What a
training leaves beside a model: logs, checkpoints, models of their own; `include` sends them all the same. And what
`exclude` names. Data and big files that no model needs are refused until one of the two names them.
"""

import os
import re
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub.constants import SAFETENSORS_INDEX_FILE, SAFETENSORS_SINGLE_FILE
from rich.filesize import decimal

from .files import own_file, read_index, why_foreign
from .scan import VOCABULARIES, Problem


NEVER = {
    "optimizer.pt": "training state",
    "scheduler.pt": "training state",
    "scaler.pt": "training state",
    "training_args.bin": "a pickle that holds paths of this machine",
}
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
LOG_FOLDERS = {
    "wandb": "logs of Weights & Biases",
    "mlruns": "logs of MLflow",
    "lightning_logs": "logs of Lightning",
    "trackio": "logs of Trackio",
}
DATA = (
    ".jsonl", ".parquet", ".arrow", ".csv", ".tsv", ".npy", ".npz", ".h5", ".hdf5", ".tfrecord", ".mds", ".zip",
    ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z",
)  # fmt: skip
BIG = 10_000_000  # bytes: more than the pictures and texts of a card


def collect(
    folder: Path, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()
) -> tuple[dict[str, Path | bytes], dict[str, str], list[Problem], list[Problem]]:
    """The files to send, what is left out and why, what is there but must not be, and what may not even be read.

    `include` and `exclude` are patterns of paths in the folder, such as `wandb/*`; a folder's name stands for all in
    it.
    """
    sources, left_out, problems, foreign = {}, {}, [], []
    reasons = {"": None}  # of folders that are walked through for the sake of what `include` names in them

    def unreadable(error: OSError):
        foreign.append(Problem(Path(error.filename).relative_to(folder).as_posix(), None, f"{error.strerror}"))

    for path, folders, names in os.walk(folder, onerror=unreadable):
        here = Path(path).relative_to(folder).as_posix().removeprefix(".")
        for name in sorted(folders):
            inside = Path(path, name)
            relative = inside.relative_to(folder).as_posix()
            never = (
                "hidden" if name.startswith(".")
                else "compiled code" if name == "__pycache__"
                else "a link to another folder" if inside.is_symlink()
                else "excluded" if matches(relative, exclude)
                else None
            )  # fmt: skip
            reasons[relative] = reasons[here] or _of_a_training(inside)
            if never or (reasons[relative] and not include):
                left_out[f"{relative}/"] = never or reasons[relative]
                folders.remove(name)
        folders.sort()
        for name in sorted(names):
            inside = Path(path, name)
            relative = inside.relative_to(folder).as_posix()
            if not relative.isprintable():
                foreign.append(Problem(ascii(relative), None, "a name that cannot be shown"))
            elif name in NEVER or name.startswith("rng_state"):
                left_out[relative] = NEVER.get(name, "training state")
            elif name.startswith(".") and not name.startswith((".env", ".netrc", ".npmrc", ".pypirc")):
                left_out[relative] = "hidden"
            elif matches(relative, exclude):
                left_out[relative] = "excluded"
            elif (reason := reasons[here] or _of_a_training(inside)) and not matches(relative, include):
                left_out[relative] = reason
            elif name.endswith(PICKLES):
                problems.append(
                    Problem(relative, None, "a pickle, which can run code when it is loaded: use safetensors")
                )
            elif (reason := why_foreign(inside, folder)) is not None:
                foreign.append(Problem(relative, None, reason))
            else:
                sources[relative] = inside
    return sources, left_out, problems, foreign


def _of_a_training(inside: Path) -> str | None:
    """Why a file or folder is something that a training leaves beside a model; None if it is not."""
    if inside.name.startswith("events.out.tfevents."):
        return "a log of TensorBoard, whose name tells this machine's"
    if not inside.is_dir():
        return None
    if re.fullmatch(r"checkpoint-\d+", inside.name):
        return "a checkpoint of a training"
    if any((inside / config).exists() for config in ("config.json", "adapter_config.json")):
        return "a checkpoint of its own"
    return LOG_FOLDERS.get(inside.name)


def matches(relative: str, patterns: tuple[str, ...]) -> bool:
    """Whether a path in the folder, or a folder that it lies in, fits one of the patterns."""
    parts = relative.split("/")
    paths = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatchcase(path, pattern.rstrip("/")) for pattern in patterns for path in paths)


def strays(folder: Path, sources: dict[str, Path | bytes], include: tuple[str, ...] = ()) -> list[Problem]:
    """What no model needs and somebody may not want to publish: data, big files, weights that nothing loads.

    Raises:
        ValueError: an index of weights that is not one.
    """
    decide = "send it by include (--include), or leave it out by exclude (--exclude)"
    loaded = _loaded_weights(folder, sources)
    problems = []
    for name, source in sources.items():
        if isinstance(source, bytes) or name in loaded or matches(name, include):
            continue
        size = source.stat().st_size
        if name.endswith(DATA):
            problems.append(Problem(name, None, f"{decimal(size)} of data: {decide}"))
        elif name.endswith(".safetensors") and loaded:
            problems.append(Problem(name, None, f"{decimal(size)} of weights that nothing loads: {decide}"))
        elif size > BIG and name not in VOCABULARIES and not name.endswith((".safetensors", ".model")):
            problems.append(Problem(name, None, f"{decimal(size)} that no model needs: {decide}"))
    return problems


def _loaded_weights(folder: Path, sources: dict) -> set[str]:
    """The files of weights that `from_pretrained` would read."""
    for name in ("adapter_model.safetensors", SAFETENSORS_SINGLE_FILE):
        if name in sources:
            return {name}
    if SAFETENSORS_INDEX_FILE in sources:
        return set(read_index(own_file(folder, SAFETENSORS_INDEX_FILE)).values())
    return set()
