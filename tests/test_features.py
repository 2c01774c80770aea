"""`docs/features.md` links each promise to a test."""

import re
from pathlib import Path


DOCS = Path(__file__).parent.parent / "docs"


def test_every_test_in_the_feature_table_exists():
    """A promise would be backed by a test that was renamed or removed."""
    links = re.findall(r"\[`(test_\w+)`\]\(([\w./]+)\)", (DOCS / "features.md").read_text())
    assert len(links) > 60
    for name, file in links:
        assert f"\ndef {name}(" in (DOCS / file).read_text(), f"{file} has no {name}"
