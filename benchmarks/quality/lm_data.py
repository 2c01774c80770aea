"""Text that every machine can get by its package registries, as a compact file of tokens to train on.

    sudo apt-get update                              # so that apt knows the versions below
    python benchmarks/quality/lm_data.py runs/lm     # downloads 0.5 GB, and takes 10 to 25 minutes on one core
    python benchmarks/quality/lm_data.py runs/lm --documentation docs.jsonl    # text for examples/convert_smollm2.py

Documentation of Debian 12 and Python packages of PyPI, of exactly the versions below: manuals, dictionaries, and
source code with its docstrings. Nothing is drawn at random: the same packages give the same files, to the byte.

- A document is one file of a package (HTML and man pages without their markup), English by its letters.
- A paragraph that stood anywhere before is left out: licences, navigation, text that comes in two packages.
- Every fiftieth document, by the hash of its name, is held out; it teaches neither tokenizer nor model.

In the folder afterwards: `tokenizer.json` (byte-level BPE), `train-NN.bin.xz` and `held_out.bin.xz` (uint16, each
document followed by token 0), and `lm_data.json`, which says what is in them.
"""

import argparse
import gzip
import hashlib
import html
import io
import json
import lzma
import math
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


DEBIAN = """
apache2-doc=2.4.71-1~deb12u1 bash-doc=5.2.15-2 cppreference-doc-en-html=20170409-2
debian-handbook=11.20220922 debian-policy=4.6.2.0 debian-reference-en=2.100 developers-reference=12.18
dict-foldoc=20230119-1 dict-jargon=4.4.7-3.1 erlang-doc=1:25.2.3+dfsg-1+deb12u4
fortunes=1:1.99.1-7.3 freebsd-manpages=12.2-1 gimp-help-en=2.10.34-2 git-doc=1:2.39.5-0+deb12u3
kicad-doc-en=6.0.11+dfsg-1 libboost1.81-doc=1.81.0-5+deb12u1 libreoffice-help-en-us=4:7.4.7-1+deb12u14
linux-doc-6.1=6.1.192-2 manpages=6.03-2 manpages-dev=6.03-2 maxima-doc=5.46.0-11 octave-doc=7.3.0-2
perl-doc=5.36.0-7+deb12u4 postgresql-doc-15=15.20-0+deb12u1
python-django-doc=3:3.2.25-0+deb12u7 python3.11-doc=3.11.2-6+deb12u9 sqlite3-doc=3.40.1-2+deb12u2
tcl8.6-doc=8.6.13+dfsg-2 vim-doc=2:9.0.1378-2+deb12u2 zsh-doc=5.9-4
"""
PYPI = """
apache-superset==6.1.0 azure-cli==2.91.0 cinder==29.0.0 dask==2026.8.0 diffusers==0.42.1 docutils==0.23
gradio==6.31.0 impacket==0.13.1 keras==3.15.1 langchain-community==0.4.2 llama-index-core==0.14.25 manim==0.22.0
mlflow==3.18.0 mne==1.13.2 moto==5.2.5 neutron==29.0.0 nilearn==0.14.1 nltk==3.10.4 nova==34.0.0 plone==6.2.2
pylint==4.1.4 scapy==2.8.0 setuptools==84.2.1 sympy==1.14.0 transformers==5.23.0 twisted==26.10.0 wagtail==8.0.1
xarray==2026.9.0 yt-dlp==2026.10.26
"""
VOCABULARY = 8192
MOST_OF_A_PACKAGE = 30_000_000  # characters
LONGEST_CODE = 300_000  # characters of a .py file: longer ones are tables
EVERY_NTH_HELD_OUT = 50
TOKENS_A_FILE = 50_000_000

ROFF = re.compile(r"\.\d\w*\.gz$")
NO_TEXT = re.compile(r"(?is)<(head|script|style|nav|svg)\b.*?</\1>|<!--.*?-->")
BLOCK = re.compile(r"(?i)</?(p|div|br|h\d|li|ul|ol|dl|dt|dd|tr|table|pre|section)\b[^>]*>")
SUFFIXES = (".txt", ".rst", ".md", ".pod", ".py", ".html", ".htm", ".dz")


def download(folder: Path, packages: list[str]) -> None:
    """What is not there yet, by the registries' own clients."""
    for registry, command in (
        (DEBIAN, ["apt-get", "download"]),
        (PYPI, [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]),
    ):
        missing = [name for name in packages if name in registry.split() and not archive(folder, name).exists()]
        if missing and subprocess.run([*command, *missing], cwd=folder).returncode:
            raise SystemExit(
                f"`{' '.join(command)}` failed, as it says above. A version that it does not find may be newer than "
                "apt's lists (`apt-get update`), or gone from the registry: its successor, written into this file, "
                "makes another text"
            )


def archive(folder: Path, name: str) -> Path:
    """The file that holds `package=version` (Debian) or `package==version` (PyPI)."""
    package, _, version = name.partition("=")
    if version.startswith("="):
        return folder / f"{package.replace('-', '_')}-{version[1:]}-py3-none-any.whl"
    found = sorted(folder.glob(f"{package}_{version.replace(':', '%3a')}_*.deb"))
    return found[0] if found else folder / package


