"""Times of sites: what is timed, at which shapes, how often, and what is kept."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from dist_prune.config.flags import parse_forms, parse_rule
from dist_prune.config.recipes import parse
from dist_prune.distributed.world import World
from dist_prune.factorization import latency
from dist_prune.factorization.budget import options_of
from dist_prune.factorization.execution import Execution
from dist_prune.factorization.forms import FORMS
from dist_prune.factorization.latency import (
    LatencyTable,
    Timing,
    candidates,
    inputs_of,
    measure,
    time_calls,
    time_share,
)
from dist_prune.factorization.plan import undecided
from dist_prune.factorization.planner import timed_planner, usual_step
from dist_prune.network.memory_format import channels_last
from dist_prune.network.models import build
from dist_prune.network.sites import Site, View, survey
from dist_prune.run.network import load_network
from tests.ranks import run_ranks
from tests.spin import spin

CPU = torch.device("cpu")


def network() -> nn.Module:
    """Two convolutions of one shape, a third of another, and one that is called twice."""
    torch.manual_seed(0)
    twice = nn.Conv2d(8, 8, 3, padding=1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        Twice(twice),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


class Twice(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(nn.functional.max_pool2d(self.layer(x), 2))


IMAGES = torch.zeros(4, 3, 8, 8)


def ranks_of(
    model: nn.Module, round_to: int = 1, forms: str = "output"
) -> dict[Site, dict[str, list[np.ndarray]]]:
    chosen = tuple(FORMS[name] for name in parse_forms(forms))
    return {s: options_of(View(s), round_to, chosen) for s in survey(model, IMAGES[:1]).sites}


class Clock:
    """In the place of `time_calls`: remembers the outputs of what it was given; times are made up."""

    def __init__(self) -> None:
        self.timed: list[list[torch.Size]] = []
        self.laid_out: list[bool] = []  # whether all outputs with height and width lay NHWC
        self.types: list[set[torch.dtype]] = []

    def __call__(self, calls: list[Callable[[], torch.Tensor]], device: torch.device) -> list[int]:
        assert device == CPU
        outputs = [call() for call in calls]
        self.timed.append([y.shape for y in outputs])
        self.types.append({y.dtype for y in outputs})
        wide = [y for y in outputs if y.dim() == 4]
        self.laid_out.append(all(y.is_contiguous(memory_format=torch.channels_last) for y in wide))
        if len(calls) == 1:
            return [10**6]
        return [10**4 * (len(calls) - i) for i in range(len(calls))]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(latency, "time_calls", found)
    return found


def test_every_call_of_a_site_has_its_shape() -> None:
    model = network()
    given = inputs_of(model, survey(model, IMAGES[:1]).sites, IMAGES)
    assert given["0"] == [((4, 3, 8, 8), torch.float32)]
    assert given["3.layer"] == [((4, 8, 8, 8), torch.float32), ((4, 8, 4, 4), torch.float32)]
    assert given["6"] == [((4, 8), torch.float32)]
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_equal_shapes_share_a_measurement_and_the_next_run_needs_none(clock: Clock, tmp_path: Path) -> None:
    """The network, conv 0, convs 1 and 2 together, conv 3 at two sizes, the linear layer."""
    model = network()
    first = measure(model, ranks_of(model), IMAGES, tmp_path)
    assert len(clock.timed) == 6
    assert first.sites["1"] == first.sites["2"]
    assert measure(model, ranks_of(model), IMAGES, tmp_path) == first
    assert len(clock.timed) == 6


def test_the_real_shapes_are_timed_dense_and_factored(clock: Clock, tmp_path: Path) -> None:
    model = network()
    table = measure(model, ranks_of(model), IMAGES, tmp_path)
    assert clock.timed[0] == [(4, 5)]
    assert all(shape == (4, 8, 8, 8) for shape in clock.timed[1])
    (columns,) = next(iter(ranks_of(model).values())).values()
    assert len(clock.timed[1]) == 1 + len(candidates(columns)) == 1 + len(table.sites["0"]["output"].chains)


def test_the_layout_of_the_network_is_the_one_that_is_timed(clock: Clock, tmp_path: Path) -> None:
    model = network()
    plain = measure(model, ranks_of(model), IMAGES, tmp_path)
    assert clock.laid_out == [True, *[False] * 4, True], "no output of the first and the last has a height"
    measure(channels_last(model), ranks_of(model), IMAGES, tmp_path)
    assert clock.laid_out[6:] == [True] * 6, "measured again"
    assert measure(model, ranks_of(model), IMAGES, tmp_path) == plain and len(clock.timed) == 12


def test_a_site_called_twice_takes_the_sum(clock: Clock, tmp_path: Path) -> None:
    model = network()
    table = measure(model, ranks_of(model), IMAGES, tmp_path)
    once, twice = table.sites["1"]["output"], table.sites["3.layer"]["output"]
    assert (twice.dense, twice.chains) == (2 * once.dense, tuple(2 * chain for chain in once.chains))


def test_other_circumstances_are_measured_anew(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()

    def measured_again(images: torch.Tensor = IMAGES, round_to: int = 1) -> int:
        before = len(clock.timed)
        chosen = (FORMS["output"],)
        options = {s: options_of(View(s), round_to, chosen) for s in survey(model, images[:1]).sites}
        measure(model, options, images, tmp_path)
        return len(clock.timed) - before

    assert measured_again() == 6
    assert measured_again() == 0
    assert measured_again(images=torch.zeros(5, 3, 8, 8)) == 6
    assert measured_again(images=torch.zeros(4, 3, 10, 10)) == 5  # the linear layer sees no difference
    assert measured_again(round_to=2) == 5  # the whole network has no rank
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert measured_again() == 6
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert measured_again() == 6
    model.double()
    assert measured_again(images=IMAGES.double()) == 6


def test_a_damaged_file_is_measured_anew(clock: Clock, tmp_path: Path) -> None:
    model = network()
    first = measure(model, ranks_of(model), IMAGES, tmp_path)
    files = sorted(tmp_path.iterdir())
    files[0].write_text("{")
    files[1].write_text(json.dumps({"key": ["another"], "dense": 1, "ranks": [], "chains": []}))
    assert measure(model, ranks_of(model), IMAGES, tmp_path) == first
    assert len(clock.timed) == 8
    assert sorted(tmp_path.iterdir()) == files


def test_a_few_ranks_stand_for_all() -> None:
    assert [r for (r,) in candidates([np.arange(8, 801, 8)])] == [8, 120, 232, 344, 464, 576, 688, 800]
    assert candidates([np.arange(1, 6)]) == ((1,), (2,), (3,), (4,), (5,))
    both = candidates([np.array([1, 1, 2, 2, 9, 9]), np.array([4, 8, 4, 8, 4, 8])])
    assert both == ((1, 4), (1, 8), (2, 4), (2, 8), (9, 4), (9, 8))


TABLE = LatencyTable(
    1000,
    {
        "a": {
            "output": Timing(400, ((2,), (4,), (8,)), (100, 200, 300)),
            "tucker": Timing(800, ((2, 2), (2, 6), (4, 2), (4, 6)), (100, 300, 200, 600)),
        },
        "b": {"output": Timing(200)},
    },
)


def test_between_measured_ranks_times_lie_on_a_line() -> None:
    assert TABLE.option("a", "output", [np.array([2, 3, 4, 5, 8])]).tolist() == [100, 150, 200, 225, 300]
    assert TABLE.option("b", "output", [np.arange(0)]).tolist() == []
    assert TABLE.predicted({"a": ("output", (3,))}) == 1000 - 400 + 150
    assert TABLE.predicted({}) == 1000


def test_forms_with_two_ranks_lie_on_a_surface_and_at_the_pace_of_their_dense_layer() -> None:
    """The machine took twice as long when tucker was timed: 100 to 600 there are 50 to 300 here."""
    first, second = np.array([2, 2, 3, 4, 4]), np.array([2, 4, 4, 6, 9])
    assert TABLE.option("a", "tucker", [first, second]).tolist() == [50, 100, 150, 300, 300]


def test_every_form_is_timed_at_every_size(clock: Clock, tmp_path: Path) -> None:
    model = network()
    table = measure(model, ranks_of(model, forms="all"), IMAGES, tmp_path)
    assert set(table.sites["1"]) == {"output", "input", "vertical", "horizontal", "tucker"}
    assert set(table.sites["6"]) == {"output"}, "a linear layer is one matrix"
    assert table.sites["3.layer"]["tucker"].dense == 2 * table.sites["1"]["tucker"].dense


def test_layers_that_sum_to_more_than_the_pass_are_scaled_to_it() -> None:
    table = LatencyTable(300, TABLE.sites)
    assert (table.dense("a"), table.dense("b")) == (200, 100)
    assert table.option("a", "output", [np.array([4])]).tolist() == [100]
    assert table.predicted({"a": ("output", (4,))}) == 200


def test_samples_are_taken_in_turn_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "SHAPE_S", 0.0)
    order = []

    def worker(name: str, ms: float) -> Callable[[], None]:
        def call() -> None:
            order.append(name)
            spin(1e-3 * (20 if len(order) < 4 else ms))  # the first calls are slow

        return call

    fast, slow = time_calls([worker("f", 3), worker("s", 6)], CPU)
    assert 3e6 <= fast < slow
    assert slow >= 6e6
    assert "".join(order) == "fff" + "sss" + "fs" + "fsfsfs"


def test_short_calls_are_timed_several_in_a_row() -> None:
    count = 0

    def call() -> None:
        nonlocal count
        count += 1

    (spent,) = time_calls([call], CPU)
    assert count > 100
    assert spent < 10**5


@pytest.mark.parametrize("threads", [1, 2])
def test_one_thread_is_not_charged_for_what_others_do(threads: int) -> None:
    """A wait stands for them. Where several threads share the work, only the wall's clock sees all of it."""
    torch.set_num_threads(threads)
    try:
        (spent,) = time_calls([lambda: time.sleep(0.02)], CPU)
    finally:
        torch.set_num_threads(1)
    assert (spent >= 2e7) == (threads > 1)


