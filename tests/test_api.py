"""`dist_prune.compress`: any network and any batches, against the pipeline and closed forms."""

import copy
import importlib.metadata
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dist_prune
from dist_prune import BatchesError, Compression, Plan, compress, load_compressed
from dist_prune.config.flags import ConfigError
from dist_prune.correction.correct import CorrectionError
from dist_prune.factorization.plan import PlanError
from dist_prune.network.sites import SiteError
from dist_prune.statistics.moments import StatisticsError
from tests.commands import ROOT
from tests.runs import Bench, images_of, network


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 5))


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    model = network("tiny")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
    model[-1].weight.data.mul_(40)  # answers that differ
    return model


def noise(*shape: int, batches: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, *shape, generator=generator) for _ in range(batches)]


def outputs(model: nn.Module, batches: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.cat(batches))


@pytest.mark.parametrize("correct", ["none", "refit", "regression"])
@pytest.mark.parametrize(("side", "method"), [("output", "fisher"), ("output", "pca"), ("input", "pca")])
def test_all_directions_kept_is_the_same_function(correct: Any, side: Any, method: Any) -> None:
    model, batches = perceptron().double(), [b.double() for b in noise(12)]
    found = compress(model, batches, "uniform:1", method=method, side=side, correct=correct)
    torch.testing.assert_close(outputs(found.model, batches), outputs(model, batches), rtol=1e-6, atol=1e-6)
    assert found.kl_projected == pytest.approx(0, abs=1e-9) and found.kl == pytest.approx(0, abs=1e-9)
    assert len(found.plan.ranks) == 3


@pytest.mark.parametrize(("build", "shape"), [(perceptron, (12,)), (convolutions, (3, 8, 8))])
def test_the_given_network_is_left_as_it_was(build: Any, shape: tuple[int, ...]) -> None:
    model = build().train()
    model[0].weight.requires_grad_(False)
    before, frozen = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    found = compress(model, noise(*shape))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.training and not found.model.training
    assert [p.requires_grad for p in model.parameters()] == frozen
    assert all(p.grad is None for p in model.parameters())
    assert not {*map(id, model.parameters())} & {*map(id, found.model.parameters())}
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_figures_are_those_of_the_network_returned() -> None:
    model, batches = convolutions(), noise(3, 8, 8)
    found = compress(model, batches, "budget:macs=0.6", correct="none")
    assert found.compressed.params == sum(p.numel() for p in found.model.parameters())
    assert found.dense.params == sum(p.numel() for p in model.parameters())
    assert 0.4 < found.compressed.macs / found.dense.macs <= 0.6
    held = torch.cat(batches)[::8]
    dense, other = (F.log_softmax(outputs(m, [held]).double(), 1) for m in (model, found.model))
    expected = (dense.exp() * (dense - other)).sum(1).mean().item()
    assert found.kl == found.kl_projected == pytest.approx(expected, rel=1e-4)
    assert found.unit == "KL" and found.predicted is not None and found.predicted > 0
    assert f"{found.kl:.4g}" in str(found) and "MACs" in str(found)
    assert f"network: {found.predicted:.4g} predicted, {found.kl:.4g} projected" in str(found)


def test_correction_brings_it_nearer() -> None:
    model, batches = convolutions(), noise(3, 8, 8, batches=12)
    found = compress(model, batches, "uniform:0.4", method="pca")
    assert found.kl < 0.9 * found.kl_projected
    held = torch.cat(batches)[::8]
    dense, other = (F.log_softmax(outputs(m, [held]).double(), 1) for m in (model, found.model))
    assert found.kl == pytest.approx((dense.exp() * (dense - other)).sum(1).mean().item(), rel=1e-4)


def test_batches_may_come_from_anywhere_once() -> None:
    model, batches = perceptron(), noise(12)
    labels = [torch.zeros(16, dtype=torch.int64) for _ in batches]
    ways: list[Any] = [
        batches,
        (b for b in batches),
        zip(batches, labels, strict=True),
        [[b, y] for b, y in zip(batches, labels, strict=True)],
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.cat(batches)), batch_size=16),
    ]
    plans = [compress(model, way).plan for way in ways]
    assert all(plan == plans[0] for plan in plans)


def test_it_is_what_a_run_does(bench: Bench, tmp_path: Path) -> None:
    """Equal plans and, but for rounding, equal networks, from the same images."""
    words = bench.words(
        tmp_path / "run",
        ranks="budget:macs=0.6",
        method="fisher",
        correct="regression",
        epochs=0,
        eval_batch_size=8,
    )
    bench.commands.succeed(*words)
    model = network("tiny")
    model.load_state_dict(torch.load(bench.weights))
    images, _ = images_of(bench.data / "train")  # in the order of their names, as the program lists them
    found = compress(model, images.split(8), "budget:macs=0.6")
    plan = Plan.from_json(json.loads((tmp_path / "run" / "plan.json").read_text())["choices"])
    assert found.plan.ranks == plan.ranks
    val = [images_of(bench.data / "val")[0]]
    ours, theirs = outputs(found.model, val), outputs(load_compressed(tmp_path / "run"), val)
    off = (ours - theirs).norm() / (outputs(model, val) - theirs).norm()
    assert off < 0.05, "the pictures are decoded by Pillow here and by DALI there"


