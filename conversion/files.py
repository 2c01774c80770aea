"""Files of a folder that came from elsewhere: read what is in it, and nothing that it only points to.

A link, or a name inside a file, can lead to any file of this machine, whose content would then be converted or
published.
"""

import glob
import json
import os
import stat
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id


INDEX = "model.safetensors.index.json"


def why_foreign(file: Path, folder: Path) -> str | None:
    """Why `file`, which lies in `folder`, is not a file of the folder's own; None if it is.

    A link may lead to another file in the folder, unless that is hidden, and in a snapshot of the Hub's cache to that
    repository's blobs.
    """
    folder = folder.resolve()
    try:
        target = file.resolve(strict=True)
        is_regular = stat.S_ISREG(target.stat().st_mode)
    except (OSError, RuntimeError):  # RuntimeError: a loop of links, up to Python 3.12
        return "a link that leads nowhere" if file.is_symlink() else "cannot be read"
    if not is_regular:
        return "neither a file nor a link to one"
    if target.is_relative_to(folder):
        is_hidden = any(part.startswith(".") for part in target.relative_to(folder).parts)
        return f"a link to the hidden {target}" if is_hidden and os.path.islink(file) else None
    blobs = (p.parents[1] / "blobs" for p in (folder, *folder.parents) if p.parent.name == "snapshots")
    if any(target.parent == b and b.parent.name.startswith("models--") for b in blobs):
        return None
    return f"a link to {target}, outside the folder"


def own_file(folder: Path, name: str) -> Path:
    """The file `name` of `folder`, which must be there.

    Raises:
        ValueError: a name that leads out of the folder, or a file that is a link to outside.
    """
    if not isinstance(name, str) or not name.isprintable() or Path(name).name != name:
        raise ValueError(f"{folder} names the file {name!r}, which is no plain name in the folder")
    if (reason := why_foreign(folder / name, folder)) is not None:
        raise ValueError(f"{folder / name} is refused: {reason}")
    return folder / name


def is_hub_id(name) -> bool:
    """Whether `name` is that of a repository on the Hub, owner/name, and of no folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return isinstance(name, str) and name.count("/") == 1 and not name.startswith(".") and not Path(name).exists()


def local_folder(source: str | os.PathLike, revision: str | None = None) -> Path | None:
    """The folder that `source` names, or None where it can only be a repository on the Hub.

    Raises:
        ValueError: what is neither a folder nor a name that a repository could have, or a `revision` of a folder.
    """
    path = Path(source)
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"revision {revision!r} was given, but {source} is a local folder")
        return path
    if path.exists():
        makes_one = f"; `deltanet convert {path.name} FOLDER --to transformers` makes one"
        hint = makes_one if path.suffix.lower() == ".gguf" else ""
        raise ValueError(f"{source} is a file: wanted the folder of a checkpoint{hint}")
    try:
        validate_repo_id(str(source))
    except HFValidationError:
        raise ValueError(f"no such folder: {source}") from None
    return None


def public_name(source: str) -> str:
    """A source's name without the folders that it lies in on this machine."""
    path = Path(source)
    is_local = path.exists() or path.is_absolute() or glob.has_magic(source)
    return (path.resolve() if path.exists() else path).name if is_local else source


@contextmanager
def hub_errors(source: str | os.PathLike):
    """What the Hub says of a name that it does not have, or cannot be asked about, as an error about the name: most
    often it is a folder's, mistyped.
    """
    missing = f"no such folder: {source}; and "
    try:
        yield
    except GatedRepoError as error:
        raise ValueError(
            f"{source} is gated: ask for access on its page on the Hub, and log in by `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{missing}the Hub has no such repository, or none that you may read") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ValueError(f"{missing}the Hub, where it might be, cannot be reached") from error
    except (RevisionNotFoundError, EntryNotFoundError, NotASafetensorsRepoError) as error:
        raise ValueError(f"{source} on the Hub: {error}") from error


def read_json(path: str | os.PathLike) -> dict:
    """A file's JSON object. Raises ValueError, with the file's name, for what is not one."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        json.dumps(content, ensure_ascii=False).encode()  # an escape such as \ud800 is no text that could be written
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def read_index(file: Path) -> dict[str, str]:
    """Tensor -> file, as an index of shards tells it; every file is one of the folder's own.

    Raises:
        ValueError: another form, files that are not there, or that lie elsewhere.
    """
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{file} has no weight_map that names files of weights, got {weight_map!r}")
    for name in {repr(name): name for name in weight_map.values()}.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{file} names {name!r}, which is no safetensors file in its folder")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not os.path.lexists(file.parent / name)]
    if missing:
        raise ValueError(f"{file} names files that are not there: {', '.join(missing)}")
    for name in names:
        own_file(file.parent, name)
    return weight_map


def check_named_files(folder: Path) -> None:
    """Refuse names that Transformers would follow out of `folder`: shards in an index, versions of a tokenizer.

    Raises:
        ValueError: with the file and the name in it.
    """
    if os.path.lexists(folder / INDEX):
        read_index(own_file(folder, INDEX))
    if os.path.lexists(folder / "tokenizer_config.json"):
        names = read_json(own_file(folder, "tokenizer_config.json")).get("fast_tokenizer_files") or []
        for name in names if isinstance(names, list) else [names]:
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"{folder / 'tokenizer_config.json'} names {name!r}, which is no file in its folder")
