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
CHINESE = r"[\u3001-\u301b\u4e00-\u9fff]"
HALF_WIDTH = re.compile(rf"{CHINESE} ?[,;:!?()](?!//)|[,;:!?()] ?{CHINESE}")
"""Half-width punctuation next to Chinese text, which has its own: ，；：！？（）."""
CODE = re.compile(r"```.*?```|`[^`]*`|<[^>]+>|\]\([^)]*\)|!\[|https?://\S+", re.DOTALL)


def half_width(text: str) -> list[str]:
    """Return the places of a Chinese text that have half-width punctuation, or a bracket without its counterpart."""
    found = [text[max(0, m.start() - 10) : m.end() + 10] for m in HALF_WIDTH.finditer(text)]
    return found if text.count("\uff08") == text.count("\uff09") else [*found, text]


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


def test_half_width_punctuation_is_found() -> None:
    assert half_width("\u7b54\u6848\uff08nat\uff09\uff0c1.5 \u5230 C(n, k)\uff1a\u65e0") == []
    for wrong in ("\u7b54,nat", "nat, \u7b54", "\u7b54(nat)", "(\u7b54)", "\u7b54\uff08nat)", "\u7b54\uff08nat"):
        assert half_width(wrong), wrong


@pytest.mark.parametrize("name", [chinese for _, chinese in PAGES])
def test_chinese_prose_has_full_width_punctuation(root: Path, name: str) -> None:
    text = CODE.sub(" ", (root / name).read_text(encoding="utf-8"))
    assert len(re.findall(CHINESE, text)) > 200
    assert half_width(text) == []
