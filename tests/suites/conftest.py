"""The encoders that the suites judge."""

import pytest
from generated import make_encoder


@pytest.fixture(scope="session")
def encoders(tmp_path_factory):
    """Two that differ in their weights, in folders of one name."""
    folders = [tmp_path_factory.mktemp("encoder") / "small" for _ in range(2)]
    return [make_encoder(folder, seed) for seed, folder in enumerate(folders)]