def test_wider_pairs_take_longer_and_the_network_more_than_its_layers(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 128, 3), nn.Conv2d(128, 128, 3), nn.Flatten(), nn.Linear(128 * 144, 2))
    images = torch.zeros(4, 3, 16, 16)
    site = survey(model, images[:1]).sites[1]
    table = measure(model, {site: options_of(View(site), 8, (FORMS["output"],))}, images, tmp_path)
    timing = table.sites["1"]["output"]
    assert timing.chains[0] < timing.chains[-1]
    assert timing.chains[0] < timing.dense < table.whole


@pytest.mark.parametrize(
    ("flags", "step"),
    [
        (("--ranks", "budget:macs=0.5"), 1),
        (("--ranks", "budget:latency=0.5"), 16),
        (("--ranks", "budget:latency=0.5", "--round-to", "3"), 3),
    ],
)
def test_where_time_counts_ranks_fill_a_processor_s_registers(
    clock: Clock, world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: tuple[str, ...], step: int
) -> None:
    monkeypatch.setattr(latency, "cache_folder", lambda: tmp_path)
    model, run = network(), parse(["digits", *flags])
    assert timed_planner(run, model, survey(model, IMAGES[:1]), world, IMAGES[:1]).round_to == step


@pytest.mark.parametrize(
    ("arch", "side", "step"), [("resnet20", 32, 2), ("resnet18", 64, 8), ("mobilenet_v2", 64, 4)]
)
def test_on_a_gpu_narrow_layers_are_not_left_a_few_coarse_ranks(arch: str, side: int, step: int) -> None:
    found, rule = survey(build(arch, 10), torch.zeros(1, 3, side, side)), parse_rule("budget:macs=0.5")
    assert usual_step(rule, torch.device("cuda"), found) == step
    narrow, coarse = (
        sum(site.macs for site in found.sites if site.outputs < 8 * each) / sum(site.macs for site in found.sites)
        for each in (step, 2 * step)
    )
    assert narrow < 0.1
    assert step == 8 or coarse >= 0.1


