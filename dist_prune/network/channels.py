"""Groups of channels of a network that go together, and which of them stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Consumer:
    """A layer that takes the channels; each has `repeat` consecutive inputs, more than one after a flattening."""

    name: str
    repeat: int = 1


@dataclass(frozen=True)
class Group:
    """Channels that can be removed together; all names are of modules, in execution order."""

    width: int
    producers: tuple[str, ...]
    between: tuple[str, ...]
    consumers: tuple[Consumer, ...]

    @property
    def name(self) -> str:
        """Of its first producer."""
        return self.producers[0]

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
        consumers = tuple(Consumer(str(c["name"]), int(c["repeat"])) for c in row["consumers"])
        producers, between = (tuple(map(str, row[key])) for key in ("producers", "between"))
        group, loss = Group(int(row["width"]), producers, between, consumers), row.get("loss")
        return KeptChannels(group, tuple(map(int, row["kept"])), None if loss is None else float(loss))
