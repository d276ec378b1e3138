"""A run of the library goes on from its checkpoint, and only if nothing that decides its result has changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import posttrain as pt
from posttrain.errors import CheckpointError, Interrupted
from posttrain.training.checkpoint import Checkpoints
from posttrain.training.fingerprints import describe
from posttrain.training.history import History
from posttrain.training.own_checkpoints import OwnCheckpoints

SMALL = {"hidden_size": 16, "intermediate_size": 16, "layers": 1, "heads": 2, "kv_heads": 1}
ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "c"}]
PAIRS = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
Run = Callable[..., list[dict[str, float]]]


class OneStep(History):
    """Asks the run to stop after its first step."""

    def stop_requested(self) -> bool:
        return bool(self.steps)


def lengths(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def more(conversation: Any) -> list[dict[str, str]]:
    return [{"role": "user", "content": "more"}]


def run(algorithm: str, rows: Any, **given: Any) -> Run:
    """Return a function that trains for three steps; its arguments replace those given here."""

    def call(seed: int = 0, **changes: Any) -> list[dict[str, float]]:
        arguments = {"steps": 3, "learning_rate": 0.01, "batch_size": 1, **given, **changes}
        names = (arguments.pop("algorithm", algorithm), arguments.pop("rows", rows))
        return pt.train(pt.tiny(seed=seed, **SMALL), *names, **arguments)

    return call


SAMPLED = {"samples": 2, "max_new_tokens": 2}
SFT = run("sft", ROWS)
GRPO = run("grpo", ["a", "b"], reward=lengths, turns=pt.Turns(more, limit=2), **SAMPLED)
DISTILL = run("distill", ["a", "b"], **SAMPLED)
CHANGES: list[tuple[Run, dict[str, Any], list[tuple[dict[str, Any], str]]]] = [
    (SFT, {}, [
        ({"steps": 10}, "steps"), ({"seed": 1}, "model"), ({"learning_rate": 0.02}, "learning_rate"), ({"rows": ROWS[:1]}, "rows"),
        ({"algorithm": "dpo", "rows": PAIRS}, "algorithm, rows"),
    ]),
    (GRPO, {}, [
        ({"reward": lambda prompts, completions, **columns: [-float(len(text)) for text in completions]}, "reward"),
        ({"reward": {"lengths": lengths}}, "reward"), ({"turns": pt.Turns(lambda conversation: None, limit=2)}, "turns"),
        ({"turns": pt.Turns(more, limit=3)}, "sampling"), ({"seed": 1}, "model"),
    ]),
    (DISTILL, {"teacher": 5}, [({"teacher": 6}, "teacher"), ({"teacher_prompt": "{prompt}, so "}, "teacher_prompt")]),
]  # fmt: skip


@pytest.mark.parametrize(("trained", "given", "others"), CHANGES)
def test_a_checkpoint_is_refused_by_the_argument_that_differs(
    trained: Run, given: dict[str, Any], others: list[tuple[dict[str, Any], str]], tmp_path: Path
) -> None:
    def call(**changes: Any) -> list[dict[str, float]]:
        arguments = given | changes
        if "teacher" in arguments:
            arguments["teacher"] = pt.tiny(seed=arguments["teacher"], **SMALL)
        return trained(**arguments)

    with pytest.raises(Interrupted):
        call(checkpoints=Checkpoints(tmp_path), recorder=OneStep())
    for changes, name in others:
        with pytest.raises(CheckpointError, match=f"is of a run with other {name};"):
            call(checkpoints=Checkpoints(tmp_path), **changes)
    assert call(checkpoints=Checkpoints(tmp_path)) == call()[1:]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.int64(3), np.int64(4)), (np.float32(0.3), np.float32(0.9)), (np.arange(3), np.arange(1, 4)), (Decimal("1.5"), Decimal("2.5")),
        (torch.tensor([1.0]), torch.tensor([2.0])), (date(2024, 1, 1), date(2024, 1, 2)), ([b"a"], [b"b"]),
    ],
)  # fmt: skip
def test_values_that_json_does_not_have_are_compared_in_rows_and_in_settings_of_a_reward(
    one: Any, other: Any, tmp_path: Path
) -> None:
    OwnCheckpoints(Checkpoints(tmp_path), {"rows": [{"answer": one}]}).save(1, {})
    assert OwnCheckpoints(Checkpoints(tmp_path), {"rows": [{"answer": one}]}).latest() is not None
    with pytest.raises(CheckpointError, match="other rows"):
        OwnCheckpoints(Checkpoints(tmp_path), {"rows": [{"answer": other}]}).latest()
    assert describe(partial(lengths, target=one)) != describe(partial(lengths, target=other))


def test_numbers_of_numpy_do_not_enter_the_checkpoint(tmp_path: Path) -> None:
    numbers = {
        "steps": np.int64(3),
        "batch_size": np.int64(2),
        "samples": np.int64(2),
        "learning_rate": np.float32(0.01),
    }
    trained = run("grpo", ["a", "b", "c"], reward=lengths, max_new_tokens=np.int64(2), **numbers)
    with pytest.raises(Interrupted):
        trained(checkpoints=Checkpoints(tmp_path), recorder=OneStep())
    assert trained(checkpoints=Checkpoints(tmp_path)) == trained()[1:]


def test_scored_pairs_of_one_prompt_are_one_list_as_in_the_pipeline() -> None:
    pairs = [("b", "c", 3.0, 1.0), ("b", "d", 3.0, 2.0)]
    rows = [
        {"prompt": "a", "chosen": c, "rejected": r, "chosen_score": high, "rejected_score": low}
        for c, r, high, low in pairs
    ]
    first = run("grpo_pairs", rows)(steps=1)[0]
    assert first["tokens/trained"] == 3 * 3  # b, c and d, each of 3 tokens with its prompt and its end


def test_a_model_in_training_mode_is_no_other_model() -> None:
    model = pt.tiny(seed=0, **SMALL)
    model.lm.config.attention_dropout = 0.5
    for layer in model.lm.modules():
        if hasattr(layer, "attention_dropout"):
            layer.attention_dropout = 0.5
    model.lm.train()
    rows = [{"prompt": "abcdefgh", "completion": "i"}]
    dropped = pt.train(model, "sft", rows, steps=1, learning_rate=0.01, batch_size=1)
    assert dropped == run("sft", rows)(steps=1)


@dataclass(frozen=True)
class Near:
    target: int

    def reward(self, prompts: Any, completions: list[str]) -> list[float]:
        return [-abs(len(text) - self.target) for text in completions]


def enclosing(target: int) -> Any:
    return lambda prompts, completions: [float(len(text) == target) for text in completions]


def counting(target: int) -> Any:
    calls = target

    def count(prompts: Any, completions: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        return [1.0 for _ in completions]

    return count


@pytest.mark.parametrize(
    ("made", "differs"),
    [
        (lambda n: partial(lengths, target=n), True),
        (lambda n: Near(n).reward, True),
        (enclosing, True),
        (counting, False),
        (lambda n: lambda p, c, target=n: [float(target)], True),
        (lambda n: torch.nn.Linear(1, n), False),
    ],
)
def test_a_function_is_its_code_and_its_settings_but_not_its_counters(
    made: Callable[[int], Any], differs: bool
) -> None:
    assert describe(made(1)) == describe(made(1))
    assert (describe(made(1)) != describe(made(2))) == differs