@pytest.mark.parametrize(
    ("batches", "answer"),
    [
        ([], "no batches: an iterator that was gone through before"),
        (iter(()), "no batches"),
        ([torch.zeros(7, 12)], "7 images: expected at least 8"),
        ([torch.zeros(16, 12), torch.zeros(16, 13)], r"images of \(12,\) and \(13,\)"),
        (
            [torch.zeros(16, 12, dtype=torch.uint8)],
            r"a batch is torch.uint8 \(16, 12\); expected a floating-point",
        ),
        ([torch.zeros(16)], r"a batch is torch.float32 \(16,\)"),
        (["images"], "a batch is str"),
        ([(torch.zeros(16, 12), torch.zeros(16))], "labels of 16 images are"),
        ([(torch.zeros(16, 12), torch.zeros(4, dtype=torch.int64))], "labels of 16 images are"),
        (
            [torch.zeros(16, 12), (torch.zeros(4, 12), torch.zeros(4).long())],
            "some batches have labels and some have",
        ),
        ([torch.zeros(16, 13)], r"does not take batches of \(n, 13\)"),
    ],
)
def test_batches_that_cannot_be_used(batches: Any, answer: str) -> None:
    with pytest.raises(BatchesError, match=answer):
        compress(perceptron(), batches)


class Moody(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.dropout(x, 0.5))


@pytest.mark.parametrize(
    ("options", "kind", "answer"),
    [
        ({"ranks": "half"}, ConfigError, "ranks half: expected uniform:RATIO"),
        ({"ranks": "budget:macs=0.001"}, PlanError, "out of reach"),
        ({"ranks": "sites:9=3"}, PlanError, "9 is not a site"),
        ({"sites": "@conv"}, SiteError, "chooses none"),
        (
            {"method": "random-init", "ranks": "uniform:0.5"},
            ConfigError,
            "method is 'random-init'",
        ),
        ({"method": "fisher", "side": "input"}, ConfigError, "method fisher is of outputs"),
        ({"method": "gradient", "ranks": "uniform:0.5"}, StatisticsError, "needs labels"),
        ({"calibrate_images": 4}, ConfigError, "calibrate_images 4"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], kind: type[Exception], answer: str) -> None:
    with pytest.raises(kind, match=answer):
        compress(perceptron(), noise(12), **options)


def test_a_network_that_throws_dice_is_refused() -> None:
    with pytest.raises(CorrectionError, match="other outputs the second time"):
        compress(Moody(), noise(12), "uniform:0.5")


def test_too_few_rows_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"fewer rows than dimensions in 2 layers \(0: 16 for 24, 2: 16 for 24\)"):
        compress(perceptron(), noise(12, batches=1), "uniform:0.5", method="pca")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compress(perceptron(), noise(12), "uniform:0.5", method="pca")


def test_probes_are_counted_by_image() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compress(perceptron(), noise(12), "uniform:0.5", method="hessian-global", correct="none")
    with pytest.warns(UserWarning, match=r"fewer probes than dimensions in 2 layers \(0: 16 for 24"):
        compress(perceptron(), noise(12, batches=1), "uniform:0.5", method="hessian-global", correct="none")


def test_options_reach_their_places() -> None:
    model, batches = perceptron(), noise(12)
    assert compress(model, batches, "uniform:0.3", sites="2", round_to=4).plan.ranks == {"2": 8}
    a, b = (
        compress(model, batches, "uniform:0.5", method="random", seed=seed, correct="none").kl for seed in (0, 1)
    )
    assert a != b and a == compress(model, batches, "uniform:0.5", method="random", seed=0, correct="none").kl


def test_the_readmes_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text()
    examples = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    network = nn.Sequential(*perceptron()[:4], *[nn.Identity()] * 6, nn.Linear(24, 5))  # 0, 2, 10
    scope: dict[str, Any] = {"model": network, "batches": noise(12)}
    assert len(examples) == 2
    for example in examples:
        exec(example, scope)
    assert isinstance(scope["small"], nn.Module) and "held-out KL" in capsys.readouterr().out
    assert scope["compression"].plan.ranks["2"] == 8 and "10" not in scope["compression"].plan.ranks
    x = noise(12)[0]
    torch.testing.assert_close(scope["model"](x), scope["compression"].model(x))


def alone() -> None:
    """As in a notebook, in a process of its own."""
    batches = noise(12)
    found = [compress(perceptron(), iter(batches)) for _ in range(2)]
    assert isinstance(found[0], Compression) and found[0].plan == found[1].plan
    try:
        compress(perceptron(), [])
    except BatchesError:
        print(compress(perceptron(), batches).table)


def test_in_a_process_of_its_own_again_and_again_and_after_an_error(bench: Bench) -> None:
    done = bench.commands.succeed(function="tests.test_api:alone", ranks=0, SLURM_JOB_ID="7")
    assert "MACs" in done.out


def test_every_name_of_the_package_can_be_had_and_no_other() -> None:
    names = [name for name in dist_prune.__all__ if name != "__version__"]
    assert all(getattr(dist_prune, name).__name__ == name for name in names)
    assert dist_prune.__version__ == importlib.metadata.version("dist-prune")
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        dist_prune.compres  # noqa: B018