def test_in_bfloat16_layers_are_given_what_they_have_in_a_pass_of_that_precision(
    clock: Clock, tmp_path: Path
) -> None:
    """The images are float32, what follows a convolution is not; both times are kept, each under its own key."""
    model, bf16 = network(), Execution(bf16=True)
    sites = survey(model, IMAGES[:1]).sites
    given = {name: each[0].dtype for name, each in inputs_of(model, sites, IMAGES, bf16).items()}
    assert given == {s.name: torch.float32 if s.name == "0" else torch.bfloat16 for s in sites}
    for _ in range(2):
        measure(model, ranks_of(model), IMAGES, tmp_path)
        measure(model, ranks_of(model), IMAGES, tmp_path, bf16)
    assert clock.types == [{torch.float32}] * 6 + [{torch.bfloat16}] * 6
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("words", [(), ("--bf16",)])
def test_times_are_of_the_precision_that_the_run_trains_in(
    clock: Clock, world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: tuple[str, ...]
) -> None:
    """And the plan's table says so. Whatever autocast there is around it counts for nothing."""
    monkeypatch.setattr(latency, "cache_folder", lambda: tmp_path)
    run, model = parse(["digits", "--ranks", "budget:latency=0.9", *words]), network()
    found = survey(model, IMAGES[:1])
    with torch.autocast("cpu", torch.bfloat16):
        plans = timed_planner(run, model, found, world, IMAGES[:1])
    assert set().union(*clock.types) == {torch.bfloat16 if words else torch.float32}
    shown = plans.format_table(undecided(found), {})
    assert f"of a batch of 256, {'bfloat16 autocast' if words else 'float32'}: " in shown


