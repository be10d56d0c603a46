"""`compress` on networks that return other things than one tensor of logits."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn

from dist_prune import ModelError, StatisticsError, compress, load_compressed
from dist_prune.distributed.world import World
from dist_prune.network.outputs import logits_of
from tests.ranks import run_ranks

CLASSES = 5


class Segmenter(nn.Module):
    """Logits of five classes at each of 12² positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Conv2d(16, CLASSES, 1)

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.relu(self.conv2(torch.relu(self.conv1(x)))))


class TwoHeads(Segmenter):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = super().forward(x)
        return {"classes": y, "depth": y.mean(1)}


class Regressor(Segmenter):
    """One number for an image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean((1, 2, 3))[:, None]


def network(kind: type[nn.Module] = Segmenter) -> nn.Module:
    """With weights large enough for the softmax to tell classes apart."""
    torch.manual_seed(0)
    model = kind().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.5)
    return model


def images(count: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(count, 3, 12, 12, generator=generator).split(16))


def held_out(given: list[Tensor]) -> Tensor:
    return torch.cat(given)[::8]


def divergence(dense: Tensor, other: Tensor) -> float:
    """Mean KL over images and positions, from its definition."""
    p, q = (logits.detach().double().softmax(1) for logits in (dense, other))
    return float((p * (p.log() - q.log())).sum(1).mean())


# ── several positions ──────────────────────────────────────────────────────────────────────────────────────


def test_a_segmentation_is_measured_by_the_mean_divergence_of_its_positions() -> None:
    model, given = network(), images()
    with pytest.warns(UserWarning, match="logits of 5 classes at each of 144 positions"):
        found = compress(model, given, 0.5)
    x = held_out(given)
    assert found.kl == found.lost == pytest.approx(divergence(model(x), found.model(x)), rel=1e-4)
    assert found.kl < 0.9 * found.kl_projected
    assert found.compressed.macs <= 0.5 * found.dense.macs


@pytest.mark.filterwarnings("ignore:the network's outputs are taken for logits")
def test_all_directions_of_a_segmentation_are_the_identity() -> None:
    model, given = network(), images()
    found = compress(model, given, "uniform:1.0", correct="none")
    torch.testing.assert_close(found.model(given[0]), model(given[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:the network's outputs are taken for logits")
@pytest.mark.parametrize(("kind", "loss"), [(Segmenter, "kl"), (Segmenter, "mse"), (Regressor, "mse")])
def test_what_is_lost_is_predicted_within_a_factor_of_two(kind: type[nn.Module], loss: Any) -> None:
    found = compress(network(kind), images(256), 0.8, loss=loss, correct="none", draws=4)
    assert found.measure == loss
    assert found.predicted is not None and 0.5 < found.predicted / found.lost < 2


def shared_out(world: World) -> tuple[float, list[Tensor]]:
    """Images dealt out unevenly to the ranks, in their order."""
    whole = torch.cat(images(40))
    cuts = [0, 40] if world.size == 1 else [0, 11, 40] if world.size == 2 else [0, 11, 16, 40]
    own = whole[cuts[world.rank] : cuts[world.rank + 1]]
    found = compress(network(TwoHeads), [own], 0.5, outputs=classes)
    return found.lost, list(found.model.state_dict().values())


def classes(output: dict[str, Tensor]) -> Tensor:
    return output["classes"]


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_segmentation_depends_on_no_number_of_ranks(size: int) -> None:
    ((alone, weights),) = run_ranks(shared_out, 1)
    for lost, there in run_ranks(shared_out, size):
        assert lost == pytest.approx(alone, rel=1e-4)
        for one, other in zip(weights, there, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


# ── features and regressions ───────────────────────────────────────────────────────────────────────────────


def test_a_regression_is_measured_by_half_the_squared_change() -> None:
    model, given = network(Regressor), images()
    found = compress(model, given, 0.5, loss="mse")
    x = held_out(given)
    expected = float((found.model(x) - model(x)).double().square().mean()) / 2
    assert found.lost == pytest.approx(expected, rel=1e-4)
    assert found.kl is None and found.kl_projected is None
    assert "held-out ½·squared change to the dense network" in repr(found)


def test_one_output_and_no_squared_change_is_refused() -> None:
    with pytest.raises(ModelError, match="one output"):
        compress(network(Regressor), images(), 0.5)


# ── which tensor counts ────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor


class Named(NamedTuple):
    aux: Tensor
    out: Tensor


def test_the_one_tensor_that_can_be_meant_is_found() -> None:
    y, other = torch.zeros(2, 3), torch.zeros(2, 7)
    found = [[y, None], (y,), {"y": y}, {"aux": other, "out": y}, Answer(y, other), Named(other, y), (y, other)]
    assert all(logits_of(output) is y for output in found)
    assert logits_of({"out": torch.zeros(2, 3, 4, 5)}).shape == (2, 3, 20)


@pytest.mark.parametrize(
    ("output", "shapes"),
    [
        (
            {"a": torch.zeros(2, 3), "b": torch.zeros(2)},
            r"dict \(a: torch.float32 \(2, 3\), b: torch.float32 \(2,\)",
        ),
        ((torch.zeros(2, 3, 4, 4),) * 2, r"tuple \(0: torch.float32 \(2, 3, 4, 4\), 1: "),
        (torch.zeros(2), r"torch.float32 \(2,\)"),
        (torch.zeros(2, 3).long(), "torch.int64"),
        ("logits", "str"),
    ],
)
def test_otherwise_what_was_returned_is_listed(output: Any, shapes: str) -> None:
    with pytest.raises(ModelError, match=f"returned {shapes}.*`outputs`"):
        logits_of(output)


def test_the_caller_says_which_tensor_counts_and_gets_the_same_kind_of_network(tmp_path: Path) -> None:
    model, given = network(TwoHeads), images()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=r"classes: .*, depth: .*`outputs`"):
        compress(model, given, 0.5)
    found = compress(model, given, 0.5, outputs=classes)
    again = found.replan(0.7)
    x = held_out(given)
    for each in (found, again):
        assert type(each.model) is TwoHeads is type(model)
        assert each.model(x).keys() == {"classes", "depth"}
        assert each.lost == pytest.approx(divergence(model(x)["classes"], each.model(x)["classes"]), rel=1e-4)
    assert again.lost < found.lost
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training is False and not model._forward_hooks
    found.save(tmp_path / "saved")
    loaded = load_compressed(tmp_path / "saved", model=network(TwoHeads))
    torch.testing.assert_close(loaded(x), found.model(x))


class Aside(Segmenter):
    """A wide linear layer beside what counts, with few rows."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = nn.Linear(16, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv1(x)
        return self.head(torch.relu(self.conv2(torch.relu(y)))), self.aside(y.mean((2, 3)))


