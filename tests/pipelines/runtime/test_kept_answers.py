"""The answers of a run's tables that are worth reading: each kind by its measure, without repeating a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.runtime.kept_answers import BEST, CHANGED, FOOLED, WORST, kept_answers
from posttrain.errors import DataError

# text, reward, true reward, score of the reward model, log p and log p of the reference by token
STEPS: dict[int, list[tuple[str, float | None, float | None, float | None, list[float], list[float] | None]]] = {
    1: [
        ("a", 1.0, 1.0, 0.2, [-1.0, -1.0], [-1.5, -1.0]),
        ("b", 0.0, 0.0, 3.0, [-1.0], [-4.0]),
        ("c", 0.0, 0.0, -2.0, [-1.0], [-0.5]),
        ("d", None, None, 9.0, [-0.5], None),
    ],
    2: [
        ("e", 0.5, 0.0, 1.0, [-1.0], [-1.25]),
        ("a", 1.0, 1.0, 0.3, [-1.0], [-1.0]),
        ("f", 1.0, 1.0, 5.0, [-2.0], [-2.5]),
    ],
}


def table(folder: Path, step: int, learned: bool = True) -> None:
    rows = [
        {"kind": "answer", "prompt": "p", "completion": text, "reward": reward, "reward/answer": true,
         **({"reward/rm": score} if learned else {}), "rollout_logprobs": own, "ref_logprobs": ref}
        for text, reward, true, score, own, ref in STEPS[step]
    ]  # fmt: skip
    rows.append(dict.fromkeys(rows[0]) | {"kind": "demonstration", "prompt": "p", "completion": "expert"})
    (folder / "artifacts").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "artifacts" / f"rollouts-{step:06d}.parquet")


def found(folder: Path, kind: str, count: int, models: tuple[str, ...] = ("rm",)) -> list[Any]:
    chosen = kept_answers(folder, "answer", models, count)
    return [(each.step, each.completion) for each in chosen if each.kind == kind]


def test_each_kind_has_its_first_answers_the_latest_foremost(tmp_path: Path) -> None:
    table(tmp_path, 1)
    table(tmp_path, 2)
    assert found(tmp_path, BEST, 2) == [(2, "a"), (2, "f")]
    assert found(tmp_path, WORST, 2) == [(1, "b"), (1, "c")]
    # log p - log p_ref: b 3, f 0.5, a 0.5 in step 1, e 0.25, c -0.5; d was not measured
    assert found(tmp_path, CHANGED, 3) == [(1, "b"), (2, "f"), (1, "a")]
    assert found(tmp_path, CHANGED, 9) == [(1, "b"), (2, "f"), (1, "a"), (2, "e"), (1, "c")]
    # of a true reward of 0 by score; f has the highest score of all and is right
    assert found(tmp_path, FOOLED, 9) == [(1, "b"), (2, "e"), (1, "c")]
    kinds = [each.kind for each in kept_answers(tmp_path, "answer", ("rm",), 1)]
    assert kinds == [BEST, WORST, CHANGED, FOOLED]
    first = kept_answers(tmp_path, "answer", ("rm",), 1)[2]
    assert (first.row, first.log_ratio, first.reward, first.rewards) == (1, 3.0, 0.0, {"answer": 0.0, "rm": 3.0})


def test_without_a_reward_model_an_answer_fools_by_a_total_above_its_true_reward(tmp_path: Path) -> None:
    table(tmp_path, 1, learned=False)
    assert found(tmp_path, FOOLED, 9, ()) == []
    table(tmp_path, 2, learned=False)
    assert found(tmp_path, FOOLED, 9, ()) == [(2, "e")]


def test_no_table_is_no_answer_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    assert kept_answers(tmp_path, "answer", ("rm",), 4) == []
    table(tmp_path, 1)
    assert kept_answers(tmp_path, "answer", ("rm",), 0) == []
    (tmp_path / "artifacts/rollouts-000002.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"rollouts-000002\.parquet: not a table of rollouts .*dvc checkout"):
        kept_answers(tmp_path, "answer", ("rm",), 4)
