"""What the documentation says of the project is so: promises, functions, requirements, files."""

import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from tiny import tiny_model, tiny_tokenizer


ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def test_every_test_in_the_feature_table_exists():
    """A promise would be backed by a test that was renamed or removed."""
    links = re.findall(r"\[`(test_\w+)`\]\(([\w./]+)\)", (DOCS / "features.md").read_text())
    assert len(links) > 60
    for name, file in links:
        assert f"\ndef {name}(" in (DOCS / file).read_text(), f"{file} has no {name}"


def test_plain_pytest_finds_the_tests(tmp_path):
    """`pytest`, which puts no folder on the path as `python -m pytest` does, would end before the first test."""
    (tmp_path / "test_it.py").write_text("import tests.ops.products\n\n\ndef test_it(): ...\n")
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-c", ROOT / "pyproject.toml", tmp_path / "test_it.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_page_of_functions_is_up_to_date():
    """A user would call a function with arguments that it had once, or miss those that it has."""
    pytest.importorskip("deltanet_kernels")
    assert runpy.run_path(str(DOCS / "api.py"))["page"]() == (DOCS / "api.md").read_text(), (
        "`make docs` writes it anew"
    )


def test_the_readme_names_what_is_required():
    """An installation would fail, or bring what nobody announced."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    install = (ROOT / "README.md").read_text().partition("## Install")[2].partition("\n## ")[0]
    extras = project["optional-dependencies"]
    public = [*project["dependencies"], *extras["distill"], *extras["examples"], *extras["liger"]]
    names = {Requirement(line).name for line in public} - {"modeling-deltanet"}
    assert {name for name in names if not re.search(rf"\b{name}\b", install, re.IGNORECASE)} == set()
    versions = {r.name: min(str(s.version) for s in r.specifier) for r in map(Requirement, project["dependencies"])}
    assert f"Python {project['requires-python'].removeprefix('>=')}" in install
    assert f"torch {versions['torch']}" in install and f"Transformers {versions['transformers']}" in install
    assert {f".[{extra}]" for extra in extras if extra not in ("test", "dev")} <= set(
        re.findall(r"\.\[\w+\]", install)
    )


@pytest.mark.parametrize(
    "page", ["README.md", "docs/architecture.md", "docs/features.md", "docs/serving.md", "benchmarks/README.md"]
)
def test_what_a_page_links_to_exists(page):
    """A reader would be sent to nothing: a file that was renamed, a section that was rewritten."""
    text = (ROOT / page).read_text()
    short = {"M/": "modeling_deltanet/", "K/": "kernels/torch-ext/deltanet_kernels/"}
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in (link for link in links if "://" not in link):
        file, _, section = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        heads = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if section else ()
        assert not section or section in {re.sub(r"[^\w -]", "", x).lower().replace(" ", "-") for x in heads}, link
    for name, file in re.findall(r"(?:`(\w+)`\s(?:in|of)\s)?`((?:[MK]|conversion|tests)/[\w/]+\.py)`", text):
        path = ROOT / (short[file[:2]] + file[2:] if file[:2] in short else file)
        assert path.exists() and name in path.read_text(), f"{name} in {file}"


def test_the_python_of_the_readme_runs_without_a_warning(tmp_path):
    """What a user types first would end in a traceback, or begin with lines that are no business of theirs."""
    pytest.importorskip("deltanet_kernels")
    quickstart = tmp_path / "runs" / "quickstart" / "deltanet-quickstart"
    tiny_model(vocab_size=96).save_pretrained(quickstart)
    tiny_tokenizer().save_pretrained(quickstart)
    snippets = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(snippets) >= 6
    quiet = "import sys; sys.modules['bitsandbytes'] = None\n"  # which PEFT brings in, and prints on some CPUs
    done = subprocess.run(
        [sys.executable, "-c", quiet + "".join(snippets)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not re.findall(r"^(?!Loading weights).*(?:warn|deprecat|\[transformers\]).*$", done.stderr, re.I | re.M)
