"""Every file of cases/data: its rows, or the words of its refusal."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.data_schema import DataParams, TableSource
from pipelines.config.params import load_params
from pipelines.data.pairs import Changes
from pipelines.data.sources import table_rows
from pipelines.data.tables import TEXT
from pipelines.validation.leakage import prompt_keys
from posttrain.errors import PosttrainError

FRUIT = "Name a fruit"
Rows = list[tuple[Any, ...]]


def user(text: str, **keys: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **keys}


def says(text: str, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **keys}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Graz"}}}
OASST = {
    "columns": {"prompt": "prompt.text"},
    "graded": {"answers": "prompt.replies", "text": "text", "score": "rank", "better": "lower"},
}
PREFERRED = {"preferred": {"columns": ["preferred"], "answers": {"a": "response_a", "b": "response_b"}}}
GIVEN: dict[tuple[str, str], tuple[dict[str, Any], Rows]] = {
    ("prompt_completion_chat.jsonl", "sft"): ({}, [
        ([user(FRUIT)], [says("Plum"), user("Another"), says("Pear")]),
        ([user("Name a tree")], [says("Elm"), user("thanks, that is all")]),
    ]),
    ("messages.jsonl", "sft"): ({}, [
        ([system("Be brief."), user(FRUIT)], [says("Plum")]),
        ([user("Name a tree")], [says("Elm"), user("Another"), says("Oak")]),
    ]),
    ("implicit.jsonl", "preferences"): ({}, [([user(FRUIT), says("Plum"), user("Red one?")], [says("Cherry")], [says("Brick")])]),
    ("diverging.jsonl", "preferences"): ({}, [(
        [user(FRUIT)], [says("Plum"), user("Red one?"), says("Cherry")], [says("Brick"), user("That is no fruit"), says("Sorry")],
    )]),
    ("ultrafeedback.jsonl", "preferences"): ({}, [([user(FRUIT)], [says("Plum")], [says("Brick")], 8.5, 2.0)]),
    ("pref_label.jsonl", "preferences"): (PREFERRED, [(FRUIT, "Plum", "Brick"), ("Name a tree", "Elm", "Car")]),
    ("oasst_ranked.jsonl", "preferences"): (OASST, [
        (f"Name fruit number {i}", f"{better} answer", f"{worse} answer", high, low)
        for i in range(3)
        for better, worse, high, low in (("best", "middle", 0.0, -1.0), ("best", "worst", 0.0, -2.0), ("middle", "worst", -1.0, -2.0))
    ]),
    ("tools.jsonl", "sft"): ({}, [
        ([user("Weather in Graz?")], [says("", tool_calls=[CALL])]), ([user("Weather in Linz?")], [says("Sunny")]),
    ]),
    ("parts.jsonl", "sft"): ({}, [([user(FRUIT)], [says("Plum")])]),
    ("extra_keys.jsonl", "sft"): ({}, [([user(FRUIT, name="Ann")], [says("Plum", weight=1.0)])]),
    ("sharegpt.jsonl", "sft"): ({}, [([user(FRUIT)], [says("Plum"), user("Another"), says("Pear")])]),
    ("alpaca.json", "sft"): ({}, [("Translate to French\ndog", "chien"), (FRUIT, "Plum")]),
    ("kto.jsonl", "sft"): ({}, [(FRUIT, "Plum")]),
    ("kto.jsonl", "preferences"): ({}, [(FRUIT, "Plum", "Brick")]),
    ("hh.jsonl", "preferences"): ({}, [([user(FRUIT)], [says("Plum")], [says("Brick")])]),
    ("ranked.jsonl", "preferences"): (
        {"columns": {"prompt": "prompt"}, "graded": {"answers": "responses", "score": "ranking", "better": "lower"}},
        [(FRUIT, "Plum", "A fruit", -1.0, -2.0), (FRUIT, "Plum", "Brick", -1.0, -3.0), (FRUIT, "A fruit", "Brick", -2.0, -3.0)],
    ),
    ("graded_list.jsonl", "preferences"): (
        {"columns": {"prompt": "prompt"}, "graded": {"answers": "answers", "text": "t", "score": "s", "better": "higher"}},
        [(FRUIT, "Plum", "A fruit", 3.0, 2.0), (FRUIT, "Plum", "Brick", 3.0, 0.0), (FRUIT, "A fruit", "Brick", 2.0, 0.0)],
    ),
    ("answers_list.jsonl", "problems"): ({}, [
        ("Capital of Spain?", '["Madrid", "madrid city"]'), ("3+4?", "7"), ("1/3 of 1?", "0.3333333333333333"), ("true?", True),
        ("none", None),
    ]),
    ("verl.jsonl", "problems"): ({}, [([user("3+4?")], "7")]),
    ("problems_chat.jsonl", "problems"): ({}, [([system("Answer with a number."), user("3+4?")], "7")]),
    ("nel.csv", "sft"): ({}, [("hello\x85there", "ok")]),
    ("big.csv", "sft"): ({}, [("q", "x" * 140_000)]),
    ("packed.jsonl.gz", "sft"): ({}, [("a", "b")]),
    ("rows.ndjson", "sft"): ({}, [("a", "b")]),
    ("tsv.tsv", "sft"): ({}, [("a", "b")]),
    ("text.jsonl", "sft"): (
        {"columns": {"prompt": "text", "completion": "text"},
         "extract": {"prompt": r"^(\s*\S+)", "completion": r"^\s*\S+(.*)"}},
        [("A", " plum is a fruit."), ("An", " elm is a tree.")],
    ),
    ("shards", "sft"): ({}, [("a", "b"), ("c", "d")]),
    ("binary.parquet", "sft"): ({}, [(FRUIT, "Plum"), ("Name a tree", "Elm")]),
    ("dictionary.parquet", "sft"): ({}, [(FRUIT, "Plum"), (FRUIT, "Pear")]),
    ("decimal.parquet", "problems"): ({}, [("price?", "1.50"), ("when?", "2.00")]),
    ("ops_train.jsonl", "problems"): ({}, [("What is 8-3?", "5"), ("Is x<y?", "1"), ("Compute 2.5", "2.5"), ("दिन", "1")]),
    ("ops_eval.jsonl", "evaluation"): ({}, [("What is 8+3?", "11"), ("Is x>y?", "0"), ("Compute 2/5", "0.4"), ("दान", "2")]),
}  # fmt: skip
"""File and table to the options of its source and its rows: the table's texts, then scores or answer."""
REFUSED: dict[tuple[str, str], tuple[dict[str, Any], str]] = {
    ("text.jsonl", "sft"): ({}, "Make two columns, prompt and completion"),
    ("oasst_ranked.jsonl", "preferences"): ({}, r"data\.preferences\.graded"),
    ("ranked.jsonl", "preferences"): ({}, r"data\.preferences\.graded"),
    ("pref_label.jsonl", "preferences"): ({}, r"a label that says which of two answers won: data\.preferences\.preferred"),
    ("messages.jsonl", "sft"): ({"columns": {"prompt": "messages", "completion": "messages"}}, "map `messages`"),
    ("implicit.jsonl", "preferences"): (
        {"columns": {"prompt": "chosen", "chosen": "chosen", "rejected": "rejected"}}, "the answer would be in the prompt",
    ),
}  # fmt: skip
"""Without the mapping they need, or with one that would leak."""
COUNTED = {
    ("prompt_completion_chat.jsonl", "sft"): {
        "conversations that end with a turn of the user or a tool, which is not trained": 1
    },
    ("ultrafeedback.jsonl", "preferences"): {
        "conversations whose answers repeat the prompt, of which one copy is kept": 1
    },
    ("kto.jsonl", "sft"): {"answers with label false, left out of imitation": 1},
    ("verl.jsonl", "problems"): {"columns that are not used: ability, data_source, extra_info": 3},
    ("graded_list.jsonl", "preferences"): {"records without a better and a worse answer, left out": 2},
}
"""Return the counts of rows that ingest leaves out or does not train; nothing else changes."""


