"""Every YAML block of the README and the docs loads: through `configure`, by DVC's reader, and after DVC has written it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from pipelines.commands.configure import configure
from pipelines.config.dvc_yaml import survives
from pipelines.config.params import Params
from pipelines.config.yaml_files import read_yaml

BLOCK = re.compile(r"```yaml\n(.*?)```", re.DOTALL)
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    (page.relative_to(ROOT).as_posix(), block) for page in PAGES for block in BLOCK.findall(page.read_text("utf-8"))
]


@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=[f"{page}-{i}" for i, (page, _) in enumerate(BLOCKS)])
def test_a_block_of_parameters_can_be_configured_and_survives_dvc(page: str, block: str, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(block, encoding="utf-8")
    tree = read_yaml(overlay)
    assert survives(block), f"{page}: DVC cannot read this block; write one key a line"
    if not isinstance(tree, dict) or not set(tree) <= set(Params.model_fields):
        return  # not an overlay of params.yaml, e.g. a study or a part of dvc.yaml
    params = Path(shutil.copy(ROOT / "params.yaml", tmp_path))
    assert configure(params, [str(overlay)]) != []
    assert survives(params.read_text(encoding="utf-8"))


def test_the_docs_show_blocks() -> None:
    assert BLOCKS
