"""The docs that are generated say what the code says."""

from pathlib import Path

from moegate.conformance import features
from moegate.conformance.catalogue import as_markdown
from moegate.conformance.coverage import pinned_experts, pinned_slabs
from moegate.conformance.loading import load_subject

ROOT = Path(__file__).parent.parent


def test_the_table_of_properties_is_the_one_that_the_suite_declares():
    assert (ROOT / "docs" / "properties.md").read_text() == as_markdown()


def test_the_feature_table_of_the_readme_is_what_moegate_declares():
    readme = (ROOT / "README.md").read_text()
    start, end = readme.index(features.BEGIN), readme.index(features.END) + len(features.END) + 1
    assert readme[start:end] == features.as_markdown()


def test_every_cell_of_the_feature_table_is_exercised_by_the_suite():
    capabilities = load_subject("moegate").capabilities
    specs = [*pinned_experts("cpu", capabilities), *pinned_slabs("cpu", capabilities)]
    run = {pair for spec in specs for pair in spec.feature_pairs()}
    for (scheme, place), held in features.cells(capabilities).items():
        assert ((features.PLACES[place][0], f"scheme={scheme}") in run) == held, (scheme, place)
