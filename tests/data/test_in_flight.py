"""What a GPU may still read stays, and nothing is waited for, as far as that shows without one."""

import gc
import weakref
from typing import ClassVar

import pytest
import torch

from dist_prune.config.images import ImageSpec
from dist_prune.data.in_flight import MOST, InFlight, aboard
from dist_prune.data.loader import normalise


class Event:
    """Of a GPU that gets there when the test says so."""

    made: ClassVar[list["Event"]] = []

    def __init__(self) -> None:
        self.done = self.waited = False
        self.made.append(self)

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.waited, self.done = not self.done, True


class OnGpu(torch.Tensor):
    """Looks as if it lay on a GPU."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


def batch() -> torch.Tensor:
    return torch.zeros(2).as_subclass(OnGpu)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    Event.made = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return Event.made


def test_a_batch_stays_until_the_gpu_has_read_it(events: list[Event]) -> None:
    kept, seen = InFlight(), []
    for _ in range(2):
        tensor = batch()
        seen.append(weakref.ref(tensor))
        kept.keep([tensor])
    del tensor
    gc.collect()
    assert all(each() is not None for each in seen), "the first may still be read, the second is the newest"
    events[0].done = True
    kept.keep([batch()])
    gc.collect()
    assert seen[0]() is None and seen[1]() is not None
    assert not any(event.waited for event in events)


def test_no_more_than_a_few_are_kept(events: list[Event]) -> None:
    kept = InFlight()
    for _ in range(MOST + 3):
        kept.keep([batch()])
    assert [event.waited for event in events] == [True, True, *[False] * MOST]


def test_on_a_cpu_nothing_is_kept(events: list[Event]) -> None:
    kept, tensor = InFlight(), torch.zeros(2)
    seen = weakref.ref(tensor)
    kept.keep([tensor])
    del tensor
    gc.collect()
    assert seen() is None and not events


def test_labels_go_by_pinned_memory_and_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    labels = torch.arange(3)
    assert aboard(labels, torch.device("cpu")) is labels
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: (calls.append("pinned"), tensor)[1])
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *args, **how: calls.append((*args, how)))
    aboard(labels, torch.device("cuda", 1))
    assert calls == ["pinned", (torch.device("cuda", 1), {"non_blocking": True})]


def test_the_constants_of_normalising_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, pixels = ImageSpec(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.7)), torch.ones(1, 3, 2, 2, dtype=torch.uint8)
    first = normalise(pixels, spec)
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("made again"))
    assert torch.equal(normalise(pixels, spec), first)
