"""Kernels counted without a GPU: what counts, and that a layer costs a few of them."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_prune.network.sites import survey
from tests.bench.kernels import META, PASSES, Launches, Network, as_on_a_gpu, batch_of, begin_graph, counted

MOST = {
    "moments": 7,
    "fisher": 5,
    "gradient": 8,
    "hessian-local": 17,
    "patches": 20,
    "second order": 64,
}  # kernels of a layer and batch


def test_what_computes_or_copies_counts_with_the_bytes_it_touches_and_views_do_not() -> None:
    x = torch.empty(4, 8, device=META)
    with Launches() as found:
        x.t().reshape(2, 16).view(-1)[3:].expand(5, 29)  # the reshape copies
        torch.empty_like(x)
        assert (found.kernels, found.bytes) == (1, 2 * 128)
        x.add(1)
        assert (found.kernels, found.bytes) == (2, 4 * 128)
        x[:1].expand(4, 8).sum()  # a row is read once
        assert (found.kernels, found.bytes) == (3, 4 * 128 + 32 + 4)
        x.zero_()
        torch.add(x, x, out=torch.empty_like(x))
        assert found.bytes == 4 * 128 + 32 + 4 + 128 + 3 * 128
        torch.ones(3).add_(1)  # not of the device
        assert found.kernels == 5


@pytest.mark.parametrize("kind", MOST)
def test_a_layer_costs_few_kernels(kind: str) -> None:
    layers = [nn.Conv2d(16 if i else 3, 16, 3, padding=1) for i in range(6)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()
    sites = survey(model, torch.zeros(1, 3, 16, 16)).sites
    passing, dtype = PASSES[kind]
    empty = model.to(META, dtype).to(memory_format=torch.channels_last)
    empty[0].register_forward_hook(begin_graph)
    network, batch = Network(empty, sites), batch_of(4, 16, dtype)
    with as_on_a_gpu():
        alone, whole = (counted(partial(passing, each), batch) for each in (network.bare(), network))
    assert 1 <= (whole.kernels - alone.kernels) / len(sites) <= MOST[kind]
    assert whole.bytes > alone.bytes > 0


@pytest.mark.slow
def test_the_count_runs_and_stands_beside_earlier_ones(tmp_path: Path) -> None:
    words = ["tests.bench.kernels", "--archs", "resnet18", "--images", "2", "--size", "64"]
    for more in ([], ["--before", f"earlier={tmp_path / 'first.json'}"]):
        output = tmp_path / ("second.json" if more else "first.json")
        command = [sys.executable, "-m", *words, *more, "--output", str(output)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "second.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == list(PASSES)
    for row in rows:
        assert row["kernels"] > row["layers"] and row["network_kernels"] > 0
        assert row["before"] == {"earlier": [row["kernels"], row["megabytes"]]}
        assert f"resnet18, {row['kind']}" in done.stdout
