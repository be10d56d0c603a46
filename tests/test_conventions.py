"""What CONTRIBUTING.md says of the code, and what a public repository must not hold."""

import ast
import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest

from tests.documents import ROOT, text

CODE = sorted([*ROOT.glob("dist_prune/**/*.py"), *ROOT.glob("launch/*.py")])
SAID_BY_THEIR_NAMES = {"damaged", "file_fault", "decode_fault"}  # of data/dataset.py; may only become fewer
# Digests of registries' host names: a list of the names would be what it forbids.
REGISTRIES = {"a4aa2ac280bb", "8b5bb5eb9d75", "bd848f96e714", "03e390c8d8a6", "51c6b9f69c48"}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def shown(path: Path, node: ast.AST | None = None) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


# ── modules ────────────────────────────────────────────────────────────────────────────────────────────────


def rooms() -> list[str]:
    """The packages of dist_prune from the lowest up, by the table in CONTRIBUTING.md."""
    return re.findall(r"^\| `(\w+)/` \|", text("CONTRIBUTING.md"), re.MULTILINE)


def modules() -> dict[str, Path]:
    """All modules and packages of the package, as they are imported: `cluster.jobs`."""
    top = ROOT / "dist_prune"
    names = {path: ".".join(path.relative_to(top).with_suffix("").parts) for path in top.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for path, name in names.items() if name != "__init__"}


def module_of(name: str) -> str | None:
    """The module of dist_prune that an imported name is, or is of; None for others' and for the top."""
    inside = name.removeprefix("dist_prune.") if name.startswith("dist_prune.") else ""
    while inside and inside not in modules():
        inside = inside.rpartition(".")[0]
    return inside or None


def imported(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """Full names of all modules and objects imported, wherever in the file."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{shown(path, node)}: write imports in full, not relative"
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def test_the_package_shows_its_rooms() -> None:
    top = ROOT / "dist_prune"
    packages = {path.parent.name for path in top.glob("*/__init__.py")}
    assert sorted(rooms()) == sorted(packages), "CONTRIBUTING.md has one row per package, the lowest first"
    assert len(list(top.glob("*.py"))) <= 6, "a module belongs into a package"
    for path in top.rglob("*/__init__.py"):
        assert (ast.get_docstring(tree(path)) or "").count(".") >= 1, (
            f"{shown(path)}: one sentence, what it is for"
        )


def test_rooms_import_only_rooms_below_them() -> None:
    """The modules at the top are doors: they stand above all rooms but `cli` and `cluster`, which open them."""
    floors = {name: floor for floor, name in enumerate(rooms())}
    doors = floors["cli"] - 0.5
    wrong = [
        f"{shown(path, node)}: {name} imports {other}"
        for name, path in modules().items()
        for full, node in imported(path)
        if (other := module_of(full)) is not None
        if floors.get(name.partition(".")[0], doors) < floors.get(other.partition(".")[0], doors)
    ]
    assert not wrong, "a room imports only rooms below it in CONTRIBUTING.md:\n" + "\n".join(wrong)


def test_no_modules_import_each_other_in_a_circle() -> None:
    below = {
        name: {module_of(full) for full, _ in imported(path)} - {None, name} for name, path in modules().items()
    }
    while leaves := [name for name, others in below.items() if not others & below.keys()]:
        for name in leaves:
            del below[name]
    assert not below, f"these, or what they import, stand in a circle: {', '.join(sorted(below))}"


def test_no_class_name_stands_twice() -> None:
    places: dict[str, list[str]] = {}
    for path in CODE:
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(shown(path, node))
    assert not {name: found for name, found in places.items() if len(found) > 1}


def touches(path: Path, *packages: str) -> list[str]:
    """Where a file imports one of the packages, reaches into one, or imports it by a string."""

    def is_inside(name: str) -> bool:
        return any(name == package or name.startswith(package + ".") for package in packages)

    found = [shown(path, node) for name, node in imported(path) if is_inside(name)]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and is_inside(ast.unparse(node)):
            found.append(shown(path, node))
        if isinstance(node, ast.Call) and any(_is_string(arg) and is_inside(arg.value) for arg in node.args):
            found.append(shown(path, node))
    return found


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@pytest.mark.parametrize(
    ("owners", "packages"),
    [
        (["distributed/world.py"], ("torch.distributed", "torch.nn.parallel")),
        (["data/loader.py", "data/decoder.py"], ("nvidia",)),
    ],
    ids=["torch.distributed", "DALI"],
)
def test_the_collectives_and_dali_have_their_modules(owners: list[str], packages: tuple[str, ...]) -> None:
    homes = [ROOT / "dist_prune" / owner for owner in owners]
    assert all(touches(home, *packages) for home in homes), "this test no longer sees what it looks for"
    found = [place for path in CODE if path not in homes for place in touches(path, *packages)]
    assert not found, f"{packages[0]} belongs into {', '.join(owners)}: {', '.join(found)}"


# ── sizes and docstrings ───────────────────────────────────────────────────────────────────────────────────


def test_files_have_at_most_400_lines() -> None:
    sizes = {path: len(path.read_text().splitlines()) for path in CODE}
    assert not [f"{shown(path)} has {size} lines" for path, size in sizes.items() if size > 400]


def test_functions_are_short() -> None:
    """Their docstrings, which name each argument, do not count."""
    sizes = {
        f"{shown(path, node)} {node.name}": (node.end_lineno or 0) - node.lineno + 1 - lines_of_docstring(node)
        for path in CODE
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not [f"{name}: {size} lines" for name, size in sizes.items() if size > 60]


def lines_of_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return len((ast.get_docstring(node, clean=False) or "").splitlines())


def test_what_is_public_has_a_docstring() -> None:
    missing = [
        f"{shown(path, node)} {node.name}"
        for path in CODE
        for node in tree(path).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and node.name not in SAID_BY_THEIR_NAMES
        and not ast.get_docstring(node)
    ]
    missing += [shown(path) for path in CODE if not ast.get_docstring(tree(path))]
    assert not missing, "\n".join(missing)


# ── what a public repository must not hold ─────────────────────────────────────────────────────────────────


def tracked() -> list[Path]:
    """Files that git has, or would add."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git repository")
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True)
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_registry_addresses_and_no_paths_of_one_machine() -> None:
    folders = "|".join(("work", "root", "tmp", "home"))
    unwanted = re.compile(rf"(?<![\w.)}}*\]])/(?:{folders})\b")
    found = []
    for path in tracked():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            hits = [*registries_in(line), *(hit[0] for hit in unwanted.finditer(line))]
            found += [f"{path.relative_to(ROOT)}:{number}: {hit}" for hit in hits]
    assert not found, "\n".join(found)


def registries_in(line: str) -> list[str]:
    """Host names in a line that are, or hold, a registry's."""
    names = [name.lower().split(".") for name in re.findall(r"[\w-]+(?:\.[\w-]+)+", line)]
    parts = [".".join(labels[i:j]) for labels in names for i, j in combinations(range(len(labels) + 1), 2)]
    return [part for part in parts if digest(part) in REGISTRIES]


def digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:12]


def test_a_registrys_hosts_are_known_by_their_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "REGISTRIES", {digest("example.org")})
    for line in ("https://example.org/simple", "at files.Example.org:443", "(example.org)"):
        assert registries_in(line) == ["example.org"]
    assert registries_in("an example.organ of org.example") == []
