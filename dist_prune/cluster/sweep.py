"""Many runs from one command: every combination of the values given, and which statistics they share."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_prune.config.compression import DATA_FREE
from dist_prune.config.flags import ConfigError, did_you_mean
from dist_prune.config.recipes import parse
from dist_prune.config.run import Run, require_complete, to_dict
from dist_prune.config.settings import settings
from dist_prune.data.views import views_of_statistics
from dist_prune.statistics.collect import origin
from dist_prune.utils.files import is_intact

NOT_SWEPT = {"run-dir", "resume", "overwrite", "dry-run", "statistics", "until", "recipe", "save-recipe"}
STATISTICS = "statistics.safetensors"


@dataclass(frozen=True)
class Combination:
    """One run of a sweep: the values that make it, its command line, and what it shares with others."""

    values: dict[str, str]
    words: tuple[str, ...]
    statistics: str  # the same for runs that can share them; empty if none are needed
    data: str  # where its images are

    @property
    def name(self) -> str:
        """The values as a folder's name."""
        text = "_".join(f"{key}={value}" for key, value in self.values.items()) or "run"
        return re.sub(r"[^\w.=+-]+", "-", text)


@dataclass(frozen=True)
class Task:
    """One command line of a sweep and the directory it writes; done once `product` is there."""

    name: str
    words: tuple[str, ...]
    folder: Path
    product: str = "result.json"

    @property
    def is_done(self) -> bool:
        """Whether what it is for is on disk."""
        path = self.folder / self.product
        return path.is_file() and (path.suffix == ".json" or is_intact(path))


@dataclass(frozen=True)
class Sweep:
    """All combinations of a recipe, the words that all share, and the values of each axis, in `folder`."""

    folder: Path
    recipe: str
    combinations: tuple[Combination, ...]

    @property
    def data(self) -> list[Path]:
        """Folders that every node must have."""
        folders = dict.fromkeys(c.data for c in self.combinations if c.data != "digits")
        return [Path(folder).absolute() / part for folder in folders for part in ("train", "val")]

    def runs(self) -> list[Task]:
        """One task for each combination."""
        return [self._run(c) for c in self.combinations]

    def passes(self) -> list[Task]:
        """One task for each set of statistics, which the first of the runs that share it describes."""
        first: dict[str, Combination] = {}
        for c in self.combinations:
            if c.statistics:
                first.setdefault(c.statistics, c)
        return [
            Task(
                f"statistics {key}",
                (self.recipe, *c.words, "--until", "statistics"),
                self._shared(key),
                STATISTICS,
            )
            for key, c in first.items()
        ]

    def _run(self, c: Combination) -> Task:
        shared = ("--statistics", str(self._shared(c.statistics) / STATISTICS)) if c.statistics else ()
        return Task(c.name, (self.recipe, *c.words, *shared), self.folder / c.name)

    def _shared(self, key: str) -> Path:
        return self.folder / "statistics" / key


def plan_sweep(recipe: str, words: Sequence[str], axes: Sequence[str], folder: Path | None) -> Sweep:
    """Read `key=value,value` axes and try every combination's command line.

    Args:
        recipe: of every run.
        words: flags of every run.
        axes: each a flag without its dashes, and its values.
        folder: where the sweep goes; by default a name under sweeps/ that the same command gives again.

    Raises:
        ConfigError: an unknown key (close ones are offered), a key or a combination given twice, or a combination
            that no run accepts.
    """
    values = dict(_axis(text) for text in axes)
    if len(values) < len(axes):
        raise ConfigError(f"--sweep {' '.join(axes)}: a key is given twice; write key=value,value once")
    found = [
        _combination(recipe, words, dict(zip(values, v, strict=True))) for v in itertools.product(*values.values())
    ]
    if clash := _first_twice([c.name for c in found]):
        raise ConfigError(f"--sweep {' '.join(axes)}: the same combination twice, {clash}")
    sign = hashlib.sha256(json.dumps([recipe, list(words), list(axes)]).encode()).hexdigest()[:8]
    where = folder or Path("sweeps") / f"{Path(recipe).stem}-{sign}"
    return Sweep(where.absolute(), recipe, tuple(found))


def _axis(text: str) -> tuple[str, list[str]]:
    key, equals, values = text.partition("=")
    key = key.removeprefix("--").replace("_", "-")
    known = sorted(settings().keys() - NOT_SWEPT)
    if key not in known:
        hint = did_you_mean(key, known, "keys are the flags of a run without their dashes")
        raise ConfigError(f"--sweep {text}: there is no {key!r} to sweep over; {hint}")
    if not equals or not all(values.split(",")):
        raise ConfigError(f"--sweep {text}: expected values, such as seed=0,1,2")
    return key, values.split(",")


def _combination(recipe: str, words: Sequence[str], values: dict[str, str]) -> Combination:
    given = [*words, *(word for key, value in values.items() for word in (f"--{key}", value))]
    try:
        run = parse([recipe, *given])
        require_complete(run)
        if run.compression.family:
            raise ConfigError(f"--ranks {run.compression.ranks}: a sweep takes one budget a run; sweep over ranks")
    except (ConfigError, SystemExit) as error:
        if isinstance(error, SystemExit) and not error.code:  # --help
            raise
        text = error if isinstance(error, ConfigError) else "its flags are not accepted, see above"
        raise ConfigError(f"combination {values or 'of no axes'}: {text}") from error
    return Combination(values, tuple(given), statistics_key(run), run.images.data)


def statistics_key(run: Run) -> str:
    """The same for two runs that can share statistics; empty for a run that needs none, or is given some."""
    method, network = run.compression.basis, run.network
    if method.method in DATA_FREE or method.statistics is not None:
        return ""
    trained = network.weights == "none"
    seeded = trained or method.statistics_images > 0
    image, views = to_dict(run.images.image), views_of_statistics(run).described
    content = {
        "of": origin(method, "", "", image, run.seed, method.statistics_bf16, views),
        "float32": method.statistics_float32,
        "network": to_dict(network),
        "trained": to_dict(run.pretrain) if trained else None,
        "data": [*map(str, (run.images.data, run.images.class_list, run.unlabelled_statistics))],
        "images": method.statistics_images,
        "sites": run.compression.sites,
        "seed": run.seed if seeded else None,
    }
    return f"{method.method}-{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]}"


def _first_twice(names: Sequence[str]) -> str:
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), "")  # type: ignore[func-returns-value]
