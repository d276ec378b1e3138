"""The example with two tasks: both are demonstrated in turn, and the second one has its own judge."""

from __future__ import annotations

from examples.two_tasks import BOTH, REVERSE


def test_demonstrations_alternate_and_are_judged_by_their_own_task() -> None:
    rows = BOTH.rows("sft", 5, 0)
    assert [row["prompt"][-1] for row in rows] == ["=", "<", "=", "<", "="]
    assert [REVERSE.judge(row["completion"], row["answer"]) for row in rows[1::2]] == [1.0, 1.0]
    assert rows[1]["completion"] == rows[1]["prompt"][3::-1]
    assert len(BOTH.rows("sft", 4, 0)) == 4


def test_the_second_task_has_a_stream_of_its_own_for_each_table() -> None:
    (first,), (again,), (other,) = (REVERSE.rows(kind, 1, 0) for kind in ("sft", "sft", "evaluation"))
    assert first == again != other
    assert (REVERSE.judge(" dcba\n", "dcba"), REVERSE.judge("abcd", "dcba")) == (1.0, 0.0)
