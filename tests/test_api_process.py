"""`compress` in other people's programs: their process groups, their arguments, their state, their disk."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dist_prune
from dist_prune import BatchesError, CheckpointError, ConfigError, Plan, RankError, compress, load_compressed
from dist_prune.distributed.world import World
from dist_prune.factorization.losses import with_exact_losses
from dist_prune.network.factored import Factored
from dist_prune.run import planned
from tests.ranks import RanksFailed, run_ranks


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
    ).eval()


def images(count: int = 60) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


# ── process groups ─────────────────────────────────────────────────────────────────────────────────────────


def share(world: World) -> list[Tensor]:
    """Uneven: of three ranks the first has 10 images, the second 20, the third 30."""
    bounds = {1: [0, 60], 2: [0, 20, 60], 3: [0, 10, 30, 60]}[world.size]
    own = images()[bounds[world.rank] : bounds[world.rank + 1]]
    return list(own.split(8))


def on_ranks(world: World) -> tuple[dict[str, int], float, float, dict[str, Tensor], dict[str, int]]:
    """In a group that this function did not start."""
    found = compress(model(), share(world), 0.6, calibrate_images=40)
    again = found.replan("uniform:0.5")
    return found.plan.ranks, found.kl_projected, found.kl, found.model.state_dict(), again.plan.ranks


def test_the_ranks_of_a_group_end_with_what_one_process_finds_in_all_their_images() -> None:
    alone = compress(model(), images().split(8), 0.6, calibrate_images=40)
    for size in (1, 2, 3):
        everywhere = run_ranks(on_ranks, size)
        for ranks, projected, kl, state, again in everywhere:
            assert ranks == alone.plan.ranks and again == {"0": 4, "2": 8, "5": 2}
            assert projected == pytest.approx(alone.kl_projected, rel=1e-4)
            assert kl == pytest.approx(alone.kl, rel=1e-2)
            assert all(torch.equal(tensor, everywhere[0][3][name]) for name, tensor in state.items())


def narrowed_on_ranks(world: World) -> tuple[dict[str, tuple[int, ...]], float, dict[str, Tensor]]:
    found = compress(model(), share(world), 0.5, width="on", forms="dense", calibrate_images=40)
    return {each.group.name: each.channels for each in found.kept}, found.kl or 0.0, found.model.state_dict()


def test_the_ranks_of_a_group_remove_the_same_channels_as_one_process() -> None:
    (alone,) = run_ranks(narrowed_on_ranks, 1)
    assert alone[0]
    everywhere = run_ranks(narrowed_on_ranks, 3)
    for kept, kl, state in everywhere:
        assert kept == alone[0] and kl == pytest.approx(alone[1], rel=1e-2)
        assert all(torch.equal(tensor, everywhere[0][2][name]) for name, tensor in state.items())


def astray(world: World, kind: str) -> None:
    network, batches = model(), share(world)
    if world.rank == 1:
        if kind == "images":
            batches[0] = batches[0].byte()
        elif kind == "shapes":
            batches = [batch[..., :6] for batch in batches]
        else:
            network[0].weight.data[0] += 1
    compress(network, batches, 0.6)


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("images", "rank 1: BatchesError: a batch is torch.uint8"),
        ("shapes", "the ranks have batches of several kinds"),
        ("weights", "rank 1 differs from rank 0 in 1 of 6: 0.weight"),
    ],
)
def test_what_is_wrong_on_one_rank_ends_all_with_its_name(kind: str, answer: str) -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(astray, 2, kind)
    assert set(failed.value.reports) == {0, 1} and answer in failed.value.reports[0]


# ── a program of one process ───────────────────────────────────────────────────────────────────────────────

PROGRAM = """
import sys, torch, dist_prune
from torch import nn
assert not {name.partition(".")[0] for name in sys.modules} & {"tensorboard", "matplotlib"}
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).train()
net[0].weight.requires_grad_(False)
state, threads = torch.get_rng_state(), torch.get_num_threads()
found = dist_prune.compress(net, [torch.randn(32, 8, generator=torch.Generator().manual_seed(0))], {"2": 2})
assert torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads()
assert not torch.distributed.is_initialized() and net.training and torch.is_grad_enabled()
assert not net[0].weight.requires_grad and all(p.grad is None for p in net.parameters())
found.save(sys.argv[1])
dist_prune.load_compressed(sys.argv[1], net)
heavy = {"nvidia.dali", "matplotlib", "tensorboard", "torch.utils.tensorboard"} & set(sys.modules)
assert not heavy, heavy
"""


def test_a_program_keeps_its_state_its_screen_and_its_start(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "saved")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == "", "nothing is printed that was not asked for"


def test_progress_is_shown_where_it_is_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    compress(model(), [images()], "uniform:0.5")
    assert capfd.readouterr() == ("", "")
    compress(model(), [images()], "uniform:0.5", progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "statistics" in err and "correction" in err


# ── arguments ──────────────────────────────────────────────────────────────────────────────────────────────


def test_ranks_may_be_a_share_a_mapping_or_a_plan() -> None:
    given: dict[str, Any] = {"correct": "none"}
    half = compress(model(), [images()], "budget:macs=0.5", **given)
    assert compress(model(), [images()], 0.5, **given).plan == half.plan
    assert compress(model(), [images()], "0.5", **given).plan == half.plan
    assert compress(model(), [images()], half.plan, forms="output", **given).plan.ranks == half.plan.ranks
    mapped = compress(model(), [images()], {"2": 3, "0": 4}, sites=["0", "2"], **given)
    assert mapped.plan.ranks == {"0": 4, "2": 3}


def test_forms_are_part_of_a_plan() -> None:
    """Given as a mapping, as a Plan to `compress` and to `replan`: the same network each time."""
    listed = {"0": 4, "2": "tucker:5x6", "5": "output:3"}
    found = compress(model(), [images()], listed)
    chosen = {name: (choice.form, choice.ranks) for name, choice in found.plan.factored.items()}
    assert chosen == {"0": ("output", (4,)), "2": ("tucker", (5, 6)), "5": ("output", (3,))}
    for again in (compress(model(), [images()], found.plan), found.replan(found.plan)):
        assert [(c.site, c.form, c.ranks) for c in again.plan.choices] == [
            (c.site, c.form, c.ranks) for c in found.plan.choices
        ]
        assert torch.equal(again.model(images(2)), found.model(images(2)))


def test_one_collection_serves_several_budgets() -> None:
    first = compress(model(), [images()], 0.7)
    for ranks in (0.5, "uniform:0.5", {"2": 4}):
        again, fresh = first.replan(ranks), compress(model(), [images()], ranks)
        assert again.plan.ranks == fresh.plan.ranks and again.kl == pytest.approx(fresh.kl, rel=1e-3)
    plain = compress(model(), [images()], "uniform:0.5")
    with pytest.raises(ConfigError, match="other forms than the statistics were collected for"):
        plain.replan(0.5)


def test_exact_losses_are_measured_once_for_all_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[object] = []

    def counted(*arguments: Any) -> Any:
        passes.append(arguments)
        return with_exact_losses(*arguments)

    monkeypatch.setattr(planned, "with_exact_losses", counted)
    first = compress(model(), [images()], 0.6, width="off")
    later = [first.replan(share) for share in (0.5, 0.4)]
    assert len(passes) == 1
    for share, found in zip((0.5, 0.4), later, strict=True):
        alone = compress(model(), [images()], share, width="off")
        assert found.plan == alone.plan and torch.equal(found.model(images(2)), alone.model(images(2)))


def test_options_of_correction_and_statistics_reach_their_places() -> None:
    base = compress(model(), [images()], "uniform:0.5")
    for options in (
        {"ridge": 1.0},
        {"metric_damping": 0.5},
        {"draws": 4},
        {"damping": 0.5},
        {"mirrored": True},
        {"crops": 1},
        {"mirrored": True, "statistics_views": True},
        {"resolve_dense": False, "sites": "0"},
    ):
        found = compress(model(), [images()], "uniform:0.5", **options)
        assert (found.kl_projected, found.kl) != (base.kl_projected, base.kl)


def test_statistics_of_views_are_those_of_images_given_once_more_mirrored() -> None:
    """Without correction nothing else sees them."""
    how = {"ranks": "uniform:0.5", "method": "pca", "correct": "none"}
    x = images()
    both = compress(model(), [torch.cat([x, x.flip(3)])], **how).model(x)
    seen = compress(model(), [x], mirrored=True, statistics_views=True, **how).model(x)
    torch.testing.assert_close(seen, both, rtol=1e-4, atol=1e-5)
    assert (compress(model(), [x], **how).model(x) - both).abs().max() > 1e-3 * both.abs().max()


def test_views_of_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="statistics_views: there are none; give mirrored, crops or both"):
        compress(model(), [images()], 0.6, statistics_views=True)


class Photos(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return images(1)[0], index


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ({"ranks": 8}, r"^ranks 8: expected a share of the multiply-adds such as 0.5, a mapping"),
        ({"ranks": True}, "^ranks True: expected a share"),
        ({"ranks": 1.5}, "^ranks budget:macs=1.5: a ratio must be above 0"),
        ({"ranks": {}}, "no site is given a rank"),
        ({"ranks": Plan(())}, "no site is given a rank"),
        ({"ranks": {"2": 2.5}}, "expected whole numbers, or a form"),
        ({"ranks": {"9": 2}}, "9 is not a site here"),
        ({"method": "taylor"}, "^method is 'taylor'; expected one of 'pca'"),
        ({"side": "both"}, "^side is 'both'; expected one of 'output', 'input'"),
        ({"correct": True}, "^correct is True; expected one of 'none', 'refit', 'regression'"),
        ({"correct": None}, "^correct is None"),
        ({"loss": "l1"}, "^loss is 'l1'"),
        ({"ridge": 0.0}, "^ridge 0.0: expected above 0"),
        ({"metric_damping": 0.0}, "^metric_damping "),
        ({"repair": -1.0}, "^repair -1.0"),
        ({"draws": -1}, "^draws -1"),
        (
            {"method": "gradient", "batches": [(images(), torch.full((60,), 7))]},
            "labels in batches go up to 7, the network",
        ),
        (
            {"batches": Photos()},
            "batches is a data set, Photos, of single images; give torch.utils.data.DataLoader",
        ),
        ({"batches": images()}, "batches is one tensor"),
        ({"batches": 3}, "batches is int"),
    ],
)
def test_arguments_that_cannot_be_are_named(options: dict[str, Any], answer: str) -> None:
    given = {"batches": [images()], "ranks": "uniform:0.5"} | options
    with pytest.raises(ValueError, match=answer) as refused:
        compress(model(), given.pop("batches"), **given)
    assert "--" not in str(refused.value)


# ── on disk ────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_saved_comes_back_and_is_never_overwritten(tmp_path: Path) -> None:
    network = model()
    found = compress(network, [images()], "uniform:0.5")
    found.save(tmp_path / "one")
    back = load_compressed(tmp_path / "one", network)
    torch.testing.assert_close(back(images()), found.model(images()), rtol=0, atol=0)
    assert not any(isinstance(module, Factored) for module in network.modules())
    with pytest.raises(CheckpointError, match=r"pass one of the same class: load_compressed\(folder, model\)"):
        load_compressed(tmp_path / "one")
    with pytest.raises(CheckpointError, match="holds a network already"):
        found.save(tmp_path / "one")


def test_a_network_of_a_known_name_needs_no_class(tmp_path: Path) -> None:
    from dist_prune.network.models import build

    torch.manual_seed(0)
    dense = build("resnet20", 10).eval()
    x = torch.randn(16, 3, 32, 32)
    found = compress(dense, [x], "uniform:0.5", method="pca", correct="none")
    found.save(tmp_path / "saved", arch="resnet20")
    torch.testing.assert_close(load_compressed(tmp_path / "saved")(x), found.model(x), rtol=0, atol=0)


def test_networks_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path: Path) -> None:
    found = compress(model(), [images()], "uniform:0.5")
    found.save(tmp_path / "sound")
    found.model[5].expand.bias.data[0] = float("nan")
    with pytest.raises(dist_prune.UnsoundError, match=r"1 of 9 tensors.*5\.expand\.bias"):
        found.save(tmp_path / "not-finite")
    assert not (tmp_path / "not-finite").exists()


def test_the_figures_of_a_compression_are_printed_as_a_table() -> None:
    found = compress(model(), [images()], "uniform:0.5")
    assert repr(found) == str(found) and found.table in repr(found) and "Sequential" not in repr(found)
    assert issubclass(BatchesError, ValueError) and issubclass(RankError, RuntimeError)
