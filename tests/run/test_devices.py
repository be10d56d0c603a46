"""What can be said of a GPU without one: tensors there have shapes and devices, but no values.

An operator whose tensors are on two devices raises, as on a GPU. Whoever asks for a value waits for the device;
that is noted.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dist_prune.config.compression import MethodConfig
from dist_prune.config.training import TuningConfig
from dist_prune.data.loader import Batch
from dist_prune.factorization import bases
from dist_prune.network.models import CifarResNet
from dist_prune.network.sites import Site, survey
from dist_prune.statistics import collect as statistics
from dist_prune.training import trainer
from dist_prune.training.distillation_loss import distillation_loss
from dist_prune.training.evaluate import predict, score
from dist_prune.training.trainer import Trainer

AFTER = -1  # the last batch
METHODS = [
    MethodConfig("pca"),
    MethodConfig("pca", side="input"),
    MethodConfig("whitened-svd"),
    MethodConfig("fisher"),
    MethodConfig("fisher", draws=0, loss="mse"),
    MethodConfig("gradient"),
    MethodConfig("hessian-local"),
    MethodConfig("hessian-local", side="input"),
    MethodConfig("hessian-global", probes=8),
    MethodConfig("weight-svd"),
    MethodConfig("random"),
]


@dataclass
class Gpu:
    """A world of one rank on it, and the batches during which the host waited for it."""

    device: torch.device
    rank: int = 0
    size: int = 1
    batch: int = AFTER
    waited: set[int] = field(default_factory=set)

    def sum_(self, *tensors: Tensor) -> None:
        assert {t.device for t in tensors} <= {self.device, torch.device("cpu")}

    def any(self, here: bool) -> bool:
        return here

    def sum_symmetric_(self, *matrices: Tensor) -> None:
        self.sum_(*matrices)

    def broadcast_(self, *tensors: Tensor, source: int = 0) -> None:
        self.sum_(*tensors)

    def batches(self, images: int = 0) -> Iterator[Batch]:
        """Of a few, and a note of which is at work."""
        for self.batch in range(4):
            numbers = torch.arange(8, device=self.device)
            yield Batch(torch.randn(8, 3, 16, 16, device=self.device), numbers, numbers)
        self.batch = AFTER

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def require_same(self, what: str, values: object) -> None:
        pass

    def replicate(self, model: nn.Module, broadcast_buffers: bool) -> nn.Module:
        model.no_sync = nullcontext
        return model

    def answer(self, tensor: Tensor) -> int:
        """Yes, 1, or of whole numbers −1: as if nothing were wrong."""
        if tensor.device == self.device:
            self.waited.add(self.batch)
        return -1 if tensor.dtype == torch.int64 else 1


class Shapes(FakeTensorMode):
    """Operators compute shapes and devices; those that need values, or bring them to the host, are waits."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.aten._local_scalar_dense.default:
            return self.gpu.answer(args[0])
        found = super().__torch_dispatch__(operator, types, args, kwargs)
        if operator is torch.ops.aten._to_copy.default and found.device != args[0].device == self.gpu.device:
            self.gpu.answer(args[0])
        return found


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    imitated, hooks = Gpu(torch.device("cuda", 0)), []

    def backward(loss: Tensor, retain_graph: bool = False) -> None:
        """torch's own needs a driver: every layer gets a gradient, the last one first."""
        assert loss.device == imitated.device
        for y, hook in reversed(hooks):
            hook(torch.empty_like(y))
        if not retain_graph:
            hooks.clear()

    monkeypatch.setattr(FakeTensor, "tolist", lambda t: [imitated.answer(t)] * len(t.reshape(-1)))
    monkeypatch.setattr(FakeTensor, "register_hook", lambda y, hook: hooks.append((y, hook)))
    monkeypatch.setattr(torch.autograd, "backward", backward)
    with Shapes(imitated):
        yield imitated


@pytest.fixture(scope="module")
def sites() -> tuple[Site, ...]:
    return survey(CifarResNet(20, 7), torch.zeros(1, 3, 16, 16)).sites


def network() -> nn.Module:
    with torch.device("cuda"):
        return CifarResNet(20, 7).eval()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.method} {m.side} {m.loss}")
def test_statistics_stay_on_the_gpu_and_do_not_wait_for_it(
    sites: tuple[Site, ...], gpu: Gpu, method: MethodConfig
) -> None:
    model = network()
    found = statistics.collect(model, sites, gpu.batches, gpu, method, 0)
    assert gpu.waited <= {AFTER}
    solved = bases.solve(model, sites, found, method, 0, gpu)
    assert {basis.encode.device for basis in solved.values()} == {gpu.device}


def test_predictions_stay_on_the_gpu_and_do_not_wait_for_it(gpu: Gpu) -> None:
    found = predict(network(), gpu.batches())
    assert found.logits.device == gpu.device and not gpu.waited
    score(found, 1, gpu)


@pytest.mark.parametrize("more", [{}, {"clip": 1.0, "accumulate": 2, "label_smoothing": 0.1}])
def test_training_does_not_wait_for_the_gpu_between_reports(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    monkeypatch.setattr(trainer, "fingerprint", lambda _: {})
    monkeypatch.setattr(trainer, "lay_out", lambda _model, _layout: None)  # parameters cannot be exchanged here
    model, settings = network(), TuningConfig(epochs=1, batch_size=8, distill="0.9,4", **more)
    loss = distillation_loss(network(), settings.distillation, settings)
    progress = list(Trainer(model, settings, 4, gpu, loss).epoch(gpu.batches(), every=100))
    assert len(progress) == 1 and gpu.waited == {AFTER}


def test_a_wait_and_a_tensor_elsewhere_are_noticed(gpu: Gpu) -> None:
    for batch in gpu.batches():
        if gpu.batch == 2:
            float(batch.images.sum())
    assert gpu.waited == {2}
    with pytest.raises(RuntimeError, match="two different devices"):
        batch.images + torch.ones(3, 16, 16)