def files(path: Path) -> Iterator[tuple[str, bytes]]:
    """What a package holds, in the order of the names."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            for name in sorted(wheel.namelist()):
                yield name, wheel.read(name)
        return
    unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", path], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(unpacked)) as tar:
        for member in sorted((m for m in tar if m.isfile()), key=lambda m: m.name):
            yield member.name, tar.extractfile(member).read()


def text_of(name: str, content: bytes) -> str | None:
    """A file's text without markup, or None where it is none."""
    is_roff = ROFF.search(name) is not None
    plain = name.removesuffix(".gz")
    if not (is_roff or plain.endswith(SUFFIXES) or "/games/fortunes/" in name and "." not in name.rsplit("/", 1)[-1]):
        return None
    if "/translations/" in name or "/html/" in name and re.search(r"/html/(?!en-US)[a-z]{2}-[A-Z]{2}/", name):
        return None
    if name.endswith((".gz", ".dz")):
        content = gzip.decompress(content)
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return None
    if plain.endswith((".html", ".htm")):
        text = html.unescape(re.sub(r"<[^>]*>", "", BLOCK.sub("\n", NO_TEXT.sub("", text))))
    elif is_roff:
        text = re.sub(r'(?m)^[.\'](\\"|TH|ds|if|ie|el|de|nr|so).*\n', "", text)
        text = re.sub(r"\\f(?:\[\w*\]|.)|\\&|\\:", "", re.sub(r"(?m)^\.[A-Za-z]+ ?", "", text)).replace("\\-", "-")
    if plain.endswith(".py") and len(text) > LONGEST_CODE:
        return None
    if (
        len(text) < 300
        or sum(map(text.count, "\ufffd\x00"))
        or len(text.encode("ascii", "ignore")) < 0.985 * len(text)
    ):
        return None
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t\r]+\n", "\n", text)).strip()


def documents(folder: Path, packages: list[str]) -> Iterator[tuple[str, str]]:
    """`(package/name, text)` of every document, each paragraph of 60 characters or more once."""
    seen = set()
    for package in packages:
        left = MOST_OF_A_PACKAGE
        for name, content in files(archive(folder, package)):
            text = text_of(name, content) if left > 0 else None
            if text is None:
                continue
            kept = []
            for paragraph in text.split("\n\n"):
                key = hashlib.blake2b(paragraph.strip().encode(), digest_size=8).digest()
                if len(paragraph) < 60 or key not in seen:
                    kept.append(paragraph)
                    seen.add(key)
            text = "\n\n".join(kept).strip()
            if len(text) >= 300:
                left -= len(text)
                yield f"{package.partition('=')[0]}/{name.removeprefix('./')}", text


def is_held_out(name: str) -> bool:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest()) % EVERY_NTH_HELD_OUT == 0


def train_tokenizer(texts: Iterator[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_documentation(file: Path, texts: list[str], characters: float) -> None:
    """`{"text": ...}` a line: every n-th text, so that they have at most about so many characters."""
    some = texts[:: math.ceil(sum(map(len, texts)) / characters)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    print(f"{file}: {len(some)} of {len(texts)} documents, {sum(map(len, some))} characters")


def write_tokens(folder: Path, every: list[tuple[str, str]]) -> None:
    """Tokenizer, tokens and `lm_data.json`, of `(package/name, text)`."""
    said = {"documents": len(every), "characters": sum(len(text) for _, text in every), "packages": {}}
    for name, text in every:
        package = name.partition("/")[0]
        said["packages"][package] = said["packages"].get(package, 0) + len(text)
    print(json.dumps(said), flush=True)

    parts = {held_out: [text for name, text in every if is_held_out(name) == held_out] for held_out in (False, True)}
    tokenizer = train_tokenizer(text[:50_000] for text in parts[False][::10])
    tokenizer.save(str(folder / "tokenizer.json"))
    for held_out, texts in parts.items():
        rows = []
        for start in range(0, len(texts), 500):
            encoded = tokenizer.encode_batch(texts[start : start + 500])
            rows += [np.array([*encoding.ids, 0], dtype=np.uint16) for encoding in encoded]
        ids = np.concatenate(rows)
        name = "held_out" if held_out else "train"
        said[f"{name}_tokens"] = len(ids)
        for start in range(0, len(ids), TOKENS_A_FILE):
            part = name if held_out else f"{name}-{start // TOKENS_A_FILE:02d}"
            piece = ids[start : start + TOKENS_A_FILE].tobytes()
            packed = lzma.compress(piece, preset=6)
            (folder / f"{part}.bin.xz").write_bytes(packed)
            digest = hashlib.sha256(piece).hexdigest()
            said.setdefault("files", {})[part] = {"bytes": len(packed), "sha256": digest}
            print(part, said["files"][part], flush=True)
    (folder / "lm_data.json").write_text(json.dumps(said, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where everything goes")
    parser.add_argument("--documentation", type=Path, help="instead, Debian's documents as JSON lines into this file")
    parser.add_argument("--characters", type=float, default=80e6, help="of them, at most about (default 80e6)")
    args = parser.parse_args()
    packages = DEBIAN.split() + (PYPI.split() if args.documentation is None else [])
    folder = args.folder / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    download(folder, packages)
    every = list(documents(folder, packages))
    if args.documentation is not None:
        write_documentation(args.documentation, [text for _, text in every], args.characters)
    else:
        write_tokens(args.folder, every)


if __name__ == "__main__":
    main()
