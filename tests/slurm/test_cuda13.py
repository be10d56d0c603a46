"""The versions for CUDA 13 replace those of pyproject.toml that are for CUDA 12, and no others."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def requirements(lines: list[str]) -> dict[str, Requirement]:
    return {each.name: each for each in map(Requirement, lines)}


def test_the_two_packages_of_dali_are_never_installed_together() -> None:
    """Both provide nvidia.dali; each goes with a torch that is built for its CUDA."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    usual = requirements(project["dependencies"])
    text = (ROOT / "slurm" / "cuda13.txt").read_text()
    other = requirements([line for each in text.splitlines() if (line := each.partition("#")[0].strip())])
    assert {*other} == {"torch", "torchvision", "nvidia-dali-cuda120"} <= {*usual}
    marker = other["nvidia-dali-cuda120"].marker
    assert marker is not None
    assert not any(marker.evaluate({"python_version": version}) for version in ("3.11", "3.12", "3.13"))
    for name, first, last in (("torch", "2.10.0", "2.11.0"), ("torchvision", "0.25.0", "0.26.0")):
        assert first in usual[name].specifier and last not in usual[name].specifier
        assert last in other[name].specifier and first not in other[name].specifier


def test_the_command_beside_it_takes_dali_in_the_version_that_is_tried() -> None:
    text = (ROOT / "slurm" / "README.md").read_text()
    usual = requirements(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    named = next(word for word in text.split('"') if word.startswith("nvidia-dali-cuda130"))
    assert Requirement(named).specifier == usual["nvidia-dali-cuda120"].specifier
