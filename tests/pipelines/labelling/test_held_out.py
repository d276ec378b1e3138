"""Held-out problems from people's scores: only answers on which all agree, once, into the evaluation and never into the preferences."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.commands import label
from pipelines.config.params import load_params
from pipelines.data.sources import table_rows
from pipelines.data.tables import Table, write_rows
from pipelines.ingest import split_tables
from pipelines.labelling.held_out import gold_answer
from pipelines.labelling.judgements import Desk
from pipelines.labelling.preferences import hand_over
from pipelines.labelling.session import Answer, Item, Session, open_session
from posttrain.environments.parts import KINDS
from posttrain.errors import DataError
from tests.pipelines.commands.test_intake import folder, left, taken

__all__ = ["folder"]


def test_an_answer_that_all_people_give_the_top_score_becomes_a_held_out_problem(folder: Path) -> None:
    params = load_params(folder / "params.yaml")
    texts = ("5000 + 5000 = 10000\nanswer: 10000", "answer: 7")
    answers = tuple(Answer(text, f"m{n}", f"{n}.dir") for n, text in enumerate(texts))
    items = tuple(Item(str(i), f"{5000 + i}+{5000 - i}=", answers) for i in range(4))
    session = Session(folder / "labels" / "s", "scores", 0, 0, items, held_out=True)
    session.save()
    assert open_session(session.folder) == session
    desk, gold = Desk(session), gold_answer(params)

    def judge(who: str, item: int, *scores: int) -> None:
        desk.judge_item(who, str(item), f"{who}{item}", list(scores))

    def given() -> int:
        return hand_over(desk, str(folder / "inbox"), scores=True, gold=gold)

    judge("ann", 0, 10, 1)
    judge("ann", 1, 10, 1)
    judge("ann", 2, 10, 10)
    judge("judge/big", 3, 10, 1)
    judge("ann", 3, 10, 1)
    assert given() == 4
    assert left(folder) == [], "one person is not enough, and a model is no person"
    judge("bob", 0, 10, 2)
    judge("bob", 1, 9, 1)
    judge("bob", 2, 10, 10)
    assert given() == 3
    judge("cat", 0, 10, 3)
    assert given() == 1
    desk.close()
    assert left(folder) == ["evaluation/label-s-0002.jsonl"], (
        "item 1: 9 is less than 10; item 2: two right answers that differ"
    )
    (row,) = [json.loads(line) for line in (folder / "inbox" / left(folder)[0]).read_text().splitlines()]
    assert (row["prompt"], row["answer"]) == ("5000+5000=", "10000")
    before = split_tables({kind: table_rows(kind, params.data) for kind in KINDS}, params.data)
    (result,) = taken(folder)
    assert (result.outcome, result.table, result.rows) == ("accepted", "evaluation", 1)
    after = split_tables({kind: table_rows(kind, params.data) for kind in KINDS}, params.data)
    assert {name: len(rows) for name, rows in after.items()} == {
        name: len(rows) + (name == "evaluation") for name, rows in before.items()
    }
    assert after["evaluation"][-1]["id"] == len(before["evaluation"]), "fresh rows have the highest ids"


def test_training_prompts_cannot_be_held_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        label.main(["--held-out"])
    assert "--held-out needs --prompts FILE" in capsys.readouterr().err
    params = load_params(folder / "params.yaml")
    tables = split_tables({kind: table_rows(kind, params.data) for kind in KINDS}, params.data)
    kinds: tuple[Table, ...] = ("sft", "preferences", "problems", "evaluation")
    for name in kinds:
        write_rows(name, tables[name], folder / "data/valid" / f"{name}.parquet")
    known = [tables[name][0]["prompt"] for name in kinds]
    assert label.usable([*known, "5000+5000="], folder / "data/valid", held_out_session=True) == ["5000+5000="]
    with pytest.raises(DataError, match="all 4 prompts are in other tables"):
        label.usable(known, folder / "data/valid", held_out_session=True)
