"""`Compressor` and `apply`: one collection, any number of plans, and other people's networks."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn

from dist_prune import (
    CheckpointError,
    Compressor,
    ConfigError,
    ModelError,
    Plan,
    PlanError,
    SiteError,
    apply,
    compress,
    load_compressed,
)
from dist_prune.distributed.world import World
from dist_prune.run import collected
from dist_prune.statistics import collect as statistics
from tests.ranks import run_ranks


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 12),
        nn.ReLU(),
        nn.Linear(12, 5),
    ).eval()


def images(count: int = 60) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def tensors(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.fixture(scope="module")
def fitted() -> Compressor:
    return Compressor().fit(model(), images().split(20))


# ── budgets ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_shortcut_and_the_compressor_find_the_same(fitted: Compressor) -> None:
    for ranks in (0.6, 0.4, "budget:params=0.5"):
        one, other = compress(model(), images().split(20), ranks), fitted.compress(ranks)
        assert one.plan == other.plan and one.kl == other.kl
        assert torch.equal(one.model(images(4)), other.model(images(4)))


def test_statistics_are_collected_once_for_all_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[object] = []
    real = statistics.collect

    def counted(*arguments: Any) -> Any:
        passes.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(collected.statistics, "collect", counted)
    compressor = Compressor(width="off").fit(model(), [images()])
    for share in (0.7, 0.5, 0.3):
        found = compressor.compress(compressor.plan(macs=share))
        assert found.compressed.macs <= share * compressor.dense_.macs
    assert len(passes) == 1


@pytest.mark.parametrize("of", ["macs", "params"])
def test_a_budget_is_met(fitted: Compressor, of: str) -> None:
    found = fitted.compress(fitted.plan(**{of: 0.5}))
    assert getattr(found.compressed, of) <= 0.5 * getattr(found.dense, of)
    assert found.dense == fitted.dense_


def test_a_budget_of_time_is_planned() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(192, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.Linear(1024, 5))
    plan = Compressor(round_to=256).fit(wide, [images()]).plan(latency=0.8)
    assert plan.time is not None and not plan.kept and plan.ranks


@pytest.mark.parametrize("bf16", [False, True])
def test_times_are_taken_in_the_precision_asked_for(
    bf16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share of 1 can always be reached."""
    monkeypatch.setenv("DIST_PRUNE_CACHE", str(tmp_path))
    small = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 5))
    Compressor(bf16=bf16).fit(small, [images()]).plan(latency=1.0)
    keys = [json.loads(path.read_text())["key"] for path in (tmp_path / "latency").iterdir()]
    assert keys and all(("bfloat16 autocast" in key) == bf16 for key in keys)


def test_named_ranks_need_no_budget(fitted: Compressor) -> None:
    assert fitted.plan({"3": "vertical:4", "7": 3}).factored["3"].label == "vertical 4"
    assert fitted.plan("uniform:0.5").ranks["7"] == 6


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ({}, "plan was given 0 budgets; expected one of ranks, macs, params, latency"),
        ({"macs": 0.5, "params": 0.5}, "plan was given 2 budgets"),
        ({"macs": 1.5}, "^ranks budget:macs=1.5: a ratio must be above 0"),
        ({"ranks": {"33": 2}}, "33 is not a site here; did you mean 3"),
        ({"ranks": "nowhere.json"}, "or a plan file"),
    ],
)
def test_budgets_that_cannot_be_are_refused(fitted: Compressor, given: dict[str, Any], answer: str) -> None:
    with pytest.raises(ValueError, match=answer) as refused:
        fitted.plan(**given)
    assert "--" not in str(refused.value)


# ── plans ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("width", ["off", "on"])
def test_a_plan_is_printed_saved_loaded_and_followed(tmp_path: Path, width: Any) -> None:
    compressor = Compressor(width=width).fit(model(), [images()])
    plan, direct = compressor.plan(macs=0.4), compressor.compress(0.4)
    assert bool(plan.kept) == (width == "on")
    for site in compressor.sites_:
        assert f"\n{site}" in str(plan)
    assert plan == direct.plan and plan.loss == pytest.approx(direct.predicted)
    plan.save(tmp_path / "plan.json")
    with pytest.raises(CheckpointError, match="there already"):
        plan.save(tmp_path / "plan.json")
    for way in (plan, Plan.load(tmp_path / "plan.json"), tmp_path / "plan.json", str(tmp_path / "plan.json")):
        found = compressor.compress(way)
        assert found.plan == plan and found.predicted == pytest.approx(plan.loss)
        assert torch.equal(found.model(images(4)), direct.model(images(4)))
    fresh = compress(model(), [images()], Plan.load(tmp_path), width=width)
    torch.testing.assert_close(fresh.model(images(4)), direct.model(images(4)), rtol=1e-3, atol=1e-3)


