"""Groups of channels of a network that go together, and which of them stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

QUERIES, VALUES = "queries and keys", "values"  # parts of attention


@dataclass(frozen=True)
class Consumer:
    """What takes the channels; each has `repeat` consecutive inputs, more than one after a flattening.

    Dimensions of an attention's heads come `times`, once in each: all of the first head, then all of the next.
    """

    name: str
    repeat: int = 1
    times: int = 1

    def channels(self, width: int, chosen: Iterable[int]) -> Tensor:
        """Where some channels of a group of that width lie, in units of `repeat` inputs; ascending."""
        return entries(width, chosen, self.times)

    def inputs(self, width: int, chosen: Iterable[int]) -> Tensor:
        """Which inputs these are, ascending."""
        places = self.channels(width, chosen)[:, None] * self.repeat
        return (places + torch.arange(self.repeat)).flatten()


@dataclass(frozen=True)
class Group:
    """Channels that can be removed together; all names are of modules, in execution order.

    Those of an attention are the dimensions of its heads: `part` says of what, `times` how often each comes in the
    producer's outputs, from `start` on. Queries and keys are taken up by what mixes the tokens, a consumer that
    has no weights.
    """

    width: int
    producers: tuple[str, ...]
    between: tuple[str, ...]
    consumers: tuple[Consumer, ...]
    part: str = ""
    start: int = 0
    times: int = 1

    @property
    def name(self) -> str:
        """Of its first producer."""
        return f"{self.producers[0]} ({self.part})" if self.part else self.producers[0]

    @property
    def heads(self) -> int:
        """Of the attention whose dimensions these are; queries and keys come once for each."""
        return self.times // 2 if self.part == QUERIES else self.times

    @property
    def solved(self) -> tuple[Consumer, ...]:
        """The consumers that have weights, which can make up for what they lose."""
        return () if self.part == QUERIES else self.consumers

    def outputs(self, chosen: Iterable[int]) -> Tensor:
        """Which outputs of a producer some of the channels are, ascending."""
        return self.start + entries(self.width, chosen, self.times)

    @property
    def members(self) -> tuple[str, ...]:
        """All modules that change with the channels."""
        return (*self.producers, *self.between, *(consumer.name for consumer in self.consumers))


@dataclass(frozen=True)
class KeptChannels:
    """The channels of a group that stay, ascending, and what is predicted to be lost with the others, if known."""

    group: Group
    channels: tuple[int, ...]
    loss: float | None = field(default=None, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Plain types, for plan.json."""
        return {**asdict(self.group), "kept": list(self.channels), "loss": self.loss}

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> KeptChannels:
        """What `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: something else.
        """
        consumers = tuple(
            Consumer(str(c["name"]), int(c["repeat"]), int(c.get("times", 1))) for c in row["consumers"]
        )
        producers, between = (tuple(map(str, row[key])) for key in ("producers", "between"))
        where = str(row.get("part", "")), int(row.get("start", 0)), int(row.get("times", 1))
        group, loss = Group(int(row["width"]), producers, between, consumers, *where), row.get("loss")
        return KeptChannels(group, tuple(map(int, row["kept"])), None if loss is None else float(loss))


def entries(width: int, chosen: Iterable[int], times: int) -> Tensor:
    """Of `times` blocks of that width, the chosen places in each."""
    return (torch.arange(times)[:, None] * width + torch.tensor(tuple(chosen), dtype=torch.long)).flatten()
