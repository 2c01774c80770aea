"""What must not leave the machine: secrets and paths of this machine, found in the files of a push, with their line.

Text is searched whole. Of a safetensors file only the header is (names and metadata): the rest is numbers.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, get_token


@dataclass(frozen=True)
class Problem:
    """Why a file may not be published as it is."""

    file: str
    line: int | None
    what: str

    def __str__(self) -> str:
        return f"{self.file}{'' if self.line is None else f':{self.line}'}: {self.what}"


SECRETS = {
    "a Hugging Face token": rb"\b(?:hf|api_org)_[A-Za-z0-9]{30,}\b",
    "a GitHub token": rb"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,})\b",
    "an AWS key": rb"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a Google key": rb"\bAIza[A-Za-z0-9_-]{35}\b",
    "a Slack token": rb"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
    "an API key": rb"\bsk-[A-Za-z0-9_-]{20,}",
    "a private key": rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
    "a password in a URL": rb"\bhttps?://[^\s/:@\"']+:[^\s/:@\"']+@",
    "a secret": (
        rb"(?i)\b[a-z_]*(?:api_?key|secret|password|passwd|access_?token|auth_?token)[\"']?"
        rb"\s*[:=]\s*[\"'][^\s\"'{}<>$]{8,}[\"']"
    ),
}  # fmt: skip

# Folders that belong to one machine or one user, each followed by a name. Not preceded by what makes it a part of a
# URL or of a relative path.
LOCAL_PATHS = {
    "a path of a local machine": (
        rb"(?<![\w.~/:-])/(?:home|Users|root|tmp|private|var|mnt|media|scratch|workspace|data|gpfs|lustre|nfs|content"
        rb"|kaggle)/[\w.+-][^\s\"'`)\]}<>,;]*"
    ),
    "a path of a Windows machine": rb"(?<![A-Za-z])[A-Za-z]:[\\/]{1,2}Users[\\/]{1,2}[\w.+-][^\s\"'`)\]}<>,;]*",
    "a link to a local file": rb"\bfile://[^\s\"'`)\]}<>,;]+",
}  # fmt: skip

# A vocabulary may hold `/home/user` as words: only secrets are looked for there.
VOCABULARIES = {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt"}

SECRET_FILES = re.compile(
    r"(?:.*/)?(?:\.env(?:\..*)?|\.netrc|\.npmrc|\.pypirc|id_(?:rsa|dsa|ecdsa|ed25519)|.*\.(?:pem|key|p12|pfx|keystore)|"
    r"credentials(?:\.json)?|token)"
)


def scan(files: dict[str, Path | bytes]) -> list[Problem]:
    """Secrets and local paths in the files of a push, by name and line; a secret is named, not repeated."""
    own_token = get_token()
    problems = []
    for name, source in files.items():
        if SECRET_FILES.fullmatch(name):
            problems.append(Problem(name, None, "a file that holds secrets"))
            continue
        content = _text_of(name, source)
        if own_token and own_token.encode() in content:
            problems.append(Problem(name, _line(content, content.index(own_token.encode())), "your own Hub token"))
        patterns = SECRETS if Path(name).name in VOCABULARIES else SECRETS | LOCAL_PATHS
        for what, pattern in patterns.items():
            for match in re.finditer(pattern, content):
                found = match[0].decode(errors="replace")
                shown = f"{found[:6]}..." if what in SECRETS else found
                problems.append(Problem(name, _line(content, match.start()), f"{what}, {shown}"))
    return problems


def _text_of(name: str, source: Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return source
    if not name.endswith(".safetensors"):
        return source.read_bytes()
    with source.open("rb") as f:
        size = int.from_bytes(f.read(8), "little")
        return f.read(min(size, constants.SAFETENSORS_MAX_HEADER_LENGTH))


def _line(content: bytes, position: int) -> int:
    return content.count(b"\n", 0, position) + 1
