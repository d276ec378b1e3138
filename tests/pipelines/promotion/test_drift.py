"""Prompts that arrive, compared with the training prompts: the words of the command and of the page of the decision."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.commands import drift as command
from pipelines.config.params import load_params
from pipelines.promotion.decision import not_judged
from pipelines.promotion.drift import arriving
from pipelines.promotion.page import page
from pipelines.tracking.served import append_served
from pipelines.validation.drift import exceeded
from posttrain.errors import DataError

LIKE = [f"{a}+{b}=" for a in range(10, 40) for b in range(50, 60)]
OTHER = [f"please tell me what {a} times {b} makes, step by step" for a in range(10, 16) for b in range(10, 18)]


@pytest.fixture
def project(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(root / "params.yaml", tmp_path)
    for table in ("sft", "preferences", "problems"):
        path = tmp_path / "data/valid" / f"{table}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"prompt": LIKE}), path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def serve(project: Path, prompts: list[str], shadow: bool = False, completion: str = "") -> None:
    records = [
        {
            "kind": "served",
            "id": f"{i}-{shadow}",
            "request": str(i),
            "prompt": prompt,
            "shadow": shadow,
            "completion": completion,
        }
        for i, prompt in enumerate(prompts)
    ]
    append_served(project, records)


def test_prompts_like_those_of_training_do_not_drift(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    serve(project, LIKE[::5])
    serve(project, OTHER, shadow=True)
    assert command.main([]) == 0
    said = capsys.readouterr().out
    assert said.startswith(
        "The 60 served prompts look like the training prompts.\n  stability index of the lengths 0.000"
    )
    assert "new words 0.0 %; prompts that training has too 100.0 %" in said


def test_other_prompts_are_named_with_what_differs(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    serve(project, OTHER)
    assert command.main(["--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert record["drifted"] is True
    # please tell me what times makes step by step: nine of eleven words
    assert record["new_words"] == pytest.approx(9 / 11)
    assert record["known"] == 0.0
    assert "above 0.25; 81.8 % of their words are in no training prompt, above 10.0 %." in record["words"]
    (found,) = arriving(project, load_params("params.yaml"), exceeded)
    decision = not_judged("grpo-0", "the champion", "no answers")
    html = page(decision, [decision], [found])
    assert "Prompts that arrive, against the training prompts" in html
    assert "The 48 served prompts differ from the training prompts" in html
    assert "Prompts that arrive" not in page(decision, [decision])


def test_a_file_is_compared_before_it_goes_to_the_inbox_and_few_prompts_are_not(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(project, OTHER[:29])
    assert command.main([]) == 0
    assert "nothing to compare: fewer than 30 prompts" in capsys.readouterr().out
    file = project / "new.jsonl"
    file.write_text("".join(json.dumps({"prompt": [{"role": "user", "content": text}]}) + "\n" for text in OTHER))
    assert command.main([str(file)]) == 0
    assert "The 48 prompts of new.jsonl differ from the training prompts" in capsys.readouterr().out
    file.write_text('{"text": "no prompt"}\n')
    assert command.main([str(file)]) == 2
    assert "new.jsonl: no record has a `prompt`" in capsys.readouterr().err


def test_accepted_files_are_compared_with_the_training_prompts_before_them(project: Path) -> None:
    for table in ("sft", "preferences", "problems"):
        pq.write_table(pa.table({"prompt": LIKE + OTHER}), project / "data/valid" / f"{table}.parquet")
    folder = project / "data/raw/accepted/preferences"
    folder.mkdir(parents=True)
    rows = [{"prompt": text, "chosen": "a", "rejected": "b"} for text in OTHER]
    (folder / "0001-new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = arriving(project, load_params("params.yaml"), exceeded)
    assert found.name == "prompts of accepted files"
    assert found.measured.new_words == pytest.approx(9 / 11)
    assert found.measured.known == 0.0


def test_the_reward_models_scores_of_answers_are_compared_with_those_of_training_answers(project: Path) -> None:
    answers = [str(i % 10) for i in range(100)]
    pq.write_table(pa.table({"prompt": LIKE[:100], "completion": answers}), project / "data/valid/sft.parquet")
    serve(project, LIKE[::5], completion="9")
    serve(project, OTHER, shadow=True, completion="0")
    params = load_params("params.yaml")

    def scores(given: Sequence[tuple[Any, str]]) -> list[float]:
        return [float(answer) for _, answer in given]

    (found,) = arriving(project, params, exceeded, lambda: scores)
    # a tenth of the training answers in each bin, all served ones in the last; an empty bin counts as 1e-4
    by_hand = 9 * (1e-4 - 0.1) * math.log(1e-4 / 0.1) + 0.9 * math.log(10)
    assert found.scores is not None
    assert (found.scores.answers, found.scores.psi) == (60, pytest.approx(by_hand))
    assert found.words == (
        "The 60 served prompts differ from the training prompts: the reward model's scores of their answers have a"
        f" stability index of {by_hand:.2f}, above 0.45."
    )
    decision = not_judged("grpo-0", "the champion", "no answers")
    assert f'<td class="n">{by_hand:.3f}<td class="n">0.451' in page(decision, [decision], [found])
    assert "a stability index of 8.28" in command.describe(found)


def test_a_limit_is_kept_by_an_equal_value_and_a_missing_value_is_no_pass() -> None:
    assert exceeded({"a": (0.25, 0.25), "b": (0.2500001, 0.25), "c": (0.0, 0.1)}) == ["b"]
    with pytest.raises(DataError, match="could not be measured"):
        exceeded({"a": (math.nan, 0.25)})
