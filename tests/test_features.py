"""`docs/features.md` links each promise to a test, and the tests are found."""

import re
import subprocess
import sys
from pathlib import Path


DOCS = Path(__file__).parent.parent / "docs"


def test_every_test_in_the_feature_table_exists():
    """A promise would be backed by a test that was renamed or removed."""
    links = re.findall(r"\[`(test_\w+)`\]\(([\w./]+)\)", (DOCS / "features.md").read_text())
    assert len(links) > 60
    for name, file in links:
        assert f"\ndef {name}(" in (DOCS / file).read_text(), f"{file} has no {name}"


def test_plain_pytest_finds_the_tests():
    """`pytest`, which puts no folder on the path as `python -m pytest` does, would end before the first test."""
    file = "tests/ops/test_half_precision.py"
    command = [sys.executable, "-P", "-m", "pytest", "--collect-only", "-q", file]
    done = subprocess.run(command, cwd=DOCS.parent, capture_output=True, text=True)
    assert done.returncode == 0 and file in done.stdout, done.stdout
