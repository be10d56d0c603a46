"""One cluster for all tests of a session, and a place in which its jobs work."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, why_not
from tests.slurm.jobs import Jobs, write_inputs


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four nodes with two GPUs each; where it cannot be started, a skip, or with $REQUIRE_SLURM a failure."""
    if reason := why_not():
        if os.environ.get("REQUIRE_SLURM"):
            pytest.fail(f"REQUIRE_SLURM is set, and {reason}")
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def jobs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Jobs of this project on the cluster, all with the same network, weights and data."""
    return Jobs(cluster, write_inputs(tmp_path_factory.mktemp("jobs")))
