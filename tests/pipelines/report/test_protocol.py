"""Algorithms are ranked together only with equal protocols."""

from __future__ import annotations

from pipelines.report.protocol import Protocol, main_panel, panels

ANSWER, MODEL = "reward answer", "reward rm"
FOUND = {
    "dpo": Protocol("logged pairs", "a", None),
    "ppo": Protocol(MODEL, "a", 1000.0),
    "grpo": Protocol(ANSWER, "a", 1000.0),
    "gspo": Protocol(ANSWER, "a", 1090.0),
    "dapo": Protocol(ANSWER, "a", 3600.0),
    "late": Protocol(ANSWER, "b", 1000.0),
}


def test_panels_hold_equal_start_signal_and_budget() -> None:
    assert panels(FOUND) == [["dpo"], ["ppo"], ["grpo", "gspo"], ["dapo"], ["late"]]


def test_what_differs_is_named() -> None:
    norm = FOUND["grpo"]
    assert FOUND["gspo"].differs(norm, "tokens_sampled") == []
    assert FOUND["dapo"].differs(norm, "tokens_sampled") == ["3.6 times the tokens sampled"]
    assert FOUND["dapo"].differs(norm, "optimiser_steps") == ["3.6 times the optimiser steps"]
    assert FOUND["dpo"].differs(norm, "tokens_sampled") == ["trained on logged pairs"]
    assert FOUND["late"].differs(norm, "tokens_sampled") == ["a different starting model"]
    assert Protocol(ANSWER, "a", None).differs(norm, "tokens_sampled") == ["no tokens sampled"]


def test_the_headline_ranks_the_largest_panel_and_of_equal_ones_the_best() -> None:
    level = dict.fromkeys(FOUND, 0.5)
    assert main_panel(FOUND, level | {"dpo": 0.9}) == ["grpo", "gspo"]
    two = {name: FOUND[name] for name in ("dpo", "grpo")}
    assert main_panel(two, level | {"grpo": 0.6}) == ["grpo"]
    assert main_panel({}, {}) == []