def test_an_edited_plan_is_followed_and_other_layers_stay(fitted: Compressor) -> None:
    plan = fitted.plan({"0": 4, "3": 6, "7": 5})
    edited = plan.edited({"3": "tucker:4x7", "7": "dense", "9": 2})
    found = fitted.compress(edited)
    labels = {choice.site: choice.label for choice in found.plan.choices}
    assert labels == {"0": "4", "3": "tucker 4x7", "7": "dense", "9": "2"}
    assert tensors(found.model)["3.core.weight"] == (7, 4, 3, 3)
    assert found.plan.factored["3"].loss != plan.factored["3"].loss, "predicted for what is planned now"
    assert {c.site: c.reason for c in found.plan.choices}["7"] == "asked for"


def test_edits_that_cannot_be_are_refused(fitted: Compressor) -> None:
    plan = fitted.plan({"3": 6})
    with pytest.raises(PlanError, match="the plan has no site 33; did you mean 3"):
        plan.edited({"33": 2})
    with pytest.raises(ConfigError, match="whole numbers"):
        plan.edited({"3": "many"})
    with pytest.raises(PlanError, match="rank 99; expected 1 to"):
        fitted.compress(plan.edited({"3": 99}))


def test_a_network_that_changed_after_fit_is_refused() -> None:
    network = model()
    compressor = Compressor(width="off").fit(network, [images()])
    first = compressor.compress(0.5)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network(images()).square().mean().backward()
    optimizer.step()
    for use in (lambda: compressor.plan(macs=0.5), lambda: compressor.compress(0.5), lambda: first.replan(0.5)):
        with pytest.raises(ConfigError, match=r"changed since its statistics were collected \(10 of 13 tensors\)"):
            use()
    assert compressor.fit(network, [images()]).compress(0.5).plan.ranks
    apply(first.plan, network)
    with pytest.raises(ConfigError, match="changed since"):
        compressor.plan(macs=0.5)


# ── scikit-learn's conventions ─────────────────────────────────────────────────────────────────────────────


def test_what_needs_statistics_says_that_fit_comes_first() -> None:
    empty = Compressor()
    for use in (lambda: empty.plan(macs=0.5), lambda: empty.compress(0.5), lambda: empty.sites_):
        with pytest.raises(NotFittedError, match=r"call fit\(model, batches\) first"):
            use()


def test_parameters_are_those_of_scikit_learn(fitted: Compressor) -> None:
    compressor = Compressor(method="pca", metric_damping=[0.1, 1.0], ignored=["9"])
    copied = clone(compressor)
    assert copied is not compressor and copied.get_params() == compressor.get_params()
    assert compressor.set_params(seed=3) is compressor and compressor.get_params()["seed"] == 3
    with pytest.raises(ConfigError, match="no argument damp; did you mean damping"):
        compressor.set_params(damp=3)
    with pytest.raises(NotFittedError):
        clone(fitted).sites_  # noqa: B018
    assert repr(Compressor()).startswith("Compressor(method='fisher'")


def test_layers_that_are_ignored_stay_whether_named_or_given() -> None:
    network = nn.Sequential(model(), nn.Linear(5, 5), nn.Linear(5, 5))
    for ignored in (["0.7", "0.9", "1"], [network[0][7], network[0][9], network[1]], ["0.[79]", network[1]]):
        assert Compressor(ignored=ignored).fit(network, [images()]).sites_ == ("0.0", "0.3", "2")
    for whole in ("0", network[0]):
        assert Compressor(ignored=whole).fit(network, [images()]).sites_ == ("1", "2")
    assert "0.7" in Compressor(ignored="0.7").fit(network, [images()]).skipped_
    with pytest.raises(SiteError, match=r"ignored: no layer is called 0\.77; did you mean 0\.7"):
        Compressor(ignored="0.77").fit(network, [images()])
    with pytest.raises(SiteError, match="a Linear that is no module of this network"):
        Compressor(ignored=nn.Linear(5, 5)).fit(network, [images()])


