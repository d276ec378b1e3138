"""The environment that README.md shows, in its own file: every table, its options, its reward, and GRPO on it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.data_schema import DataParams, TableSource
from pipelines.config.params import load_params
from pipelines.data.sources import environment_files, table_rows
from posttrain.api import tiny
from posttrain.api_training import train
from posttrain.environments import base
from posttrain.environments.base import Environment, built_in, checked_rows, environment
from posttrain.environments.parts import KINDS
from posttrain.errors import ConfigError
from posttrain.rewards.functions import find_function

NAME = "reverse_of_readme:ENVIRONMENT"


@pytest.fixture
def shown(root: Path) -> str:
    page = (root / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return code


@pytest.fixture
def module(shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "reverse_of_readme.py"
    path.write_text(shown, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield path
    sys.modules.pop("reverse_of_readme", None)


def data_of(root: Path, **options: Any) -> DataParams:
    source = TableSource(source=NAME, rows=20)
    return load_params(root / "params.yaml").data.model_copy(
        update=dict.fromkeys(KINDS, source) | {"environments": {NAME: options}}
    )


def test_the_whole_file_is_short(shown: str) -> None:
    assert len(shown.splitlines()) <= 45


def test_an_environment_by_import_path_gives_every_table_and_grpo_trains_on_it(root: Path, module: Path) -> None:
    tables = {kind: table_rows(kind, data_of(root, length=4)) for kind in KINDS}
    prompts = [row["prompt"] for rows in tables.values() for row in rows]
    assert len(prompts) == len(set(prompts)) == 80
    assert all(re.fullmatch("reverse [a-h]{4}: ", prompt) for prompt in prompts)
    assert tables["preferences"][0]["chosen"] == tables["preferences"][0]["rejected"][::-1]
    problem = tables["problems"][0]
    reward = find_function(NAME)
    gold = problem["answer"]
    assert reward([problem["prompt"]] * 3, [gold, gold[:2], ""], answer=[gold] * 3) == [1.0, 0.5, 0.0]
    model = tiny(seed=0, hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1)
    rows = [{"prompt": row["prompt"], "answer": row["answer"]} for row in tables["problems"]]
    history = train(
        model, "grpo", rows, reward=NAME, steps=3, learning_rate=1e-2, batch_size=4, samples=16, max_new_tokens=6
    )
    assert any(step["grad_norm"] > 0 for step in history)


def test_its_file_is_an_input_of_ingest(root: Path, module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(module.parent)
    assert environment_files(TableSource(source=NAME, rows=1)) == [Path("reverse_of_readme.py")]
    assert environment_files(TableSource(source="arithmetic", rows=1)) == []


def test_an_option_that_it_does_not_have_is_refused(root: Path, module: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.environments\.reverse: .*'lenght'; the options of this environment are length"
    ):
        table_rows("sft", data_of(root, lenght=4))


def test_a_new_module_of_the_package_is_found_by_its_name(
    shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = built_in()
    (tmp_path / "reversed_word.py").write_text(shown, encoding="utf-8")
    package = sys.modules[base.PACKAGE]
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    built_in.cache_clear()
    try:
        assert built_in() == tuple(sorted((*known, "reversed_word")))
        assert environment("reversed_word").name == "reverse"
    finally:
        built_in.cache_clear()
        sys.modules.pop(f"{base.PACKAGE}.reversed_word", None)


def corpus_missing(*_: Any) -> Any:
    raise LookupError("\n*****\n  No corpus.\n\n  Tried: words\n  Searched in:\n    - '/usr/share'\n*****\n")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda *_: None, "the table problems is None; return a list of rows"),
        (lambda *_: "abc", "the table problems is 'abc'"),
        (lambda *_: {"prompt": "a"}, "the table problems is {'prompt': 'a'}"),
        (lambda *_: [], "the table problems has no row"),
        (lambda *_: ["a"], "row 0 of problems is 'a'"),
        (lambda *_: [{3: "a"}], "row 0 of problems is {3: 'a'}"),
        (lambda *_: [{"prompt": "a", "answer": "b"}, {"prompt": "a"}], "row 1 of problems has no 'answer'"),
        (lambda *_: [{"prompt": "a", "answer": "b"}], "the table problems has 1 rows, and 2 were asked for"),
        (lambda *_: [{"prompt": "a", "answer": "b"}] * 3, "the table problems has 3 rows, and 2 were asked for"),
        (lambda *_: 1 / 0, "could not make its table problems .ZeroDivisionError"),
        (lambda *_: (row for row in [{"prompt": 1 / 0}]), "could not make its table problems .ZeroDivisionError"),
        (corpus_missing, r"could not make its table problems .LookupError: No corpus. … Tried: words\); correct"),
        (lambda kind: [], "too many positional arguments"),
    ],
)
def test_what_a_task_returns_instead_of_rows_is_refused_by_its_name(rows: Any, message: str) -> None:
    odd = Environment("odd", rows, lambda completion, answer: 1.0)
    with pytest.raises(ConfigError, match=f"environment 'odd'.*{message}"):
        odd.rows("problems", 2, 0)
    with pytest.raises(ConfigError, match=message):
        checked_rows(odd, "problems", 2, 0, {})


def test_rows_may_come_from_a_generator() -> None:
    lazy = Environment("lazy", lambda kind, count, seed: ({"prompt": str(i), "answer": ""} for i in range(count)), len)  # type: ignore[arg-type]
    assert lazy.rows("problems", 2, 0) == [{"prompt": "0", "answer": ""}, {"prompt": "1", "answer": ""}]
