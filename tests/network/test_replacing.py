"""A copy of a network: what it computes is copied, what Python cannot copy is shared."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dist_prune.network.replacing import CopyError, with_replaced


def numbers() -> Iterator[int]:
    yield 1


class Holding(nn.Module):
    """Keeps something, in the open or deep inside, and what its first layer gave."""

    def __init__(self, held: object) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)
        self.held, self.deep = held, {"list": [held]}

    def forward(self, x: Tensor) -> Tensor:
        self.hint = self.first(x)
        return self.second(self.hint)


@pytest.mark.parametrize("kind", ["lock", "file", "generator", "function"])
def test_what_cannot_be_copied_is_shared_and_weights_are_not(kind: str, tmp_path: Path) -> None:
    makers = {"lock": threading.Lock, "generator": numbers}
    makers |= {"file": (tmp_path / "log").open, "function": lambda: print}
    (tmp_path / "log").touch()
    model = Holding(makers[kind]())
    copy = with_replaced(model)
    assert copy.held is model.held is copy.deep["list"][0] and copy.deep is not model.deep
    assert not {*map(id, model.parameters())} & {*map(id, copy.parameters())}
    x = torch.randn(3, 4)
    torch.testing.assert_close(copy(x), model(x))


def test_an_activation_left_by_a_pass_stays_behind_without_its_graph() -> None:
    model = Holding(None)
    model(torch.randn(3, 4))
    model.deep["list"].append(model.hint * 2)
    copy = with_replaced(model)
    assert copy.hint.grad_fn is None and model.hint.grad_fn is not None
    assert copy.deep["list"][1].grad_fn is None


def test_replaced_modules_stand_wherever_the_old_ones_were_referred_to() -> None:
    model, new = Holding(None), nn.Linear(4, 4)
    model.deep["layers"] = [model.first]
    copy = with_replaced(model, [("first", new)])
    assert copy.first is copy.deep["layers"][0] is new and model.first is not new


class Uncopied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def __deepcopy__(self, memo: object) -> "Uncopied":
        raise TypeError("only one of me")


def test_a_module_that_cannot_be_copied_is_named() -> None:
    with pytest.raises(CopyError, match=r"Sequential\.1: cannot be copied \(only one of me\)"):
        with_replaced(nn.Sequential(nn.ReLU(), Uncopied()))
