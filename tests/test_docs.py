"""The docs that are generated say what the code says."""

from pathlib import Path

from moegate.conformance.catalogue import as_markdown

ROOT = Path(__file__).parent.parent


def test_the_table_of_properties_is_the_one_that_the_suite_declares():
    assert (ROOT / "docs" / "properties.md").read_text() == as_markdown()
