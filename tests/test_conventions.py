"""What CONTRIBUTING.md and every README.md say, held against the code."""

import ast
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest

from dist_prune.cli.main import save_recipe
from dist_prune.cli.pack import parse as packing
from dist_prune.cluster.report_command import main as report
from dist_prune.cluster.submission import main as submit
from dist_prune.config.recipes import parse
from dist_prune.export.command import parse as take_away
from dist_prune.export.speed_command import parse as speed

ROOT = Path(__file__).parents[1]
CODE = sorted([*ROOT.glob("dist_prune/**/*.py"), *ROOT.glob("launch/*.py")])
READMES = sorted(
    str(path)
    for path in (found.relative_to(ROOT) for found in ROOT.rglob("README.md"))
    if path.parts[0] in ("README.md", "dist_prune", "launch", "slurm", "tests")
)
DOCUMENTS = (*READMES, "CONTRIBUTING.md", "CHANGELOG.md")
NOT_OURS = {
    "--override",
    "--no-sync",
    "--help-all",  # shown instead of being listed
    "--no-python",
    "--standalone",
    "--nproc-per-node",
    "--max-restarts",
    "--master-addr",
    # --images of tests.bench.startup is export's, too
    "--rdzv-backend",
    "--rdzv-endpoint",
    "--signals-to-handle",
    "--logdir",
}  # flags of torchrun and tensorboard
SBATCH = {"--nodes", "--gpus-per-node", "--ntasks-per-node", "--gpus-per-task", "--gpu-bind"}
CONTAINERS = {"--nv"}
SAID_BY_THEIR_NAMES = {"damaged", "file_fault", "decode_fault"}  # of data/dataset.py; may only become fewer
# Digests of registries' host names: a list of the names would be what it forbids.
REGISTRIES = {"a4aa2ac280bb", "8b5bb5eb9d75", "bd848f96e714", "03e390c8d8a6", "51c6b9f69c48"}
STAGES = ("dense", "projected", "corrected", "distilled", "tuned")
KEYS = {*STAGES, "macs", "params", "seconds", "world_size", "seed", "method", "ranks", "parameter_hash"}
KEYS |= {"warnings"}


def text(name: str) -> str:
    return (ROOT / name).read_text()


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
    ("owner", "packages"),
    [("distributed/world.py", ("torch.distributed", "torch.nn.parallel")), ("data/loader.py", ("nvidia",))],
    ids=["torch.distributed", "DALI"],
)
def test_one_module_each_owns_the_collectives_and_dali(owner: str, packages: tuple[str, ...]) -> None:
    home = ROOT / "dist_prune" / owner
    assert touches(home, *packages), "this test no longer sees what it looks for"
    found = [place for path in CODE if path != home for place in touches(path, *packages)]
    assert not found, f"{packages[0]} belongs into {owner}: {', '.join(found)}"


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


# ── documents ──────────────────────────────────────────────────────────────────────────────────────────────


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)


