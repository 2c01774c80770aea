"""What `deltanet push` asks of a card, and what it fills in."""

import itertools
import re

from huggingface_hub import ModelCard, ModelCardData

from .hub_names import language_problem, license_problem


MISSING = "[More Information Needed]"  # the Hub's own mark; `deltanet push` refuses a card that holds one
SECTIONS = ("How to use", "Architecture", "Training", "Evaluation", "Speed", "Limits")
NO_RECALL = (
    "a conversion without a recall figure in its evaluation: `deltanet evaluate FOLDER --teacher TEACHER` measures "
    "it, `deltanet card --force` puts it there"
)


def card_problems(
    text: str, repo_id: str, files: set[str], base_model: str | None = None
) -> list[tuple[int | None, str]]:
    """Why a card is not complete, with the line: what `deltanet push` refuses.

    Args:
        text: the card, metadata included.
        repo_id: the repository it is to describe.
        files: names of the files that go with it, which its pictures must be among.
        base_model: the base that an adapter's card has to name.
    """
    try:
        data = ModelCard(text, ignore_metadata_errors=False).data
    except Exception as error:  # noqa: BLE001 (YAML's own errors and the card classes' have no common ancestor)
        return [(1, f"metadata that the Hub would refuse: {error}")]
    problems: list[tuple[int | None, str]] = [
        (1, f"no {field} in the metadata") for field in ("license", "library_name", "tags") if not data.get(field)
    ]
    if data.get("license"):
        problems += [(1, what) for what in [license_problem(data.license)] if what]
        if data.license == "other" and not data.get("license_name"):
            problems.append((1, "license: other, but no license_name in the metadata"))
    if data.get("language") is not None:
        problems += [(1, what) for what in [language_problem(data.language)] if what]
    if base_model is not None and data.base_model != base_model:
        problems.append((1, f"the metadata names {data.base_model!r} as base_model, not {base_model!r}"))
    lines = text.splitlines()
    headings = {line[3:].strip(): i for i, line in enumerate(lines) if line.startswith("## ")}
    for section in SECTIONS:
        if section not in headings:
            problems.append((None, f"no section {section!r}"))
        elif not any(line.strip() for line in _until_heading(lines[headings[section] + 1 :])):
            problems.append((headings[section] + 1, f"section {section!r} is empty"))
    if "Conversion" in headings and not any(
        "recall" in line.lower() for line in _until_heading(lines[headings.get("Evaluation", 0) + 1 :])
    ):
        problems.append((headings["Conversion"] + 1, NO_RECALL))
    for mark in (MISSING, "{{", "TODO"):
        if places := [i for i, line in enumerate(lines, start=1) if mark in line]:
            more = f", here and in {len(places) - 1} more lines" if len(places) > 1 else ""
            problems.append((places[0], f"{mark} is still to be filled in{more}"))
    for i, line in enumerate(lines, start=1):
        for picture in re.findall(r"!\[[^\]]*\]\((?!https?:)([^)\s]+)", line):
            if picture not in files:
                problems.append((i, f"the picture {picture} is not among the files"))
    if f'from_pretrained("{repo_id}"' not in text:
        problems.append((None, f'its example does not load the repository: no from_pretrained("{repo_id}")'))
    return problems


def _until_heading(lines: list[str]) -> list[str]:
    return list(itertools.takewhile(lambda line: not line.startswith("## "), lines))


def card_license(text: str) -> tuple[str | None, bool]:
    """The licence's identifier in a card's metadata, and whether a link to the licence stands beside it."""
    try:
        data = ModelCard(text, ignore_metadata_errors=False).data
    except Exception:  # noqa: BLE001 (as in `card_problems`, which tells it)
        return None, False
    return data.get("license"), bool(data.get("license_link"))


def is_license(name: str) -> bool:
    """Whether a file is a licence's text, by its name."""
    return re.fullmatch(r"(?i)(licen[cs]e|copying)([-._].*)?", name) is not None


def is_stub(text: str) -> bool:
    """Whether a card is what PEFT leaves beside an adapter: huggingface_hub's template, with nothing filled in."""
    try:
        body = ModelCard(text, ignore_metadata_errors=True).text.strip()
    except Exception:  # noqa: BLE001 (YAML's own errors)
        return False
    template = ModelCard.from_template(ModelCardData()).text.strip()
    rest = body.removeprefix(template).strip()
    return body.startswith(template) and (not rest or rest.startswith(("### Framework versions", "## Training proc")))


def with_owner(text: str, repo_id: str, base_model: str | None = None) -> str:
    """A card that was made for a name without an owner, such as the quickstart's, with the owner that publishes it.

    Filled in where the card that `make_card` writes names the repository or an adapter's base; all else stays.
    """
    for whole in filter(None, (repo_id, base_model)):
        name = re.escape(whole.split("/")[-1])
        places = rf'(from_pretrained\("|huggingface\.co/|^base_model: |pretrained=|adapter of \[){name}(?=["),\]\n])'
        text = re.sub(places, rf"\g<1>{whole}", text, flags=re.MULTILINE)
    return text