@pytest.fixture(scope="module")
def shipped(root: Path) -> DataParams:
    return load_params(root / "params.yaml").data


def table(cases: Path, shipped: DataParams, file: str, kind: Any, options: dict[str, Any], changes: Changes) -> Rows:
    source = TableSource.model_validate({"source": str(cases / "data" / file)} | options)
    rows = table_rows(kind, shipped.model_copy(update={kind: source}), changes)
    names = (*TEXT[kind], "answer", "chosen_score", "rejected_score")
    return [tuple(row[name] for name in names if name in row) for row in rows]


def test_every_file_has_its_expectation(cases: Path) -> None:
    assert {path.name for path in (cases / "data").iterdir()} == {file for file, _ in (*GIVEN, *REFUSED)}


@pytest.mark.parametrize(("file", "kind"), sorted(GIVEN))
def test_a_file_gives_its_rows(cases: Path, shipped: DataParams, file: str, kind: str) -> None:
    options, expected = GIVEN[file, kind]
    changes: Changes = Counter()
    assert table(cases, shipped, file, kind, options, changes) == expected
    assert dict(+changes) == COUNTED.get((file, kind), {})


@pytest.mark.parametrize(("file", "kind"), sorted(REFUSED))
def test_a_refusal_leads_to_the_rows(cases: Path, shipped: DataParams, file: str, kind: str) -> None:
    options, words = REFUSED[file, kind]
    with pytest.raises(PosttrainError, match=words) as raised:
        table(cases, shipped, file, kind, options, Counter())
    assert "\n" not in str(raised.value)


def test_prompts_that_differ_in_an_operator_or_a_vowel_sign_are_no_leak(cases: Path, shipped: DataParams) -> None:
    trained = table(cases, shipped, "ops_train.jsonl", "problems", {}, Counter())
    held_out = table(cases, shipped, "ops_eval.jsonl", "evaluation", {}, Counter())
    for (asked, _), (other, _) in zip(trained, held_out, strict=True):
        assert not prompt_keys({"prompt": asked}, held_out=False) & prompt_keys({"prompt": other}, held_out=True)
