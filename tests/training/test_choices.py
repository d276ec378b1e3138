"""Choices that a run made by the clock or by free memory are repeated when it is resumed, so that its bytes are the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from posttrain import choices
from posttrain.models import head_trial, logprobs
from posttrain.models.head_tiles import SINGLE_OPERATORS, TileWork
from posttrain.rollouts import budget
from tests.models.test_head_trial import OWN, SLOW_OPERATORS, late, offer
from tests.training.runs import Killed, Memory, start
from tests.training.test_resume import same_weights

LATE = TileWork(*(late(function) for function in OWN))


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(head_trial, "TOKENS", 24)
    monkeypatch.setattr(head_trial, "REPEATS", 1)
    new_process(monkeypatch)
    yield
    head_trial._choice.cache_clear()


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget all choices of this process."""
    monkeypatch.setattr(choices, "_MADE", {})
    head_trial._choice.cache_clear()


def clock(monkeypatch: pytest.MonkeyPatch, kernels_win: bool) -> None:
    """Offer kernels that are faster or slower than single operators; their numbers differ in the last bits."""
    offer(monkeypatch, OWN if kernels_win else LATE)
    monkeypatch.setattr(head_trial, "SINGLE_OPERATORS", SLOW_OPERATORS if kernels_win else SINGLE_OPERATORS)


def test_a_resumed_run_computes_the_head_as_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "TILE_WORDS", 49)
    clock(monkeypatch, kernels_win=False)
    other = start("sft", tmp_path / "single operators", Memory())
    new_process(monkeypatch)
    clock(monkeypatch, kernels_win=True)
    straight = start("sft", tmp_path / "kernels", Memory())
    new_process(monkeypatch)
    recorder = Memory(kill_at=3)
    with pytest.raises(Killed):
        start("sft", tmp_path / "killed", recorder)
    new_process(monkeypatch)
    clock(monkeypatch, kernels_win=False)
    recorder.kill_at = None
    resumed = start("sft", tmp_path / "killed", recorder)
    same_weights(straight, resumed)
    weights, others = (torch.cat([p.flatten() for p in each.parameters()]) for each in (straight, other))
    assert not torch.equal(weights, others)
    assert choices.made() == {"cpu: kernels for tiles of 259 words in torch.float32": 1}


def test_a_kernel_that_was_chosen_and_is_wrong_now_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, OWN._replace(scan=lambda *_: None))
    choices.follow({"cpu: kernels for tiles of 50 words in torch.float32": 1})
    taken, name = head_trial.choice(torch.device("cpu"), torch.float32, 4, 50)
    assert taken == SINGLE_OPERATORS
    assert "cannot be used here" in name


def test_a_choice_that_is_replaced_is_derived_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 has computed with its own choice when it hears of rank 0's."""
    clock(monkeypatch, kernels_win=True)
    given = torch.device("cpu"), torch.float32, 4, 50
    assert " ms a tile" in head_trial.choice(*given).name
    choices.follow(choices.made())
    assert " ms a tile" in head_trial.choice(*given).name
    choices.follow(dict.fromkeys(choices.made(), 0))
    assert head_trial.choice(*given).name == "single operators (as chosen by the clock when this run began)"


def test_the_sampler_stores_as_many_tokens_as_before_while_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """70 % of 2000 bytes are 1400 tokens of a byte, 0b101 << 8 of them with three leading bits."""
    free = [2000]
    module = SimpleNamespace(
        mem_get_info=lambda _: (free[0], 4000), memory_reserved=lambda _: 0, memory_allocated=lambda _: 0
    )
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    found = []
    for free[0] in (2000, 4000, 1600, 1599, 2000):
        found.append(budget.max_tokens(torch.device("meta"), 1))
    # 1280 are 80 % of 1600; 70 % of 1599 are 1119, so 0b100 << 8
    assert found == [1280, 1280, 1280, 1024, 1024]
    # numbers of a different size, and a different device, have their own
    assert budget.max_tokens(torch.device("meta"), 2) == 640
    assert choices.made() == {"meta: stored tokens of 1 bytes": 1024, "meta: stored tokens of 2 bytes": 640}
