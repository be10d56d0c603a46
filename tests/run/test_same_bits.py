"""Ranks whose devices round differently, as GPUs of several models do, hold one network after every stage."""

import os
from pathlib import Path

import torch
from torch import nn

from tests.runs import Bench, result_of


def with_another_rounding(*words: str) -> int:
    """The program, where rank 1 computes factors, and balances them, a little differently."""
    from dist_prune.cli.main import main
    from dist_prune.run import compress, distill, train

    def rounded(network: nn.Module) -> nn.Module:
        if os.environ["RANK"] == "1":
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.mul_(1 + 1e-6)
        return network

    project, balance = compress.project, train.balance
    compress.project = lambda *args: rounded(project(*args))  # type: ignore[assignment]
    for stage in (compress, distill, train):
        stage.balance = lambda network: (balance(network), rounded(network))[0]  # type: ignore[assignment]
    return main(list(words))


def test_the_network_is_the_same_on_all_ranks_though_they_round_differently(bench: Bench, tmp_path: Path) -> None:
    """Every evaluation compares the bits."""
    words = bench.words(tmp_path / "run", epochs=1, distill_steps=2, distill_batch_size=4, sites="5")
    function = "tests.run.test_same_bits:with_another_rounding"
    bench.commands.succeed(*words, ranks=2, function=function)
    result = result_of(tmp_path / "run")
    assert all(result[stage] is not None for stage in ("projected", "distilled", "tuned"))


def test_so_it_is_in_rounds(bench: Bench, tmp_path: Path) -> None:
    words = bench.words(tmp_path / "run", epochs=0, step=0.7, tune_epochs=1, alternate=1, sites="5")
    bench.commands.succeed(*words, ranks=2, function="tests.run.test_same_bits:with_another_rounding")