@pytest.mark.parametrize("execution", [Execution(), Execution(bf16=True), Execution(bf16=True, compiled=True)])
def test_whole_networks_are_timed_in_the_precision_and_by_the_engine_of_the_run(
    execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of torch.compile all but its code generation, which would take a minute."""
    seen, sampled = set[torch.dtype](), latency.sample_calls

    def watched(calls: latency.Calls, device: torch.device, least: int) -> list[list[float]]:
        seen.update(call().dtype for call in calls)  # type: ignore[attr-defined]
        return sampled(calls, device, least)

    monkeypatch.setattr(latency, "sample_calls", watched)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    counters.clear()
    dense, small = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8))
    assert time_share(dense, small, torch.zeros(4, 8), execution) > 0
    assert seen == {torch.bfloat16 if execution.bf16 else torch.float32}
    assert counters["stats"]["unique_graphs"] == (2 if execution.compiled else 0)


@pytest.mark.parametrize("last", [False, True])
def test_a_run_in_channels_last_has_its_times_in_that_layout(
    clock: Clock, world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, last: bool
) -> None:
    monkeypatch.setattr(latency, "cache_folder", lambda: tmp_path)
    words = ["cifar10", "--ranks", "budget:latency=0.5", "--eval-batch-size", "2"]
    run = parse([*words, *(["--channels-last"] if last else [])])
    model, found = load_network(run, world, print)
    timed_planner(run, model, found, world, torch.randn(1, 3, 32, 32))
    assert clock.laid_out[1] == last


def first_rank_only(world: World, folder: str) -> tuple[LatencyTable, int]:
    clock = Clock()
    clock_was, latency.time_calls = latency.time_calls, clock  # type: ignore[assignment]
    cache_was, latency.cache_folder = latency.cache_folder, lambda: Path(folder)
    try:
        model = network()
        run = parse(["digits", "--ranks", "budget:latency=0.5", "--forms", "output", "--eval-batch-size", "4"])
        planner = timed_planner(run, model, survey(model, IMAGES[:1]), world, IMAGES[:1])
    finally:
        latency.time_calls, latency.cache_folder = clock_was, cache_was
    assert planner.latency is not None and planner.batch == 4
    return planner.latency, len(clock.timed)


def test_one_rank_measures_for_all(tmp_path: Path) -> None:
    (first, measured), (second, not_measured) = run_ranks(first_rank_only, 2, str(tmp_path))
    assert first == second
    assert (measured, not_measured) == (6, 0)


def test_other_rules_measure_nothing(clock: Clock, world: World) -> None:
    model = network()
    run = parse(["digits", "--ranks", "budget:macs=0.5"])
    assert timed_planner(run, model, survey(model, IMAGES[:1]), world, IMAGES[:1]).latency is None
    assert clock.timed == []
