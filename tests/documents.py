"""The project's documents, and the commands in them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
READMES = sorted(
    str(path)
    for path in (found.relative_to(ROOT) for found in ROOT.rglob("README.md"))
    if path.parts[0] in ("README.md", "dist_prune", "launch", "slurm", "tests")
)
DOCUMENTS = (*READMES, "CONTRIBUTING.md", "CHANGELOG.md")


def text(name: str) -> str:
    return (ROOT / name).read_text()


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)


def commands(document: str) -> list[str]:
    """The command lines of all bash blocks, continued lines joined."""
    lines = "".join(blocks(document, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip()]


def commands_with(words: str) -> list[str]:
    """The command lines of all READMEs, in order, that hold these words."""
    return [command for name in READMES for command in commands(text(name)) if words in command]
