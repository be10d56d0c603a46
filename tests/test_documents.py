"""What the READMEs say, held against the code: links, names, flags, commands."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_prune.cli.main import save_recipe
from dist_prune.cli.pack import parse as packing
from dist_prune.cluster.report_command import main as report
from dist_prune.cluster.submission import main as submit
from dist_prune.config.recipes import parse
from dist_prune.export.command import parse as take_away
from dist_prune.export.speed_command import parse as speed
from tests.documents import DOCUMENTS, READMES, ROOT, commands, commands_with, text

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
