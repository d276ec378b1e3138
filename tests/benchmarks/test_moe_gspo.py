"""The comparison of GSPO and GRPO on a mixture of experts: its numbers by hand, and one run in miniature."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from benchmarks.moe_gspo import ALGORITHMS, CURVES, MARKS, Outcome, interval, main, ratios, table, write
from posttrain.models.inference import token_logprobs
from posttrain.training.onpolicy import Experience
from tests.models import small
from tests.models.moe import moe


def test_the_two_differ_in_the_ratio_and_its_clip_alone() -> None:
    grpo, gspo = ALGORITHMS["GRPO"], ALGORITHMS["GSPO"]
    different = {f.name for f in fields(grpo) if getattr(grpo, f.name) != getattr(gspo, f.name)}
    assert different == {"name", "paper", "ratio", "clip_low", "clip_high"}
    assert gspo.minibatches == 4


def test_intervals_are_students() -> None:
    # 1, 2, 3: mean 2, standard error 1/sqrt(3), t of two degrees of freedom 4.302653
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.302653 / math.sqrt(3)), abs=1e-6)


def test_ratios_by_hand() -> None:
    with moe():
        policy = small.policy()
    tokens = small.rows(5)
    now = token_logprobs(policy, tokens, 100)
    shifts = small.numbers(tokens, 1, 0.3)
    experts = [n.experts.copy() for n in now]  # type: ignore[union-attr]
    for chosen in experts:
        chosen[0, 1] = [9, 9]
    rows = [
        Experience(t, s, s, s, old_logprobs=n.logprobs - s, old_routing=e)
        for t, s, n, e in zip(tokens, shifts, now, experts, strict=True)
    ]
    found = ratios(policy, rows)
    every = np.concatenate(shifts)
    first = np.concatenate([[True] + [False] * (len(s) - 1) for s in shifts])
    assert 10 ** found["token"] == pytest.approx(np.exp(every).var(), rel=1e-4)
    assert 10 ** found["sequence"] == pytest.approx(np.exp([s.mean() for s in shifts]).var(), rel=1e-4)
    assert found["moved, changed"] == pytest.approx(np.abs(every[first]).mean(), rel=1e-4)
    assert found["moved, others"] == pytest.approx(np.abs(every[~first]).mean(), rel=1e-4)


def outcome(token: float, sequence: float) -> Outcome:
    curves = {name: [0.0, 1.0] for name in CURVES} | {"token": [token] * 2, "sequence": [sequence] * 2}
    return Outcome(curves, 0.5, 0.75, 0.2, 0.1)


def test_the_table_compares_the_ratio_that_each_uses_and_marks_what_is_sure() -> None:
    results = {"GRPO": [outcome(-1.0, -3.0), outcome(-2.0, -4.0)], "GSPO": [outcome(-1.5, -6.0), outcome(-2.5, -7.0)]}
    lines = table(results).splitlines()
    assert lines[2].startswith("| log10 variance of the ratio that it uses | -1.5 ± 6.4 | -6.5 ± 6.4 | -5 ± 0* |")
    assert lines[3].endswith("| -0.5 ± 0* |")
    assert lines[-1] == "| greedy accuracy after | 0.75 ± 0 | 0.75 ± 0 | 0 ± 0 |"


def test_what_is_said_around_the_tables_stays(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{MARKS[0]}\nold\n{MARKS[1]}\n\nWhat it shows.\n")
    write("| new |", page)
    assert page.read_text() == f"# Title\n\n{MARKS[0]}\n\n| new |\n\n{MARKS[1]}\n\nWhat it shows.\n"


def test_in_miniature(tmp_path: Path) -> None:
    sizes = ["--seeds=1", "--steps=1", "--sft-rows=64", "--sft-epochs=1", "--heldout=8", "--prompts=4", "--samples=4"]
    main([*sizes, "--out", str(tmp_path / "page.md")])
    assert (tmp_path / "page.md").read_text().count("| greedy accuracy after |") == 2
    assert (tmp_path / "page.png").stat().st_size > 10_000
