"""What several tests need: one thread, and a size-1 world."""

from collections.abc import Iterator

import pytest
import torch

from dist_prune.world import World, joined

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    with joined("cpu") as alone:
        yield alone
