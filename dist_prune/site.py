"""What differs between clusters, from one TOML file; and what a job asks for."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_prune.flags import ConfigError


@dataclass(frozen=True)
class Site:
    """One cluster's ways; see `slurm/site.example.toml`."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    python: str = ""  # words that start the interpreter on a node; by default the one that submits
    setup: tuple[str, ...] = ()  # lines of shell before a job's work
    sbatch: dict[str, Any] = field(default_factory=dict)  # any other #SBATCH: name without dashes → value, or true

    def parameters(self) -> dict[str, Any]:
        """As submitit's SLURM executor takes them."""
        named = {name: getattr(self, name) for name in ("partition", "account", "qos", "constraint")}
        return {name: value for name, value in named.items() if value}


def read_site(path: Path | None) -> Site:
    """The site a file describes; without a file one that asks for nothing special.

    Raises:
        ConfigError: absent, no TOML, or a key or type that is not known.
    """
    if path is None:
        return Site()
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--site {path}: cannot be read ({error}); slurm/site.example.toml is one") from error
    known = {f.name: f for f in dataclasses.fields(Site)}
    for key, value in content.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = (
                f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}; others go below [sbatch]"
            )
            raise ConfigError(f"--site {path}: {key!r} is not known; {hint}")
        expected = {"setup": list, "sbatch": dict}.get(key, str)
        if not isinstance(value, expected):
            raise ConfigError(f"--site {path}: {key} is {value!r}, expected a {expected.__name__}")
    found: dict[str, Any] = {key: tuple(value) if key == "setup" else value for key, value in content.items()}
    return Site(**found)
