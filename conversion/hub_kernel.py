"""The kernels as a kernel of the Hub: the folder that kernel-builder makes of a noarch project, without
kernel-builder.

A pure Triton kernel has nothing to compile: a variant is the Python files and a `metadata.json`, in
`build/torch-<backend>/`. kernel-builder itself is a Nix project and no package that pip could install; what is written
here is the form that `kernels` 0.17.2, the newest release on PyPI in November 2026, loads.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import tomllib
from pathlib import Path


EDITION = 5
BACKENDS = ("cuda",)  # what the kernels were compiled for; Triton's other backends have not been tried


def build(
    source: str | os.PathLike = "kernels", output: str | os.PathLike | None = None, *, repo_id: str | None = None
) -> list[Path]:
    """Assemble the variants of a noarch kernel project; returns their folders.

    Args:
        source: the project, with `build.toml`, `CARD.md` and `torch-ext/<name>/`.
        output: folder to make, `source/build` by default. A variant that stands there is replaced whole.
        repo_id: for the card's example, in place of `build.toml`'s repo-id.

    Raises:
        ValueError: a project that is not there, another edition, a backend that the kernels do not have.
    """
    source = Path(source)
    output = source / "build" if output is None else Path(output)
    project = _project(source)
    name, python_name = project["name"], project["name"].replace("-", "_")
    package = source / "torch-ext" / python_name
    if not (package / "__init__.py").exists():
        raise ValueError(f"{package} holds no __init__.py: build.toml names the kernel {name!r}")
    sources = {path.name: path.read_text(encoding="utf-8") for path in sorted(package.glob("*.py"))}
    digest = hashlib.sha256("\0".join(f"{k}\0{v}" for k, v in sources.items()).encode()).hexdigest()[:7]

    variants = []
    for backend in project["backends"]:
        unique = f"_{python_name}_{backend}_{digest}"
        metadata = {
            "id": unique,
            "name": name,
            "version": project["version"],
            "license": project["license"],
            "python-depends": [],
            "backend": {"type": backend},
        }
        files = {file: _own_operators(text, python_name, unique) for file, text in sources.items()}
        files["metadata.json"] = json.dumps(metadata, indent=2) + "\n"
        variants.append(_replace(output / f"torch-{backend}", files))
    card = (source / "CARD.md").read_text(encoding="utf-8").replace(project["repo-id"], repo_id or project["repo-id"])
    (output / "CARD.md").write_text(card, encoding="utf-8")
    return variants


def _project(source: Path) -> dict:
    """What `build.toml` says, checked."""
    file = source / "build.toml"
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}; name the kernel project with --source") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file} is not TOML: {error}") from error
    general = content.get("general", {})
    if general.get("edition") != EDITION or "torch-noarch" not in content:
        raise ValueError(
            f"{file} must be edition {EDITION} with [torch-noarch], got edition {general.get('edition')} with "
            f"{', '.join(f'[{k}]' for k in content)}"
        )
    missing = [key for key in ("name", "version", "license", "backends") if key not in general]
    if missing or "repo-id" not in general.get("hub", {}):
        raise ValueError(f"{file} lacks {', '.join(missing or ['general.hub.repo-id'])}")
    unknown = sorted(set(general["backends"]) - set(BACKENDS))
    if unknown:
        raise ValueError(
            f"{file} names the backends {', '.join(unknown)}; the kernels exist for {', '.join(BACKENDS)}"
        )
    return general | {"repo-id": general["hub"]["repo-id"]}


def _own_operators(text: str, namespace: str, unique: str) -> str:
    """Give this build's torch operators a namespace of their own.

    Registering an operator a second time replaces the first: a kernel of the Hub would quietly take the place of the
    installed package, or of another version of itself, in a process that has both.
    """
    return re.sub(rf"\b{namespace}::", f"{unique}::", text)


def _replace(folder: Path, files: dict[str, str]) -> Path:
    """Write a folder beside its place, then put it there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unfinished") as unfinished:
        new = Path(unfinished, folder.name)
        new.mkdir()
        for name, text in files.items():
            (new / name).write_text(text, encoding="utf-8")
        if folder.exists():
            shutil.move(folder, Path(unfinished, "old"))
        new.rename(folder)
    return folder