def commands(document: str) -> list[str]:
    """The command lines of all bash blocks, continued lines joined."""
    lines = "".join(blocks(document, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip()]


def commands_with(words: str) -> list[str]:
    """The command lines of all READMEs, in order, that hold these words."""
    return [command for name in READMES for command in commands(text(name)) if words in command]


def targets(document: str) -> list[str]:
    """What a document links to or shows, without addresses of the web."""
    found = [*re.findall(r"\]\(([^)]+)\)", document), *re.findall(r'\b(?:src|srcset|href)="([^"]+)"', document)]
    return [target for target in found if "://" not in target]


def anchors(document: str) -> set[str]:
    """How GitHub names a document's headings."""
    prose = re.sub(r"^```.*?^```$", "", document, flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_relative_links_resolve(name: str) -> None:
    home = (ROOT / name).parent
    for target in targets(text(name)):
        file, _, anchor = target.partition("#")
        path = home / file if file else ROOT / name
        assert path.exists(), f"{name}: {target}"
        if anchor:
            assert anchor in anchors(path.read_text()), f"{name}: {target}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_and_modules_that_are_named_exist(name: str) -> None:
    named = re.findall(r"`((?:\.ci|tests|launch|dist_prune|slurm)/[\w/.]+)", text(name))
    modules = [*re.findall(r"python -m ([\w.]+)", text(name)), *re.findall(r"`(tests(?:\.\w+)+)`", text(name))]
    named += [m.replace(".", "/") + ".py" for m in modules if m.startswith(("tests.", "dist_prune."))]
    assert not [path for path in named if not (ROOT / path).exists()]


def test_every_folder_has_its_readme_and_the_first_can_be_finished() -> None:
    """What is about a folder stands in it; README.md links to all of them."""
    homes = {"launch", "slurm", "tests/bench", "dist_prune", "dist_prune/export", "dist_prune/reporting"}
    assert {f"{home}/README.md" for home in homes} <= set(READMES)
    assert set(READMES) - {"README.md"} <= set(targets(text("README.md")))
    assert len(text("README.md").splitlines()) <= 200


def test_every_flag_in_the_readmes_exists(capsys: pytest.CaptureFixture[str]) -> None:
    shows = ((parse, "--help-all"), *((show, "--help") for show in (submit, take_away, speed, report, packing)))
    for show_help, word in shows:
        with pytest.raises(SystemExit):
            show_help([word])
    known = set(re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out)) | NOT_OURS | SBATCH | CONTAINERS
    prose = "\n".join(map(text, READMES))
    named = {flag.rstrip(".") for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*", prose)}
    assert "--ranks" in known and len(named) > 15, "this test no longer sees what it looks for"
    assert sorted(named - known) == []


def test_every_run_in_the_readmes_can_be_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(commands_with("launch/local.py")) > 5
    for command in commands_with("launch/local.py"):
        words = shlex.split(command.partition("launch/local.py")[2])
        for plan in (Path(word) for word in words if word.endswith(".json")):
            plan.parent.mkdir(parents=True, exist_ok=True)
            plan.touch()  # --ranks FILE must be there
        parse(words)


def test_every_command_in_the_readmes_with_a_runs_flags_can_be_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order: a later one may take the recipe that an earlier one saves."""
    monkeypatch.chdir(tmp_path)
    found = re.findall(r"dist-prune (run|plan|check) (.*)", "\n".join(commands_with("dist-prune ")))
    assert {name for name, _ in found} == {"run", "plan", "check"}
    for _, words in found:
        run = parse(shlex.split(words))
        if run.save_recipe:
            save_recipe(run.save_recipe, run)


@pytest.mark.parametrize(("name", "read"), [("export", take_away), ("speed", speed)])
def test_commands_on_runs_in_the_readmes_can_be_parsed(name: str, read: Callable[[list[str]], object]) -> None:
    found = commands_with(f"dist-prune {name}")
    assert found
    for command in found:
        read(shlex.split(command.partition(f"dist-prune {name}")[2]))


def test_every_job_in_the_readmes_can_be_parsed() -> None:
    jobs = [command for command in commands_with("sbatch ") if command.startswith("sbatch")]
    assert jobs
    for command in jobs:
        script = next(word for word in shlex.split(command) if word.endswith(".sh"))
        assert (ROOT / script).is_file()
        if " -- " in command:
            parse(["resnet18-imagenet", "--data", "DIR", *shlex.split(command.partition(" -- ")[2])])


def test_every_sweep_in_the_readmes_can_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    sweeps = commands_with("launch/submit.py")
    assert sweeps
    monkeypatch.setenv("PATH", "")
    for command in sweeps:
        assert submit([*shlex.split(command.partition("launch/submit.py")[2]), "--dry-run"]) == 0


def test_the_readme_begins_with_the_two_commands() -> None:
    first = "pip install uv && uv run torchrun --standalone --nproc-per-node 2 launch/local.py"
    assert commands(text("README.md"))[:2] == [first, "uv run pytest"]


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


# ── the first command, as a stranger would run it ──────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_first_command_works_in_a_fresh_clone(tmp_path: Path) -> None:
    """What is committed, with uv installed by the command itself, its own environment and no cached weights."""
    clone, outside = tmp_path / "clone", tmp_path / "outside"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    subprocess.run([sys.executable, "-m", "venv", str(outside)], check=True)
    hidden = (
        "VIRTUAL_ENV",
        "PYTHONPATH",
        "PYTHONHOME",
        "UV_PROJECT_ENVIRONMENT",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
    )
    environ = {name: value for name, value in os.environ.items() if name not in hidden}
    environ |= {"PATH": f"{outside / 'bin'}:{environ['PATH']}", "DIST_PRUNE_CACHE": str(tmp_path / "cache")}
    session = SimpleNamespace(cwd=clone, env=environ)
    readme = (clone / "README.md").read_text()

    said = succeed(session, "bash", "-c", commands(readme)[0])
    (folder,) = clone.glob("runs/digits-*")
    check_result(folder)
    assert f"written to {folder.relative_to(clone)}" in said

    (example,) = (block for block in blocks(readme, "python") if '"runs/first"' in block)
    succeed(session, "uv", "run", "python", "-c", example.replace('"runs/first"', repr(str(folder))))


def succeed(session: SimpleNamespace, *words: str) -> str:
    done = subprocess.run(words, cwd=session.cwd, env=session.env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def check_result(folder: Path) -> None:
    result = json.loads((folder / "result.json").read_text())
    assert set(result) == KEYS
    assert (result["world_size"], result["seed"], result["method"]) == (2, 0, "pca")
    for stage in ("dense", "projected", "tuned"):
        assert result[stage]["images"] == 355
        assert result[stage]["top1"] > 90
    assert result["macs"]["compressed"] < 0.6 * result["macs"]["dense"]
    assert result["params"]["compressed"] < 0.6 * result["params"]["dense"]