def test_the_memory_that_is_held_counts_the_batches_and_the_statistics() -> None:
    few = Compressor(width="off", correct="none").fit(model(), [images(60)])
    many = Compressor(width="off", correct="none").fit(model(), [images(120)])
    more = images(60).nbytes
    assert more <= many.memory_ - few.memory_ <= 2.2 * more, "batches, and at most the images to correct from"
    statistics_alone = sum(basis.encode.nbytes for basis in few._fitted().bases.values())
    assert few.memory_ > images(60).nbytes + statistics_alone


def test_results_are_copied_and_pickled(fitted: Compressor) -> None:
    found = fitted.compress(0.6)
    for other in (copy.deepcopy(found), copy.copy(found), pickle.loads(pickle.dumps(found))):
        assert other.plan == found.plan and str(other) == str(found) == found.summary()
        assert torch.equal(other.model(images(4)), found.model(images(4)))
    copied = copy.deepcopy(found)
    assert {*map(id, copied.model.parameters())}.isdisjoint(map(id, found.model.parameters()))
    assert copied.replan(0.5).plan == found.replan(0.5).plan
    with pytest.raises(ConfigError, match="pickled; call compress again"):
        pickle.loads(pickle.dumps(found)).replan(0.5)


# ── in a process group ─────────────────────────────────────────────────────────────────────────────────────


def on_ranks(world: World) -> list[Any]:
    """Uneven shares, in a group that this function did not start."""
    bounds = {1: [0, 60], 2: [0, 20, 60], 3: [0, 10, 30, 60]}[world.size]
    own = images()[bounds[world.rank] : bounds[world.rank + 1]]
    compressor = Compressor(calibrate_images=40, progress=False).fit(model(), own.split(8))
    found = []
    for share in (0.7, 0.45):
        plan = compressor.plan(macs=share)
        result = compressor.compress(plan.edited({"9": 3}))
        found.append((plan, result.kl, result.model.state_dict()))
    return found


def test_any_number_of_ranks_finds_the_same_plans() -> None:
    (alone,) = run_ranks(on_ranks, 1)
    for size in (2, 3):
        everywhere = run_ranks(on_ranks, size)
        for found in everywhere:
            for (plan, kl, state), (expected, its_kl, _), (_, _, first) in zip(
                found, alone, everywhere[0], strict=True
            ):
                assert [(c.site, c.label) for c in plan.choices] == [(c.site, c.label) for c in expected.choices]
                assert [each.channels for each in plan.kept] == [each.channels for each in expected.kept]
                assert kl == pytest.approx(its_kl, rel=1e-2)
                assert all(torch.equal(tensor, first[name]) for name, tensor in state.items())


# ── apply ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("width", ["off", "on"])
def test_a_network_of_ones_own_takes_the_weights_after_apply(tmp_path: Path, width: Any) -> None:
    found = Compressor(width=width).fit(model(), [images()]).compress(0.4)
    found.save(tmp_path / "saved")
    found.plan.save(tmp_path / "plan.json")
    for plan in (found.plan, tmp_path / "plan.json", str(tmp_path / "saved"), tmp_path / "saved" / "plan.json"):
        own = model().train()
        untouched = own[1] if width == "off" else own[2]
        first = own[2]
        assert apply(plan, own) is own and own.training and all(m.training for m in own.modules())
        assert own[2] is first and untouched in [*own]
        assert tensors(own) == tensors(found.model)
        own.load_state_dict(found.model.state_dict())
        assert torch.equal(own.eval()(images(4)), found.model(images(4)))
    torch.testing.assert_close(load_compressed(tmp_path / "saved", model())(images(4)), found.model(images(4)))


def test_every_form_has_the_documented_names() -> None:
    plan = Compressor().fit(model(), [images()]).plan({"0": 4})
    own = apply(plan.edited({"0": "horizontal:6", "3": "tucker:4x7", "7": "output:3"}), model())
    names = set(own.state_dict())
    assert {"0.reduce.weight", "0.expand.weight", "0.expand.bias"} <= names
    assert {"3.reduce.weight", "3.core.weight", "3.expand.weight", "3.expand.bias"} <= names
    assert {"7.reduce.weight", "7.expand.weight", "7.expand.bias"} <= names and "7.weight" not in names


