"""DVC itself reads, compares and writes params.yaml after every block of the docs; a time limit makes no stage stale."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from dvc.cli import main as dvc
from dvc.repo import Repo
from ruamel.yaml import YAML

from pipelines.commands.configure import configure
from pipelines.config.params import Params
from pipelines.config.yaml_files import read_yaml
from tests.test_blocks import BLOCKS, ROOT

IGNORED = ("models", "data/tables", "data/valid", "data/quarantine", "runs", "report")
COPIES = [word for path in ("data/tables", "data/valid", "models", "runs") for word in ("--copy-paths", path)]
"""`dvc exp run --dry` works in a copy without outputs, and stops at the first stage that needs one."""


def overlays() -> list[str]:
    """Return the different blocks that change params.yaml; the one with an import path first."""
    found = dict.fromkeys(block for _, block in BLOCKS)
    kept = [block for block in found if _sections(block) and _sections(block) <= set(Params.model_fields)]
    return sorted(kept, key=lambda block: "my_package.rewards:brevity" not in block)


def _sections(block: str) -> set[str]:
    tree = YAML(typ="safe").load(block)
    return set(tree) if isinstance(tree, dict) else set()


def make_files(root: Path) -> list[Path]:
    """Write a dummy for each missing dependency and output of the stages, as if the stages before had run; return the dummies."""
    made = []
    with Repo(str(root)) as repo:
        paths = {each.def_path for stage in repo.index.stages for each in (*stage.deps, *stage.outs)}
    for name in sorted(paths - {"params.yaml"}):
        path = root / name if Path(name).suffix else root / name / "file"
        if not (root / name).exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
            made.append(path)
    return made


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace with the real dvc.yaml, one algorithm, and dummy files; DVC finds every stage up to date."""
    root = tmp_path_factory.mktemp("graph")
    shutil.copy(ROOT / "dvc.yaml", root)
    tree = YAML().load(ROOT / "params.yaml")
    tree["project"]["algorithms"] = ["grpo"]
    YAML().dump(tree, root / "params.yaml")
    (root / ".gitignore").write_text("".join(f"/{path}/\n" for path in IGNORED))
    for command in (["init", "-q"], ["config", "user.name", "test"], ["config", "user.email", "test@localhost"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert dvc(["init", "-q"]) == 0
        make_files(root)
        assert dvc(["commit", "-f", "-q"]) == 0
        for command in (["add", "-A"], ["commit", "-qm", "start"]):
            subprocess.run(["git", *command], cwd=root, check=True)
    return root


@pytest.fixture
def project(graph: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the workspace with its first params.yaml."""
    subprocess.run(["git", "checkout", "-q", "--", "params.yaml"], cwd=graph, check=True)
    monkeypatch.chdir(graph)
    return graph


def stale() -> set[str]:
    """Return the stages that `dvc status` lists."""
    with Repo() as repo:
        return set(repo.status())


def check(block: str, project: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(block)
    assert configure(project / "params.yaml", [str(overlay)]) != []
    assert dvc(["status", "--quiet"]) in (0, 1), "1: something is stale"
    made = make_files(project)  # of algorithms that the block adds
    try:
        assert dvc(["exp", "run", "--dry", "--quiet", *COPIES, "-S", "sft.epochs=3"]) == 0
    finally:
        for path in made:
            path.unlink()


def test_time_limits_and_tracking_make_no_stage_stale(project: Path) -> None:
    assert stale() == set()
    configure(project / "params.yaml", ["limits.reward_seconds.answer=5", "tracking.served=0.5", "tracking.traces=2"])
    assert read_yaml(project / "params.yaml")["limits"] == {"reward_seconds": {"answer": 5}}
    assert stale() == set()
    configure(project / "params.yaml", ["rewards.answer.on_failure=skip"])
    assert {"validate", "align@grpo-0", "evaluate_aligned@grpo-0", "compare"} <= stale()


def test_a_block_with_an_import_path_is_read_and_written_by_dvc(project: Path, tmp_path: Path) -> None:
    check(overlays()[0], project, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("block", overlays()[1:], ids=range(1, len(overlays())))
def test_every_other_block_is_read_and_written_by_dvc(block: str, project: Path, tmp_path: Path) -> None:
    check(block, project, tmp_path)
