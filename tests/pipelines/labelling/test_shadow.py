"""People compare served answers with those of the shadow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.commands import label
from pipelines.labelling.shadow import shadow_items
from pipelines.tracking.served import append_served
from posttrain.errors import DataError


def record(number: int, prompt: str, text: str, shadow: bool = False) -> dict[str, Any]:
    name, md5 = ("challenger", "bb.dir") if shadow else ("champion", "aa.dir")
    return {"kind": "served", "id": f"cmpl-{number}-0{'-shadow' * shadow}", "request": f"cmpl-{number}", "shadow": shadow,
            "model": name, "md5": md5, "prompt": prompt, "completion": text}  # fmt: skip


RECORDS = [
    record(0, "a", "one"), record(0, "a", "two", True), record(1, "b", "same"), record(1, "b", "same", True), record(2, "c", "alone"),
    record(3, "d", "three"), record(3, "d", "four", True), record(4, "a", "five"), record(4, "a", "six", True),
]  # fmt: skip


def test_each_prompt_with_two_answers_is_one_item() -> None:
    items = shadow_items(RECORDS, ["a", "b", "c", "d"], 9, 0)
    found = {item.prompt: [(each.text, each.model, each.md5) for each in item.answers] for item in items}
    assert found == {
        "a": [("five", "champion", "aa.dir"), ("six", "challenger", "bb.dir")],
        "d": [("three", "champion", "aa.dir"), ("four", "challenger", "bb.dir")],
    }
    assert [item.id for item in items] == ["0", "1"]
    assert len(shadow_items(RECORDS, ["a", "d"], 1, 0)) == 1
    assert [item.prompt for item in shadow_items(RECORDS, ["d"], 9, 0)] == ["d"]
    with pytest.raises(DataError, match="no logged request has two different answers"):
        shadow_items(RECORDS, ["b", "c"], 9, 0)


def test_the_same_log_continues_the_same_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    append_served(tmp_path, RECORDS)
    args = label.parser().parse_args(["--shadow"])
    session = label.prepare_shadow(tmp_path, args)
    assert session.ask == "pairs"
    assert len(session.items) == 2
    assert label.prepare_shadow(tmp_path, args) == session
    append_served(tmp_path, [record(5, "e", "x"), record(5, "e", "y", True)])
    assert len(label.prepare_shadow(tmp_path, args).items) == 3


def test_options_without_effect_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        label.main(["champion", "--shadow"])
    assert "--shadow asks about logged answers in pairs; give no MODEL" in capsys.readouterr().err
