"""Answers that are mathematics, by value."""

from __future__ import annotations

import sys
from threading import Thread

import pytest

from posttrain.errors import ConfigError, DataError, RewardError
from posttrain.rewards.mathematics import math as judge

pytest.importorskip("math_verify")

CASES = [
    (r"so it is $\frac{1}{2}$", "0.5", 1.0),
    (r"\boxed{2/4}", r"\frac{1}{2}", 1.0),
    (r"\boxed{x^2-1}", "(x-1)(x+1)", 1.0),
    (r"\boxed{x^2+1}", "(x-1)(x+1)", 0.0),
    (r"\boxed{2\sqrt{3}}", r"\sqrt{12}", 1.0),
    ("The answer is 1,200.", "1200", 1.0),
    ("The answer is 12", "1200", 0.0),
    ("I do not know", "3", 0.0),
    ("", "3", 0.0),
    (r"\boxed{\frac{1}{", "3", 0.0),
    (r"$\{1, 2\}$", r"\{2, 1\}", 1.0),
    (r"-\boxed{7}", "-7", 1.0), (r"-\boxed{7}", "7", 0.0), (r"$-\boxed{7}$", "-7", 1.0), (r"-\boxed{x+1}", "-x-1", 1.0),
    (r"\boxed{10\%}", r"10\%", 1.0), (r"\boxed{10\%}", "10", 1.0), (r"\boxed{50\%}", "50%", 1.0), ("10%", r"10\%", 1.0),
    (r"<think>\boxed{7}", "7", 0.0), (r"<think>\boxed{7}</think>\boxed{8}", "8", 1.0), ("<think>7", "7", 0.0),
    ("The answer is 7. Wait, no, 8", "7", 0.0), ("not 7", "7", 0.0), ("7!", "7", 0.0), ("3!", "6", 1.0), ("7x", "7", 0.0),
    (r"\boxed{0.\overline{3}}", "1/3", 1.0), (r"\boxed{\frac13}", r"0.\overline{3}", 1.0), (r"0.\overline{3}", "1/3", 1.0),
    (r"\boxed{0.\overline{3}}", "0.3", 0.0), (r"\boxed{1.2\overline{34}}", "611/495", 1.0), (r"\boxed{-0.\bar 3}", "-1/3", 1.0),
    (r"\boxed{0.\dot{1}4285\dot{7}}", "1/7", 1.0), (r"\boxed{0.1\dot{6}}", "1/6", 1.0), (r"\boxed{\overline{AB}}", r"\overline{AB}", 1.0),
    (r"\boxed{e^{i\pi}}", "-1", 1.0), (r"\boxed{-1}", r"e^{i\pi}", 1.0), (r"\boxed{\frac{1}{1+i}}", r"\frac{1-i}{2}", 1.0),
    (r"\boxed{3+2i}", "3-2i", 0.0), (r"\boxed{2i}", "2", 0.0), (r"\boxed{i+1}", "j+1", 0.0),
    ("5 or 7", "7", 0.0), (r"\pm 5", "5", 0.0), ("2,5", "2.5", 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("completion", "gold", "expected"), CASES)
def test_equal_by_value(completion: str, gold: str, expected: float) -> None:
    assert judge(["p"], [completion], answer=[gold], row_seconds=60) == [expected]


@pytest.mark.parametrize("gold", ["", "???", r"\frac{1}{"])
def test_a_gold_answer_that_cannot_be_read_passes_nobody(gold: str) -> None:
    assert judge(["p"] * 3, [gold, r"\boxed{1}", "1"], answer=[gold] * 3) == [None] * 3


def test_a_gold_answer_may_be_a_number() -> None:
    assert judge(["p"], [r"\boxed{7}"], answer=[7]) == [1.0]  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"`math`: the gold answer of row 0 is None"):
        judge(["p"], ["7"], answer=[None])  # type: ignore[list-item]


def test_a_row_that_takes_too_long_is_missing_and_the_others_are_judged() -> None:
    endless = r"\boxed{\sum_{k=1}^{1000000} \frac{1}{k^3}}"
    assert judge(["p"] * 3, ["1", endless, "2"], answer=["1"] * 3, row_seconds=3) == [1.0, None, 0.0]


def test_in_a_thread_it_says_so_instead_of_calling_everything_wrong() -> None:
    said: list[object] = []

    def run() -> None:
        try:
            said.append(judge(["p"], ["1"], answer=["1"]))
        except RewardError as error:
            said.append(str(error))

    thread = Thread(target=run)
    thread.start()
    thread.join()
    assert "main thread only" in str(said[0])


def test_without_the_package_it_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(
        ConfigError, match=r"'math' needs the package math-verify; install it with: pip install .*\[math\]"
    ):
        judge(["p"], ["1"], answer=["1"])
