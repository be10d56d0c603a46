"""Networks of which the loss reaches a part are trained as that part alone would be, on any number of ranks."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dist_prune.config.flags import ConfigError
from dist_prune.config.training import TrainingConfig
from dist_prune.data.loader import Batch
from dist_prune.distributed.fingerprint import digest
from dist_prune.distributed.world import World
from dist_prune.training.dry_step import format_unreached, reached_alone, unreached
from dist_prune.training.trainer import Trainer
from tests.ranks import run_ranks
from tests.runs import Bench, result_of

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LOCAL = TrainingConfig(epochs=1, batch_size=4, lr=0.5)


class Probed(nn.Module):
    """Two heads, of which one is returned; one layer that is never called; one that was frozen by its user."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.ReLU())
        self.head = nn.Linear(8, 4)
        self.auxiliary = nn.Linear(8, 4)
        self.projector = nn.Linear(8, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.stem(x).mean((2, 3))
        return self.head(features), self.auxiliary(features)


def probed() -> nn.Module:
    torch.manual_seed(0)
    return Probed()


UNREACHED = ("auxiliary.weight", "auxiliary.bias", "projector.weight", "projector.bias")


def test_what_the_loss_does_not_reach_is_found_and_nothing_is_changed() -> None:
    model = probed().eval()
    model.stem[0].weight.grad = torch.ones_like(model.stem[0].weight)
    before, random = digest(model), torch.get_rng_state()
    assert unreached(model, IMAGES, LOCAL) == UNREACHED
    assert digest(model) == before, "batch norm's statistics too"
    assert not any(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert list(grads) == ["stem.0.weight"] and (grads["stem.0.weight"] == 1).all()
    assert "auxiliary.weight, auxiliary.bias, projector.weight, projector.bias" in format_unreached(UNREACHED)
    assert format_unreached(()) == ""


def test_the_loss_that_is_trained_for_decides() -> None:
    """A loss of features may reach what the logits do not depend on."""
    model, seen = probed(), []
    model.auxiliary.register_forward_hook(lambda _m, _x, y: seen.append(y))
    names = unreached(model, IMAGES, LOCAL, lambda logits, batch: logits.sum() + seen[-1].sum())
    assert names == ("projector.weight", "projector.bias")


def trained(world: World, whole: bool) -> dict[str, Tensor]:
    """Three steps; with all parts and dead ones left out, or of the parts alone that the loss reaches."""
    model = probed()
    model.stem[2] = nn.Identity()  # dropout would draw other numbers on each rank
    if not whole:
        for name in UNREACHED:
            model.get_parameter(name).requires_grad_(False)
    settings = TrainingConfig(epochs=1, batch_size=6 // world.size, lr=0.5, momentum=0.5, bn="frozen")
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(3, 6, 3, 8, 8, generator=generator), torch.randint(4, (3, 6), generator=generator)
    share = slice(world.rank * 6 // world.size, (world.rank + 1) * 6 // world.size)
    with reached_alone(model, IMAGES, settings, world):
        trainer = Trainer(model, settings, 3, world)
        list(trainer.epoch([Batch(x[i][share], y[i][share], y[i][share]) for i in range(3)]))
    assert all(p.requires_grad for n, p in model.named_parameters() if whole and not n.startswith("frozen"))
    assert not model.frozen.weight.requires_grad
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_rest_is_trained_as_if_it_were_alone(size: int) -> None:
    found = run_ranks(trained, size, True)
    (alone,) = run_ranks(trained, 1, False)
    before = probed().state_dict()
    for rank in found:
        for name, tensor in rank.items():
            torch.testing.assert_close(tensor, alone[name], rtol=1e-4, atol=1e-6)
            changed = name.split(".")[0] in ("stem", "head") and "running" not in name and "tracked" not in name
            assert torch.equal(tensor, before[name]) != changed, name


def test_batch_norm_over_one_value_is_found_with_one_image() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(ConfigError, match="give --batch-size 2 or more, or --bn frozen"):
        unreached(model, IMAGES[:1], LOCAL)
    assert unreached(model, IMAGES, LOCAL) == ()
    assert unreached(model, IMAGES[:1], TrainingConfig(batch_size=1, bn="frozen")) == ()


class Trainless(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise NotImplementedError("for inference only")
        return super().forward(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Trainless(3, 2), "NotImplementedError: for inference only"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).requires_grad_(False), "does not require grad"),
    ],
)
def test_what_cannot_be_trained_is_said(model: nn.Module, words: str) -> None:
    with pytest.raises(ConfigError, match=f"in training mode the network fails, .*{words}"):
        unreached(copy.deepcopy(model), IMAGES, LOCAL)


NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1))
        self.norm = nn.BatchNorm2d(8)
        self.head, self.probe = nn.Linear(8, num_classes), nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.norm(self.body(x)).flatten(1)
        return self.head(x), self.probe(x)
"""


def words_of(bench: Bench, tmp_path: Path, **flags: object) -> list[str]:
    (tmp_path / "net.py").write_text(NETWORK)
    torch.manual_seed(0)
    scope: dict[str, object] = {}
    exec(NETWORK, scope)
    torch.save(scope["Net"](4).state_dict(), tmp_path / "w.pt")  # type: ignore[operator]
    given = {"arch": f"{tmp_path / 'net.py'}:Net", "weights": tmp_path / "w.pt", "epochs": 1}
    return bench.words(tmp_path / "run", **given | flags)


def test_a_run_with_a_probe_that_is_left_over(bench: Bench, tmp_path: Path) -> None:
    words = words_of(bench, tmp_path, distill_steps=2, distill_batch_size=4, ranks="uniform:0.5")
    bench.commands.succeed(*words, ranks=2)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("the loss does not reach these parameters, which stay as they are: probe.weight") == 1
    assert result_of(tmp_path / "run")["tuned"]["images"] == 36


def test_batches_of_one_are_refused_before_the_work(bench: Bench, tmp_path: Path) -> None:
    done = bench.commands(*words_of(bench, tmp_path, batch_size=1))
    assert done.codes == [2]
    assert len(done.errors) == 1 and "give --batch-size 2 or more, or --bn frozen" in done.errors[0]
    assert not (tmp_path / "run").exists()
