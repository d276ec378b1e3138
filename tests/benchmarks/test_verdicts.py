"""Verdicts of the reward `answer` on answers of models, compared with the judgement of the data set's authors."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.verdicts import FORMS, measured


def test_every_answer_has_the_verdict_of_the_authors(shared_data: Path, tmp_path: Path) -> None:
    lines = (shared_data / "gsm8k" / "example_model_solutions.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "some.jsonl").write_text("\n".join(lines[::40]), encoding="utf-8")
    counts = measured(tmp_path / "some.jsonl")
    assert {form for form, _ in counts} == {*FORMS}
    assert all(count["answers"] > 100 and not count["none"] + count["differ"] for count in counts.values()), counts


def test_own_answers_without_a_verdict_are_counted(tmp_path: Path) -> None:
    texts = ["The answer is 42.", "So 42.", "I do not know."]
    (tmp_path / "own.jsonl").write_text("\n".join(json.dumps({"answer": text, "gold": "42"}) for text in texts))
    assert {
        extract: (count["none"], count["right"]) for (_, extract), count in measured(tmp_path / "own.jsonl").items()
    } == {
        "strict": (2, 1),
        "flexible": (1, 2),
    }
