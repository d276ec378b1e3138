"""The Chinese pages have the commands and numbers of the English ones, the README is short, and the site builds offline."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGES = [("README.md", "README.zh-CN.md"), ("docs/tutorial.md", "docs/quickstart.zh-CN.md")]
NUMBER = re.compile(r"\d+(?:[.,/]\d+)*")
BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize(("english", "chinese"), PAGES)
def test_commands_are_the_same(root: Path, english: str, chinese: str) -> None:
    ours, theirs = ((root / name).read_text(encoding="utf-8") for name in (english, chinese))
    assert BLOCK.findall(theirs) == BLOCK.findall(ours)
    assert BLOCK.findall(ours)


@pytest.mark.parametrize(("english", "chinese"), PAGES)
def test_the_translation_has_every_number_and_no_other(root: Path, english: str, chinese: str) -> None:
    ours, theirs = (set(NUMBER.findall((root / name).read_text(encoding="utf-8"))) for name in (english, chinese))
    assert theirs == ours
    assert len(ours) > 5


def test_the_readme_is_read_in_minutes(root: Path) -> None:
    assert len((root / "README.md").read_text(encoding="utf-8").split()) <= 1000


def test_the_site_builds_without_a_warning_and_without_a_network_address(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    page = (tmp_path / "comparison" / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r'<(?:script|link)[^>]+(?:src|href)="https?://[^"]+\.(?:js|css|woff2?)"', page)
    assert "crossed_difference" in (tmp_path / "library" / "index.html").read_text(encoding="utf-8")
