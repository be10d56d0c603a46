from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dist_prune.config.compression import MethodConfig
from dist_prune.config.flags import ConfigError
from dist_prune.data.loader import Batch
from dist_prune.data.views import Views, in_views
from dist_prune.distributed.world import World
from dist_prune.factorization.bases import solve
from dist_prune.factorization.plan import Choice, Plan
from dist_prune.factorization.project import project
from dist_prune.network.sites import survey
from dist_prune.statistics import collect as statistics
from dist_prune.statistics.curvature import differentiating
from dist_prune.statistics.moments import Moments, StatisticsError
from dist_prune.utils.files import CheckpointError

METHODS = [
    MethodConfig("pca"),
    MethodConfig("pca", side="input"),
    MethodConfig("whitened-svd"),
    MethodConfig("gradient"),
    MethodConfig("gradient", greedy=True, side="input"),
    MethodConfig("fisher"),
    MethodConfig("fisher", loss="mse", draws=0),
    MethodConfig("hessian-local"),
    MethodConfig("hessian-local", side="input", loss="mse"),
    MethodConfig("hessian-local", sampled=True, probes=64),
    MethodConfig("hessian-global", probes=64),
    MethodConfig("hessian-global", probes=64, rank_loss=True, side="input", loss="kl-reverse"),
    MethodConfig("weight-svd"),
    MethodConfig("weight-svd", side="input"),
    MethodConfig("random"),
]
IMAGES = 64


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, stride=2, groups=2),
        nn.Flatten(),
        nn.Linear(32, 4),
    ).eval()


