"""What differs between clusters, from one TOML file.

`python -m dist_prune.cluster.profile FILE` prints its flags for sbatch, with `--shell` its lines of shell for a
job script.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_prune.config.flags import ConfigError
from dist_prune.utils.console import adapt_output
from dist_prune.utils.text import read_text


@dataclass(frozen=True)
class ClusterProfile:
    """The profile of one cluster; see `slurm/site.example.toml`."""

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

    def flags(self) -> list[str]:
        """As words of sbatch's command line."""
        given = {**self.parameters(), **self.sbatch}
        return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]

    def shell(self) -> str:
        """Lines that set a job up; its array `interpreter` becomes `python`, unless the user chose one."""
        chosen = [f"[[ -n ${{PYTHON:-}}${{CONTAINER:-}} ]] || interpreter=({self.python})"] if self.python else []
        return "\n".join([*self.setup, *chosen])


def read_site(path: Path | None) -> ClusterProfile:
    """The profile in a file; without a file one that asks for nothing special.

    Raises:
        ConfigError: absent, no TOML, or a key or type that is not known.
    """
    if path is None:
        return ClusterProfile()
    try:
        content = tomllib.loads(read_text(path))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--site {path}: cannot be read ({error}); slurm/site.example.toml is one") from error
    known = {f.name: f for f in dataclasses.fields(ClusterProfile)}
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
    return ClusterProfile(**found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what a script needs of a file; the exit code, 2 where it cannot be used."""
    adapt_output(os.environ)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="see slurm/site.example.toml")
    parser.add_argument("--shell", action="store_true", help="lines of shell in place of flags")
    asked = parser.parse_args(arguments)
    try:
        site = read_site(asked.file)
        print(site.shell() if asked.shell else " ".join(_unquoted(flag) for flag in site.flags()))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _unquoted(flag: str) -> str:
    if len(flag.split()) != 1:
        raise ConfigError(f"{flag!r} has a space, which a shell would split it at: give it to sbatch by hand")
    return flag


if __name__ == "__main__":
    sys.exit(main())
