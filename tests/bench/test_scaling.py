"""The model of what a run costs: its volumes are what ranks really exchange."""

from __future__ import annotations

from dist_prune.config.compression import MethodConfig
from dist_prune.distributed.world import World
from dist_prune.factorization.bases import solve
from tests.bench.scaling import QUICK, Constants, Counting, Volume, bench, efficiency, seconds, volume
from tests.ranks import run_ranks


def exchanged(world: World) -> tuple[int, int, int]:
    counting = Counting(world)
    work = bench(counting, QUICK)
    gathered = work.moments(4)
    summed, shifts = counting.summed, counting.sent
    solve(work.model, work.sites, gathered, MethodConfig(), 0, counting)
    return summed, shifts, counting.sent - shifts


def test_volumes_are_those_that_two_ranks_exchange(world: World) -> None:
    work = bench(world, QUICK)
    text = volume(work.model, work.sites)
    for found in run_ranks(exchanged, 2):
        assert found == (text.statistics_summed, text.shifts_sent, text.bases_sent)
    assert text.gradients_summed == 4 * sum(p.numel() for p in work.model.parameters())


def test_seconds_are_shares_solves_and_the_ring() -> None:
    text = Volume(1000, 0, 200, 100, 0, (2, 2, 3))
    constants = Constants(moments=0.5, step=0.1, solve={2: 1.0, 3: 2.0}, byte=0.001)
    assert seconds(text, constants, 1, 12, 5, 2) == {"statistics": 6.0, "bases": 4.0, "finetune": 1.0}
    four = seconds(text, constants, 4, 12, 5, 2)
    assert (four["statistics"], four["bases"], round(four["finetune"], 9)) == (
        1.5 + 1.5,
        2.0 + 0.2,
        5 * (0.2 + 0.15),
    )


def test_efficiency_is_of_the_same_work() -> None:
    """Two ranks share images and layers; of fine-tuning each has steps of its own."""
    alone = [({"statistics": 4.0, "finetune": 3.0}, {"statistics": 4.0, "finetune": 2.0})]
    two = [({"statistics": 2.0, "finetune": 3.0}, {"statistics": 2.5, "finetune": 2.5})]
    found = [efficiency(phase, alone, two) for phase in ("statistics", "finetune")]
    assert [row.ratio for row in found] == [1.25, 1.25]
    assert [row.detail for row in found] == 2 * ["efficiency 0.80, foretold 1.00"]