def test_what_the_outputs_do_not_depend_on_loses_nothing() -> None:
    found = compress(network(Aside), images(), 0.5, outputs=lambda both: both[0], correct="none")
    assert found.predicted is not None and 0 < found.predicted < 1
    alone = compress(network(), images(), 0.5, outputs=lambda y: y, correct="none")
    assert found.lost < 1.2 * alone.lost  # the layer aside costs next to nothing, too


def test_a_traced_network_stays_one_and_cannot_be_given_other_outputs() -> None:
    given = images()
    traced = torch.fx.symbolic_trace(network())
    found = compress(traced, given, 0.5, loss="mse")
    plain = compress(network(), given, 0.5, loss="mse")
    torch.testing.assert_close(found.model(given[0]), plain.model(given[0]), rtol=1e-3, atol=1e-4)
    assert isinstance(found.model, torch.fx.GraphModule)
    with pytest.raises(ModelError, match=r"torch\.fx\.GraphModule; expected the module that it was traced from"):
        compress(torch.fx.symbolic_trace(network(TwoHeads)), given, 0.5, outputs=classes)


def test_what_cannot_be_done_at_several_positions_is_refused() -> None:
    labelled = [(x, torch.zeros(len(x), dtype=torch.int64)) for x in images()]
    with pytest.raises(
        StatisticsError, match="labels are of images, and the network has outputs at 144 positions"
    ):
        compress(network(TwoHeads), labelled, "uniform:0.5", method="gradient", outputs=classes)
    with pytest.raises(StatisticsError, match="draws 0 goes through all 5 classes at each of 144 positions"):
        compress(network(TwoHeads), images(), 0.5, draws=0, outputs=classes)


# ── libraries ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_network_of_hugging_face_returns_what_it_returned() -> None:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_labels=4)
    model = transformers.ResNetForImageClassification(config).eval()
    x = torch.randn(32, 3, 32, 32)
    found = compress(model, [x], 0.6)
    assert type(found.model(x)) is type(model(x))
    assert found.lost == pytest.approx(divergence(model(x[::8]).logits, found.model(x[::8]).logits), rel=1e-3)
    assert found.compressed.macs <= 0.6 * found.dense.macs
