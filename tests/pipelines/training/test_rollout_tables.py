"""Tables of rollouts: every number of an update comes back as it was, and each policy of keeping takes the rows it names."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.lineage.erasure import Texts
from pipelines.runtime.kept_answers import BEST, CHANGED, FOOLED, WORST, kept_answers
from pipelines.training.rollout_tables import read_table, selected, write_table
from posttrain.data.tokens import TextEncoder, Tokens
from posttrain.errors import DataError
from posttrain.models.tiny import byte_tokenizer
from posttrain.rollouts.engine import Completion
from posttrain.rollouts.groups import Problem, ScoredAnswer
from posttrain.training.onpolicy import Demonstration, Experience, OnPolicyRow
from posttrain.training.replay import KeptStep, batches_of, keep_step

ENCODER = TextEncoder(byte_tokenizer(64), 64)


def answer(prompt: Any, text: str, group: int, reward: float, model: float | None) -> ScoredAnswer:
    ids, response = tuple(ENCODER.prompt(prompt if isinstance(prompt, str) else "x")), tuple(ENCODER.completion(text))
    completion = Completion(response, (-0.1,) * len(response), True)
    problem = Problem(prompt, ids, {}, group)
    tokens = Tokens(ids, response, f"problem {group}", None)
    sources = {"true": reward, "model": model}
    return ScoredAnswer(tokens, completion, text, group, problem, reward, sources, version=2)


def experience(of: ScoredAnswer, reference: float, **more: Any) -> Experience:
    time = len(of.tokens.response)
    numbers = np.linspace(0.1, 1.0, time, dtype=np.float32)
    return Experience(of.tokens, numbers, -numbers, np.full(time, reference, np.float32), **more)


ANSWERS = [
    answer("1+1=", "two of them", 4, 0.0, 0.9),
    answer("1+1=", "2", 4, 1.0, 0.1),
    answer([{"role": "user", "content": "say 'ü'"}], "ü", 9, 0.5, None),
    answer([{"role": "user", "content": "say 'ü'"}], "u", 9, float("nan"), 0.5),
]
ROUTING = np.arange(2 * 3 * 2, dtype=np.int16).reshape(2, 3, 2)
ROWS = [
    experience(ANSWERS[0], 0.0, old_values=np.full(12, np.nan, np.float32), trained=False),
    experience(ANSWERS[1], -5.0, old_routing=ROUTING),
    experience(ANSWERS[2], 0.5, returns=np.array([1e-45, -0.0, 3.4e38], np.float32)),
    experience(ANSWERS[3], 0.25),
]
EXPERT = Demonstration(Tokens((5, 6), (7, 8, 9), "expert 3", (1.0, 0.1, 0.0)), 0.3)


def step() -> KeptStep:
    batches: list[list[OnPolicyRow]] = [
        [*(replace(row, weight=0.7) for row in ROWS[:2]), EXPERT],
        [*(replace(row, weight=0.9) for row in ROWS[2:]), replace(EXPERT, weight=0.1)],
        [replace(row, weight=1.0) for row in ROWS[:2]],
    ]
    return keep_step(3, batches, 0.04)


def equal(one: OnPolicyRow, other: OnPolicyRow) -> bool:
    """Compare two rows bit by bit, with the types of their arrays."""
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            if (a.dtype, a.shape, a.tobytes()) != (b.dtype, b.shape, b.tobytes()):
                return False
        elif a != b or (isinstance(a, Tokens) and (a.id, a.weights) != (b.id, b.weights)):
            return False
    return type(one) is type(other)


def test_a_table_gives_the_batches_back_to_the_last_bit(tmp_path: Path) -> None:
    kept, path = step(), tmp_path / "a.parquet"
    assert len(kept.rows) == 5
    write_table(path, kept, range(5), ANSWERS, ENCODER, seed=11)
    again = read_table(path)
    assert (again.step, again.kl_coefficient, again.updates) == (3, 0.04, kept.updates)
    for batch, other in zip(batches_of(kept), batches_of(again), strict=True):
        assert all(equal(one, two) for one, two in zip(batch, other, strict=True))
    assert [row.weight for row in batches_of(again)[1]] == [0.9, 0.9, 0.1]
    shown = pq.read_table(path).to_pylist()
    assert [row["seed"] for row in shown] == [[11, 4, 0], [11, 4, 1], None, [11, 9, 0], [11, 9, 1]]
    assert [row["version"] for row in shown] == [2, 2, None, 2, 2]
    assert [row["kind"] for row in shown] == ["answer", "answer", "demonstration", "answer", "answer"]
    assert (shown[0]["completion"], shown[0]["reward/true"], shown[0]["reward/model"]) == ("two of them", 0.0, 0.9)
    first = path.read_bytes()
    write_table(path, step(), range(5), ANSWERS, ENCODER, seed=11)
    assert path.read_bytes() == first


def test_the_extremes_are_ends_of_reward_of_drift_and_of_disagreement() -> None:
    answers = [answer("p", f"a{i}", 0, i / 10, {3: 1.0, 7: 0.0}.get(i, i / 10)) for i in range(11)]
    rows = [experience(each, 9.0 if i == 5 else 0.0) for i, each in enumerate(answers)]
    found = selected("extremes", keep_step(1, [rows], 0.0), answers, seed=0)
    assert {0, 1, 9, 10, 5, 3, 7} <= set(found)
    assert len(found) < 11


def test_a_share_is_drawn_from_the_seed_and_a_table_of_a_part_has_no_batches(tmp_path: Path) -> None:
    answers = [answer("p", f"a{i}", i, 0.0, None) for i in range(200)]
    kept = keep_step(1, [[experience(each, 0.0) for each in answers]], 0.0)
    found = selected(0.25, kept, answers, seed=0)
    assert 30 < len(found) < 70  # a binomial of 200 and 0.25: mean 50, standard deviation 6.1
    assert (selected(0.25, kept, answers, 0), selected(0.25, kept, answers, 1) != found) == (found, True)
    write_table(tmp_path / "a.parquet", kept, found, answers, ENCODER, 0)
    part = read_table(tmp_path / "a.parquet")
    assert (len(part.rows), part.updates) == (len(found), [])


def test_what_is_no_table_of_rollouts_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for content in (None, b"PAR1"):
        if content:
            path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.parquet: not a table of rollouts"):
            read_table(path)
    pq.write_table(pq.read_table(_written(tmp_path)).replace_schema_metadata(None), path)
    with pytest.raises(DataError, match="not a table of rollouts"):
        read_table(path)


def test_texts_inside_prompts_and_demonstrations_are_found_by_forget(tmp_path: Path) -> None:
    path = _written(tmp_path)
    assert Texts([{"prompt": [{"role": "user", "content": "say 'ü'"}]}]).in_file(path)
    assert Texts([{"prompt": "two of"}]).in_file(path)
    assert not Texts([{"prompt": "three of them"}]).in_file(path)


def test_the_answers_worth_reading_come_from_such_a_table(tmp_path: Path) -> None:
    write_table(tmp_path / "artifacts/rollouts-000003.parquet", step(), range(5), ANSWERS, ENCODER, seed=0)
    found = {each.kind: each for each in kept_answers(tmp_path, "true", ("model",), 1)}
    assert {kind: each.completion for kind, each in found.items()} == {
        BEST: "2", WORST: "two of them", CHANGED: "2", FOOLED: "two of them",
    }  # fmt: skip
    # log p of "2" and its end, against -5 for each: (-0.1 + 5) + (-1 + 5)
    assert found[CHANGED].log_ratio == pytest.approx(8.9)
    assert found[BEST].rewards == {"true": 1.0, "model": 0.1}


def _written(folder: Path) -> Path:
    write_table(folder / "b.parquet", step(), range(5), ANSWERS, ENCODER, seed=0)
    return folder / "b.parquet"