def test_apply_keeps_device_and_type_and_shared_layers_are_replaced_wherever_they_are() -> None:
    plan = Compressor().fit(model(), [images()]).plan({"3": 4})
    with torch.device("meta"):
        assert apply(plan, model())[3].reduce.weight.is_meta
    assert apply(plan, model().double())[3].reduce.weight.dtype == torch.float64
    own = model()
    own.also = own[3]
    apply(plan, own)
    assert own.also is own[3] and hasattr(own[3], "reduce")


class Other(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"conv1": layer})


@pytest.mark.parametrize(
    ("plan", "network", "kind", "answer"),
    [
        (
            {"block.conv2": 2},
            Other(nn.Conv2d(3, 8, 3)),
            PlanError,
            "did you mean block\\.conv1",
        ),
        ({"block.conv1": 2}, Other(nn.BatchNorm2d(8)), PlanError, "is a BatchNorm2d here; expected a Conv2d"),
        ({"block.conv1": 99}, Other(nn.Conv2d(3, 8, 3)), PlanError, "rank 99; expected 1 to"),
        ({"block.conv1": "vertical:2"}, Other(nn.Linear(3, 8)), PlanError, "cannot take the form vertical"),
        ({"block.conv1": 2}, nn.DataParallel(Other(nn.Conv2d(3, 8, 3))), ModelError, "apply the plan, then wrap"),
    ],
)
def test_a_plan_of_another_network_is_refused_and_nothing_changes(
    plan: dict[str, Any], network: nn.Module, kind: type[Exception], answer: str
) -> None:
    before = tensors(network)
    wanted = Plan.from_json([{"site": name, "rank": None} for name in plan]).edited(plan)
    with pytest.raises(kind, match=answer):
        apply(wanted, network)
    assert tensors(network) == before


def test_a_plan_of_a_wider_network_is_refused() -> None:
    plan = Compressor(width="on").fit(model(), [images()]).plan(macs=0.4)
    wider = model()
    wider[0], wider[1], wider[3] = nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.Conv2d(10, 20, 3)
    wider[7], wider[9] = nn.Linear(20, 14), nn.Linear(14, 5)
    before = tensors(wider)
    for use in (lambda: apply(plan, wider), lambda: compress(wider.eval(), [images()], plan)):
        with pytest.raises(
            PlanError, match=r"has (10|14|20) channels here; the plan is of a network with (8|12|16)"
        ):
            use()
    assert tensors(wider) == before


def test_a_plan_is_not_applied_twice_nor_from_what_is_none(tmp_path: Path) -> None:
    plan = Compressor(width="off").fit(model(), [images()]).plan({"3": 4})
    own = apply(plan, model())
    with pytest.raises(PlanError, match="3 is low-rank already"):
        apply(plan, own)
    with pytest.raises(PlanError, match=r"plan\.json: No such file"):
        apply(tmp_path / "plan.json", model())
    (tmp_path / "plan.json").write_text("[1")
    with pytest.raises(PlanError, match="not JSON"):
        apply(tmp_path, model())


# ── exports ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_result_is_exported_as_by_the_command(tmp_path: Path, fitted: Compressor) -> None:
    found = fitted.compress(0.6)
    expected = found.model(images(4))
    said = found.export(tmp_path / "net.onnx")
    assert "onnxruntime against PyTorch on 8 images" in said and "images (batch, 3, 8, 8)" in said
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {"images": images(4).numpy()})
    torch.testing.assert_close(torch.from_numpy(answer), expected, rtol=1e-3, atol=1e-4)
    found.export(tmp_path / "net.pt", "state-dict")
    assert torch.load(tmp_path / "net.pt").keys() == found.model.state_dict().keys()
    pickle.loads(pickle.dumps(found)).export(tmp_path / "net.pt2", "torch-export", images=images(5))
    module = torch.export.load(tmp_path / "net.pt2").module()
    torch.testing.assert_close(module(images(3)), found.model(images(3)))
    assert "net_weights.pt" in found.export(tmp_path / "net.py", "python")
    with pytest.raises(CheckpointError, match="there already") as refused:
        found.export(tmp_path / "net.pt", "state-dict")
    assert "--" not in str(refused.value)
    found.export(tmp_path / "net.pt", "state-dict", overwrite=True)
    with pytest.raises(ConfigError, match="format is 'onx'; expected one of 'onnx'"):
        found.export(tmp_path / "x", "onx")
