"""A run for each file of tests to export."""

from pathlib import Path

import pytest

from tests.runs import Bench


@pytest.fixture(scope="module")
def run(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("taken") / "run"
    bench.commands.succeed(*bench.words(folder, method="weight-svd", epochs=0), ranks=0)
    return folder
