"""How often people preferred a model: shares by hand, judges and repetitions left out, and the gate's check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.gate_schema import PeopleParams
from pipelines.labelling.win_rates import win_rate, win_rates
from pipelines.promotion.decision import Check, Decision, not_judged
from pipelines.promotion.page import page
from pipelines.promotion.people import preferred, with_people
from posttrain.errors import DataError
from posttrain.evaluation.statistics import Interval, wilson

NEW, OLD, THIRD = ("grpo-0", "bb.dir"), ("champion", "aa.dir"), ("sft", "cc.dir")


def judgement(
    prompt: str, value: Any, *models: tuple[str, str], ask: str = "pairs", who: str = "Ann", task: str = "1"
) -> dict[str, Any]:
    answers = [{"text": f"{i}", "model": name, "md5": md5} for i, (name, md5) in enumerate(models)]
    return {"annotator": who, "task": task, "value": value, "prompt": prompt, "answers": answers, "ask": ask}


def session(project: Path, name: str, *records: dict[str, Any]) -> None:
    folder = project / "labels" / name
    folder.mkdir(parents=True)
    (folder / "judgements.jsonl").write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8"
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    session(
        tmp_path, "monday",
        judgement("a\u2028", 0, NEW, OLD), judgement("a\u2028", 1, NEW, OLD, who="Bob"),
        judgement("b", 1, OLD, NEW), judgement("c", "tie", OLD, NEW),
        judgement("d", "skip", OLD, NEW), judgement("e", 0, NEW, OLD, who="judge/big"),
        judgement("f", 0, NEW, OLD, task="9:again"), judgement("g", 0, NEW, NEW),
    )  # fmt: skip
    session(tmp_path, "tuesday", judgement("h", [3, 9, 9], OLD, NEW, THIRD, ask="scores"),
            judgement("i", [2, 0, 1], OLD, NEW, THIRD, ask="ranking"))  # fmt: skip
    return tmp_path


def test_each_prompt_counts_once_with_the_mean_of_its_judgements(project: Path) -> None:
    found = win_rate(project, "bb.dir", "aa.dir")
    assert found is not None
    # a: 1 and 0; b: 1; c: a tie; h: 9 against 3; i: ranked below
    wins = 0.5 + 1 + 0.5 + 1 + 0
    assert (found.share, found.prompts, found.judgements) == (wins / 5, 5, 6)
    assert (found.low, found.high) == pytest.approx(wilson(wins, 5))
    assert found.words.startswith("People preferred grpo-0 to champion in 60 % of the comparisons (95 % interval 2")
    turned = win_rate(project, "aa.dir", "bb.dir")
    assert turned is not None
    assert (turned.share, turned.low, turned.high) == pytest.approx((0.4, 1 - found.high, 1 - found.low))
    assert win_rate(project, "bb.dir", "dd.dir") is None
    # aa, bb and cc in every pair
    assert [(rate.model[1], rate.against[1]) for rate in win_rates(project)] == [
        ("aa.dir", "bb.dir"), ("aa.dir", "cc.dir"), ("bb.dir", "cc.dir"),
    ]  # fmt: skip


def test_the_gate_asks_people_only_if_it_is_told_to(project: Path) -> None:
    (project / "champion.dvc").write_text("outs:\n- {md5: aa.dir, size: 1, path: models/champion}\n")
    outs = "    outs:\n    - {path: models/align/grpo-0, md5: bb.dir, size: 1}\n"
    (project / "dvc.lock").write_text(f"schema: '2.0'\nstages:\n  align@grpo-0:\n    cmd: x\n{outs}")
    found = preferred(project, "grpo-0", "models/champion")
    assert found is not None
    assert preferred(project, "dpo-0", "models/champion") is None
    passed = Decision("grpo-0", "the champion", Interval(1, 1, 1, 9, 0, ""), (Check("loss", 1, 0, True, "fine"),))
    assert with_people(passed, found, None) == passed
    assert with_people(passed, found, PeopleParams(win_rate=0.2, min_prompts=5)).promote
    few = with_people(passed, found, PeopleParams(win_rate=0.2, min_prompts=6))
    assert "on 6 prompts or more; `posttrain label grpo-0 champion` asks people" in few.refusals[0]
    assert not with_people(passed, found, PeopleParams(win_rate=0.5, min_prompts=5)).promote
    unasked = with_people(passed, None, PeopleParams())
    assert unasked.refusals[0].startswith("nobody has compared grpo-0 with the champion (gate.people asks for it)")
    html = page(passed, [passed], people=[found])
    assert "What people preferred" in html
    assert found.words in html
    assert "What people preferred" not in page(passed, [passed])
    assert not not_judged("a", "b", "c").promote


def test_a_damaged_file_is_named(project: Path) -> None:
    (project / "labels/monday/judgements.jsonl").write_text('{"value": 1}\n')
    with pytest.raises(
        DataError, match=r"judgements\.jsonl is damaged .*`posttrain label --summary monday` writes it anew"
    ):
        win_rates(project)
