import pytest
import torch
from torch import Tensor, nn

from dist_prune.artifacts.answers import right
from dist_prune.data.loader import Batch
from dist_prune.distributed.world import World
from dist_prune.network.sites import survey
from dist_prune.training.evaluate import EvaluationError, Metrics, predict, score, time_sites
from tests.ranks import run_ranks

IMAGES = 29


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.Dropout(0.5))


def share(rank: int, size: int) -> list[Batch]:
    """An uneven share in batches, an empty one among them."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(IMAGES, 3, 2, 2, generator=generator)
    labels = torch.randint(7, (IMAGES,), generator=generator)
    cuts = {1: [0, 29], 2: [0, 25, 29], 3: [0, 20, 29, 29]}[size]
    mine = torch.arange(IMAGES)[cuts[rank] : cuts[rank + 1]]
    return [Batch(x[i], labels[i], i) for i in (mine[:0], *mine.split(6))]


def measured(world: World) -> Metrics:
    dense = predict(network(0), share(world.rank, world.size))
    found = predict(network(1), share(world.rank, world.size))
    return score(found, IMAGES, world, dense)


def by_hand() -> Metrics:
    """Straight from the definitions, image by image, in float64."""
    (_, batch, *rest) = share(0, 1)
    batches = [batch, *rest]
    x, labels = (torch.cat([getattr(b, name) for b in batches]) for name in ("images", "labels"))
    dense, found = (network(seed).eval()(x).double() for seed in (0, 1))
    p, q = dense.softmax(1), found.softmax(1)
    top1 = top5 = gained = lost = 0
    for before, logits, label in zip(dense, found, labels, strict=True):
        was, now = (int(row.argmax()) == int(label) for row in (before, logits))
        gained, lost = gained + (now and not was), lost + (was and not now)
        order = sorted(range(7), key=lambda k: -logits[k].item())
        top1 += order[0] == label
        top5 += label.item() in order[:5]
    loss = -q[range(IMAGES), labels].log().mean().item()
    kl = (p * (p / q).log()).sum(1).mean().item()
    return Metrics(100 * int(top1) / IMAGES, 100 * top5 / IMAGES, loss, IMAGES, kl, gained, lost)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_metrics_are_the_definitions_on_any_number_of_ranks(size: int) -> None:
    expected = by_hand()
    for found in run_ranks(measured, size):
        assert found.top1 == pytest.approx(expected.top1)
        assert found.top5 == pytest.approx(expected.top5)
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        assert found.kl == pytest.approx(expected.kl, rel=1e-5)
        assert found.images == IMAGES
        assert (found.gained, found.lost) == (expected.gained, expected.lost)
        assert expected.gained and expected.lost, "images that tell nothing"


def answered(world: World) -> Tensor:
    return right(predict(network(1), share(world.rank, world.size)), IMAGES, world)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_rank_knows_which_images_were_got_right(size: int) -> None:
    batches = share(0, 1)
    x, labels = (torch.cat([getattr(b, name) for b in batches]) for name in ("images", "labels"))
    expected = network(1).eval()(x).argmax(1) == labels
    assert expected.any() and not expected.all()
    for found in run_ranks(answered, size):
        assert found.tolist() == expected.tolist()


def test_a_network_does_not_diverge_from_itself(world: World) -> None:
    same = predict(network(0), share(0, 1))
    assert score(same, IMAGES, world, same).kl == pytest.approx(0, abs=1e-12)
    assert score(same, IMAGES, world).kl is None


def test_an_image_too_few_is_an_error(world: World) -> None:
    found = predict(network(0), share(0, 1)[:-1])
    with pytest.raises(EvaluationError, match="saw 24 images, expected each of 29 once"):
        score(found, IMAGES, world)


def test_predictions_of_other_images_are_not_compared(world: World) -> None:
    dense, found = predict(network(0), share(0, 1)[::-1]), predict(network(1), share(0, 1))
    with pytest.raises(EvaluationError, match="are of other images"):
        score(found, IMAGES, world, dense)


def test_fewer_than_five_classes(world: World) -> None:
    batch = Batch(torch.randn(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64), torch.arange(4))
    found = predict(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), [batch])
    assert score(found, 4, world).top5 == 100


def test_time_shares_follow_the_work() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64 * 28 * 28, 2))
    sites = survey(model, torch.zeros(1, 3, 32, 32)).sites
    shares = time_sites(model, sites, torch.randn(8, 3, 32, 32))
    assert shares["1"] > shares["3"] > 0
    assert sum(shares.values()) <= 100
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
