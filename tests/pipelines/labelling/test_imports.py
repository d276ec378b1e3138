"""Exports of Label Studio and Argilla become sessions: judgements, agreement, and preferences in the inbox."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.commands.label import main
from pipelines.data.files import read_file
from pipelines.labelling.imports import read_export
from pipelines.labelling.judgements import check_name
from posttrain.errors import DataError


def task(number: int, *annotations: tuple[Any, str]) -> dict[str, Any]:
    """A task of Label Studio's template for human preferences, with (annotator, selected)."""
    value = [
        {"id": i, "completed_by": who, "was_cancelled": selected == "cancel", "created_at": "2026-01-02T03:04:05Z",
         "result": [{"type": "pairwise", "from_name": "comparison", "to_name": "answer1,answer2", "value": {"selected": selected}}]}
        for i, (who, selected) in enumerate(annotations)
    ]  # fmt: skip
    return {
        "id": number, "annotations": value, "data": {"prompt": f"p{number}", "answer1": f"one {number}", "answer2": f"two {number}"},
    }  # fmt: skip


def record(number: int, responses: Any) -> dict[str, Any]:
    fields = {"instruction": f"p{number}", "response-1": "one", "response-2": "two", "response-3": "three"}
    return {"id": str(number), "fields": fields, "metadata": {}, "responses": responses}


def stored(folder: Path, records: list[dict[str, Any]]) -> Path:
    path = folder / "export of mine.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


RANKED = [{"value": f"response-{i}", "rank": rank} for i, rank in ((1, 1), (2, 1), (3, 2))]


@pytest.fixture
def project(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "params.yaml").write_text((root / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("POSTTRAIN_INBOX", raising=False)
    return tmp_path


def test_a_label_studio_export_is_a_session_whose_preferences_reach_the_inbox_once(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ann, bob = {"id": 1, "email": "ann@example.org"}, 2
    path = stored(
        project,
        [task(0, (ann, "left"), (bob, "left")), task(1, (ann, "right"), (bob, "left")), task(2, (bob, "cancel"))],
    )
    assert main(["--import", str(path)]) == 0
    said = capsys.readouterr().out
    assert "3 items, 4 judgements handed to the inbox" in said
    # labels 0 0 | 1 0: one of two items disagrees; by chance 2 x 3 x 1 of 4 x 3 ordered pairs differ
    assert f"Krippendorff's alpha {1 - (2 / 4) / (6 / 12):.2f}" in said
    (file,) = (project / "inbox/preferences").iterdir()
    rows = [(row["annotator"], row["prompt"], row["chosen"], row["rejected"]) for row in read_file(file)]
    assert sorted(rows) == [
        ("ann@example.org", "p0", "one 0", "two 0"),
        ("ann@example.org", "p1", "two 1", "one 1"),
        ("label-studio 2", "p0", "one 0", "two 0"),
        ("label-studio 2", "p1", "one 1", "two 1"),
    ]
    assert {row["time"] for row in read_file(file)} == {"2026-01-02T03:04:05Z"}
    assert main(["--import", str(path)]) == 0
    assert "0 judgements handed to the inbox" in capsys.readouterr().out
    assert len(list((project / "inbox/preferences").iterdir())) == 1


def test_argilla_rankings_imply_every_pair_and_labels_may_be_places_or_ties(tmp_path: Path) -> None:
    ranking = [{"user_id": "0123456789", "value": ["response-2", "response-1", "response-3"], "status": "submitted"}]
    ranked = [
        {"value": "response-1", "rank": 2},
        {"value": "response-2", "rank": 1},
        {"value": "response-3", "rank": 3},
    ]
    older = [{"user_id": "u", "status": "submitted", "values": {"order": {"value": ranked}}}]
    draft = [{"user_id": "v", "status": "draft", "values": {"order": {"value": ranked}}}]
    path = stored(tmp_path, [record(0, {"order": ranking}), record(1, older), record(2, draft)])
    ask, items, judgements = read_export(path)
    assert (ask, [item.prompt for item in items]) == ("ranking", ["p0", "p1", "p2"])
    assert [(each.annotator, each.item, each.value) for each in judgements] == [
        ("argilla 0123456789", "0", [1, 0, 2]),
        ("argilla u", "1", [1, 0, 2]),
    ]
    labels = {"response-2": 1, "A": 0, "tie": "tie", "neither": "bad"}
    path = stored(tmp_path, [record(i, {"q": [{"user_id": "u", "value": value}]}) for i, value in enumerate(labels)])
    assert [each.value for each in read_export(path)[2]] == list(labels.values())


def test_different_annotators_have_different_names(tmp_path: Path) -> None:
    ids = [
        *(
            "0f3b5c1e-7a1d-4c55-9d0e-1f6a2b3c4d5e",
            "0f3b5c1e-7a1d-4c55-9d0e-1f6a2b3c4d5f",
            "0f3b5c1e",
            "judge/x@y",
            "x@y",
        ),
        *(f"{'a' * 60}@example.org", f"{'a' * 61}@example.org", "a\nb@c", "ab@c", None, 7),
    ]
    path = stored(tmp_path, [record(0, {"q": [{"user_id": who, "value": "response-1"} for who in ids]})])
    names = [each.annotator for each in read_export(path)[2]]
    assert len(set(names)) == len(ids)
    for name in names:
        check_name(name)
    assert {"x@y", "ab@c", "argilla 0f3b5c1e", "argilla unknown", "argilla 7"} < set(names)


def test_a_second_judgement_of_one_annotator_replaces_the_first(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = stored(project, [task(0, (1, "left"), (1, "right"))])
    assert main(["--import", str(path)]) == 0
    said = capsys.readouterr().out
    assert "1 judgements are left out: the same annotator judged the item again later in the file" in said
    (file,) = (project / "inbox/preferences").iterdir()
    assert [row["chosen"] for row in read_file(file)] == ["two 0"]


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([{"prompt": "p", "chosen": "a", "rejected": "b"}], "needs no import: put it into inbox/preferences"),
        ([task(0)], "holds no judgement"),
        ([record(0, {"q": [{"user_id": "u", "value": "response-9"}]})], "'response-9' is no answer"),
        ([record(0, {"a": [], "b": []})], "export one question"),
        ([{"fields": {"prompt": "p", "text": "x"}, "responses": {}}], "do not show which are the answers"),
        ([{"data": {}, "annotations": [{"result": [{"type": "choices"}]}]}], "results of the type choices"),
        ([task(0, (1, "middle"))], "selects 'middle'"),
        ([task(0, (1, "left")) | {"annotations": 3}], "record 0: has not the form of an export of Label Studio"),
        ([task(0, (1, "left")) | {"annotations": [None]}], "record 0: has not the form of an export of Label Studio"),
        ([task(0, (1, "left")) | {"data": {"prompt": 3, "answer1": "a", "answer2": "b"}}], "neither text nor messages"),
        ([record(0, {"q": [{"user_id": "u", "value": None}]})], "the value None, which is no label"),
        ([record(0, {"q": [{"user_id": "u"}]})], "the value None, which is no label"),
        ([record(0, {"q": [3]})], "record 0: has not the form of an export of Argilla"),
        (
            [record(0, {"q": [{"value": [{"value": "response-1"}]}]})],
            "has not the form of an export of Argilla .KeyError: 'rank'",
        ),
        ([record(0, {"q": [{"value": RANKED}]})], "record 0: a ranking has two answers of the same rank"),
    ],
)
def test_what_cannot_be_imported_is_refused_in_words(tmp_path: Path, records: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_export(stored(tmp_path, records))