def batches(count: int) -> list[Batch]:
    count = min(count, IMAGES) if count else IMAGES
    x = torch.randn(IMAGES, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return [Batch(x[i : i + 16], torch.arange(16) % 4, torch.arange(i, i + 16)) for i in range(0, count, 16)]


SITES = survey(network(), batches(0)[0].images[:1]).sites


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.method}-{m.side}-{m.loss}")
def test_every_method_compresses_and_is_exact_at_full_rank(method: MethodConfig, world: World) -> None:
    model, x = network(), batches(0)[0].images
    found = statistics.collect(model, SITES, batches, world, method, seed=0)
    bases = solve(model, SITES, found, method, 0, world)
    full = {"output": {"0": 6, "2": 8, "4": 4}, "input": {"0": 27, "2": 54, "4": 32}}[method.side]
    errors = []
    for ranks in (dict.fromkeys(full, 2), {n: r // 4 * 2 for n, r in full.items()}, full):
        plan = Plan(tuple(Choice(name, rank) for name, rank in ranks.items()))
        compressed = project(model, SITES, bases, plan, method.side)
        errors.append((compressed(x) - model(x)).square().mean().item())
    assert errors[2] < 1e-8 < errors[0]
    assert all(torch.isfinite(b.spectrum).all() for b in bases.values())


def test_a_bf16_forward_is_summed_as_exactly_as_any(world: World) -> None:
    """Outputs and gradients are bfloat16 numbers; products of them are not."""
    method, model = MethodConfig("fisher", loss="mse", statistics_bf16=True), network()
    found = statistics.collect(model, SITES, batches, world, method, 0)
    plain = statistics.collect(model, SITES, batches, world, replace(method, statistics_bf16=False), 0)
    for site in SITES:
        rows, slopes = seen_in_bf16(model, site.name)
        moments, fisher = found.moments[site.name], found.curvature[site.name]
        grouped = rows.unflatten(0, (site.groups, -1))
        expected = torch.stack([torch.cov(group.flatten(1), correction=0) for group in grouped])
        torch.testing.assert_close(moments.covariance, expected, rtol=1e-5, atol=1e-6)
        slopes = slopes.unflatten(0, (site.groups, -1)).flatten(2)
        torch.testing.assert_close(fisher, slopes @ slopes.mT / IMAGES, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(moments.covariance, plain.moments[site.name].covariance, rtol=0.05, atol=0.01)
        assert not torch.allclose(moments.covariance, plain.moments[site.name].covariance, rtol=1e-6)


def seen_in_bf16(model: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """A layer's outputs, and the gradients of the drawn objective, over all images, (C, images·positions)."""
    module, seen, slopes = model.get_submodule(name), [], []
    objective = statistics.Objective("mse")
    for batch in batches(0):
        outputs: list[Tensor] = []
        handle = module.register_forward_hook(lambda _m, _x, y, kept=outputs: kept.append(y))
        with differentiating(model), torch.autocast("cpu", torch.bfloat16):
            logits = model(batch.images.requires_grad_())
        handle.remove()
        for loss in objective(logits.float(), batch):
            (slope,) = torch.autograd.grad(loss, outputs[0])
        assert slope.dtype == outputs[0].dtype == torch.bfloat16
        seen.append(outputs[0].detach().double().transpose(0, 1).flatten(1))
        slopes.append(slope.double().transpose(0, 1).flatten(1))
    return torch.cat(seen, 1), torch.cat(slopes, 1)


@pytest.mark.parametrize("kind", ["pca", "hessian-local", "gradient"])
@pytest.mark.parametrize("side", ["output", "input"])
def test_bf16_statistics_are_near_the_others(kind: str, side: str, world: World) -> None:
    method = MethodConfig(kind, side=side, loss="mse", statistics_bf16=True)  # type: ignore[arg-type]
    found = statistics.collect(network(), SITES, batches, world, method, 0)
    plain = statistics.collect(network(), SITES, batches, world, replace(method, statistics_bf16=False), 0)
    for site in SITES:
        near = [(found.moments[site.name].covariance, plain.moments[site.name].covariance)]
        near += [(found.curvature[site.name], plain.curvature[site.name])] if plain.curvature else []
        for rough, exact in near:
            assert rough.dtype == torch.float64
            assert (rough - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("method", [MethodConfig("pca"), MethodConfig("fisher", draws=0)], ids=lambda m: m.method)
def test_statistics_of_views_are_those_of_images_and_their_mirror_images(
    method: MethodConfig, world: World
) -> None:
    def both(count: int) -> list[Batch]:
        mirrored = [replace(b, images=b.images.flip(3), indices=b.indices + IMAGES) for b in batches(count)]
        return [*batches(count), *mirrored]

    wanted = statistics.collect(network(), SITES, both, world, method, 0, patches=True)
    seen = statistics.collect(
        network(),
        SITES,
        lambda count: in_views(batches(count), Views(mirrored=True)),
        world,
        method,
        0,
        patches=True,
    )
    for site in SITES:
        name = site.name
        torch.testing.assert_close(seen.moments[name].covariance, wanted.moments[name].covariance)
        assert seen.moments[name].count == wanted.moments[name].count
        if method.method == "fisher":
            torch.testing.assert_close(seen.curvature[name], wanted.curvature[name])
    assert seen.patches.keys() == wanted.patches.keys() == {"0", "2"}
    torch.testing.assert_close(seen.patches["2"].places, wanted.patches["2"].places)


@pytest.mark.parametrize("method", METHODS[:11], ids=lambda m: f"{m.method}-{m.side}-{m.loss}")
def test_statistics_come_back_from_disk_bit_for_bit(method: MethodConfig, world: World, tmp_path: Path) -> None:
    found = statistics.collect(network(), SITES, batches, world, method, seed=0)
    made_of = statistics.origin(method, "model", "images", {"crop": 6}, 0)
    path = tmp_path / "statistics.safetensors"
    statistics.save(path, found, made_of)
    again = statistics.load(path, SITES, made_of, torch.device("cpu"))
    for site in SITES:
        assert torch.equal(again.moments[site.name].covariance, found.moments[site.name].covariance)
        assert torch.equal(again.moments[site.name].mean, found.moments[site.name].mean)
        if found.curvature:
            assert torch.equal(again.curvature[site.name], found.curvature[site.name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "other"}, "run: another network there, or other weights; leave"),
        ({"images": "other"}, "run: other images there than here; leave"),
        ({"image": {"crop": 7}}, "run: crop: 6 there, 7 here; leave"),
        ({"side": "input"}, "side: output there, input here"),
        ({"bf16": True}, "bf16: None there, True here"),
        ({"views": {"mirrored": True}}, "views: None there, {'mirrored': True} here"),
        ({"seed": 4, "draws": 3}, "draws: 1 there, 3 here; seed: 0 there, 4 here"),
    ],
)
def test_statistics_of_something_else_are_refused_with_what_differs(
    change: dict[str, object], message: str, world: World, tmp_path: Path
) -> None:
    method = MethodConfig("fisher")
    made_of = statistics.origin(method, "a", "b", {"crop": 6}, 0)
    path = tmp_path / "statistics.safetensors"
    statistics.save(path, statistics.collect(network(), SITES, batches, world, method, 0), made_of)
    with pytest.raises(StatisticsError, match=message):
        statistics.load(path, SITES, made_of | change, torch.device("cpu"))


def test_damaged_foreign_and_incomplete_files_are_refused(world: World, tmp_path: Path) -> None:
    path, made_of = tmp_path / "statistics.safetensors", {"model": "a"}
    with pytest.raises(CheckpointError, match="there is no such file"):
        statistics.load(path, SITES, made_of, torch.device("cpu"))
    found = statistics.collect(network(), SITES[:2], batches, world, MethodConfig(), 0)
    statistics.save(path, found, made_of)
    with pytest.raises(StatisticsError, match="has no 4; collect again"):
        statistics.load(path, SITES, made_of, torch.device("cpu"))
    statistics.load(path, SITES[:1], made_of, torch.device("cpu"))
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        statistics.load(path, SITES[:1], made_of, torch.device("cpu"))


def test_pca_statistics_do_not_depend_on_the_seed_but_drawn_ones_do() -> None:
    for method, depends in (
        (MethodConfig("pca"), False),
        (MethodConfig("gradient"), False),
        (MethodConfig("fisher"), True),
    ):
        same = statistics.origin(method, "", "", {}, 0) == statistics.origin(method, "", "", {}, 1)
        assert same != depends


def test_too_few_rows_and_probes_are_told_with_the_site(world: World) -> None:
    def few(count: int) -> list[Batch]:
        return [replace(b, images=b.images[:3], labels=b.labels[:3], indices=b.indices[:3]) for b in batches(1)]

    method = MethodConfig("hessian-global", probes=3)
    found = statistics.collect(network(), SITES, few, world, method, 0)
    text = statistics.warnings(found, SITES, method, 3)
    rows, probes = text
    assert rows == (
        "fewer rows than dimensions in 1 layers (4: 3 for 4): their covariances are rank-deficient; "
        "raise --statistics-images"
    )
    assert probes.startswith("fewer probes than dimensions in 3 layers (0: 3 for 6, 2: 1 for 4, 4: 3 for 4): ")
    assert probes.endswith("their Hessians are rank-deficient; raise --probes")
    assert not statistics.warnings(statistics.Statistics(), SITES, MethodConfig("random"), 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "pca", "greedy": True}, "--greedy goes with --method gradient"),
        ({"method": "fisher", "rank_loss": True}, "--rank-loss goes with --method hessian-global"),
        ({"method": "hessian-global", "sampled": True}, "--sampled goes with --method hessian-local"),
        ({"method": "fisher", "side": "input"}, "on --side input use pca or hessian-local"),
        ({"method": "random", "statistics": Path("x")}, "--method random uses none; leave it out"),
        ({"method": "fisher", "damping": 0.0}, "--damping 0.0: expected above 0"),
        ({"probes": 0}, "--probes 0"),
        ({"method": "hessian-global", "statistics_bf16": True}, "--statistics-bf16: goes with pca"),
        ({"method": "weight-svd", "statistics_bf16": True}, "--statistics-bf16: goes with pca"),
    ],
)
def test_flags_that_do_not_fit_the_method_say_what_to_do(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MethodConfig(**settings)


class Left(statistics.Passes):
    """Passes that are left for good after some batches, counted over all of them."""

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.kept: dict[str, dict[str, torch.Tensor]] = {}
        self.moments: dict[str, Moments] = {}

    def watch(self, batches, sums):
        for batch in batches:
            if not self.batches:
                self.kept = {
                    name: {k: t.clone() for k, t in each.state_dict().items()} for name, each in sums.items()
                }
                raise InterruptedError
            self.batches -= 1
            yield batch

    def keep(self, moments):
        self.moments = moments


class Again(Left):
    """The same passes, taken up where they were left."""

    def watch(self, batches, sums):
        if self.kept:
            for name, each in sums.items():
                each.load_state_dict(self.kept[name])
            batches, self.kept = list(batches)[self.batches :], {}
        return iter(batches)

    def finished(self):
        return self.moments or None


@pytest.mark.parametrize("stop", [1, 6])
@pytest.mark.parametrize("method", METHODS[:11], ids=lambda m: f"{m.method}-{m.side}-{m.loss}")
def test_sums_can_be_left_and_taken_up_bit_for_bit(method: MethodConfig, stop: int, world: World) -> None:
    whole = statistics.collect(network(), SITES, batches, world, method, 0)
    left, again = Left(stop), Again(0)
    try:
        found = statistics.collect(network(), SITES, batches, world, method, 0, left)
    except InterruptedError:
        again.kept, again.moments = left.kept, left.moments
        again.batches = stop - 4 if left.moments else stop
        found = statistics.collect(network(), SITES, batches, world, method, 0, again)
    else:
        assert stop > 4 and (method.method == "fisher" or not whole.curvature)
    for site in SITES:
        if whole.moments:
            assert torch.equal(found.moments[site.name].covariance, whole.moments[site.name].covariance)
        if whole.curvature:
            assert torch.equal(found.curvature[site.name], whole.curvature[site.name])


@pytest.mark.parametrize("method", ["pca", "fisher"])
def test_patch_moments_are_collected_in_the_same_pass_and_kept_with_the_others(
    method: str, world: World, tmp_path: Path
) -> None:
    settings = MethodConfig(method)
    plain = statistics.collect(network(), SITES, batches, world, settings, 0)
    found = statistics.collect(network(), SITES, batches, world, settings, 0, patches=True)
    assert not plain.patches and list(found.patches) == ["0", "2"]
    for name, moments in plain.moments.items():
        torch.testing.assert_close(found.moments[name].outer, moments.outer)
    statistics.save(tmp_path / "with", found, {})
    statistics.save(tmp_path / "without", plain, {})
    read = statistics.load(tmp_path / "with", SITES, {}, world.device, patches=True).patches
    for name, moments in found.patches.items():
        torch.testing.assert_close(vars(read[name]), vars(moments), rtol=0, atol=0)
    with pytest.raises(StatisticsError, match=r"no patch moments of 0.*--forms output"):
        statistics.load(tmp_path / "without", SITES, {}, world.device, patches=True)


@pytest.mark.parametrize(
    ("settings", "device", "native", "expected"),
    [
        ({}, "cuda", True, True),
        ({}, "cuda", False, False),
        ({}, "cpu", True, False),
        ({"statistics_float32": True}, "cuda", True, False),
        ({"statistics_bf16": True}, "cpu", False, True),
        ({"method": "hessian-global"}, "cuda", True, False),
    ],
)
def test_gpus_that_compute_in_bfloat16_run_the_statistics_in_it_unless_float32_is_asked_for(
    settings: dict, device: str, native: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native)
    assert statistics.runs_bf16(MethodConfig(**settings), torch.device(device)) is expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_network_of_another_precision_is_run_in_its_own(world: World, dtype: torch.dtype) -> None:
    """Autocast made bfloat16 of the inputs of a batch norm whose weights were float16: CUDA refuses that."""
    seen: list[torch.dtype] = []
    model = network().to(dtype)
    model[0].register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    given = [replace(batch, images=batch.images.to(dtype)) for batch in batches(0)]
    settings = MethodConfig("pca", statistics_bf16=True)
    sites = survey(model, given[0].images[:1]).sites
    statistics.collect(model, sites, lambda _: given, world, settings, 0)
    assert {*seen} == {dtype}
