"""Docstrings use the field's plain words: the rates of dialect words stay at or under those of well-kept peers."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = ("posttrain", "pipelines", "tasks", "flows", "infra", "tests", "benchmarks", "examples")
PER = 10_000
LIMITS = {
    "what": (r"\bwhat\b", 6.0),
    "where": (r"\bwhere\b", 11.0),
    "says, said": (r"\b(?:says|said)\b", 2.0),
    "alone": (r"\balone\b", 1.0),
    "another": (r"\banother\b", 2.0),
    "of its own": (r"\bof\s+its\s+own\b", 0.0),
}
"""Occurrences per 10,000 docstring words: upper ends of the ranges of prime-rl, tinker-cookbook, torchtitan, httpx and nanochat."""


def docstrings(source: str) -> Iterator[str]:
    """Yield every string that is a statement, without the code of its examples: docstrings of all kinds."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield re.sub(r"^\s*(?:>>>|\.\.\.).*$", "", node.value.value, flags=re.MULTILINE)


def rates(text: str) -> dict[str, float]:
    """Return the occurrences of each expression per 10,000 words."""
    total = len(re.findall(r"[A-Za-z']+", text))
    return {name: PER * len(re.findall(p, text, re.IGNORECASE)) / total for name, (p, _) in LIMITS.items()}


def test_rates_count_words_of_docstrings_only() -> None:
    source = '"""What it says. What is\nof its own."""\nx = "what alone"\n"""Where."""\n'
    found = rates("\n".join(docstrings(source)))
    # nine words: what it says what is of its own where
    assert found == {
        "what": PER * 2 / 9,
        "where": PER / 9,
        "says, said": PER / 9,
        "alone": 0,
        "another": 0,
        "of its own": PER / 9,
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_docstrings_use_plain_words(package: str, root: Path) -> None:
    texts = [text for file in sorted((root / package).rglob("*.py")) for text in docstrings(file.read_text("utf-8"))]
    found = rates("\n".join(texts))
    too_many = {name: round(rate, 1) for name, rate in found.items() if rate > LIMITS[name][1]}
    assert not too_many, f"{package}: dialect words per 10,000 docstring words: {too_many}"


@pytest.mark.parametrize("package", PACKAGES)
def test_docstrings_begin_with_a_sentence(package: str, root: Path) -> None:
    """Catch the noun phrases that a missing verb leaves behind: "The rows of a table.", "Whether it holds."."""
    noun_phrase = re.compile(r"(?:the|what|whether|how|where)\b", re.IGNORECASE)
    found = [
        f"{file.relative_to(root)}:{node.lineno} {node.name}"
        for file in sorted((root / package).rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and noun_phrase.match(ast.get_docstring(node) or "")
    ]
    assert not found, "functions whose docstring does not begin with a verb: " + ", ".join(found)
