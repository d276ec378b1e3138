"""Two processes that share the tokens of each row have the loss, metrics and gradient of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from posttrain.errors import ConfigError
from posttrain.models.context import context_size
from posttrain.settings import CONTEXT_PARALLEL
from tests.reliability.workspace import Warm
from tests.training.context_parallel import NAMES, lengths, results
from tests.training.test_two_processes import together


def test_two_processes_that_share_rows_agree_with_one(root: Path, tmp_path: Path, warm: Warm) -> None:
    together(root, {CONTEXT_PARALLEL: "2"}, "tests.training.context_parallel", str(tmp_path / "two.pt"), warm=warm)
    two, one = torch.load(tmp_path / "two.pt", weights_only=False), results(Accelerator())
    for name in NAMES:
        (metrics, gradient), (single, expected) = two[name], one[name]
        assert metrics == pytest.approx(single, abs=1e-9, rel=1e-9), name
        assert gradient.keys() == expected.keys()
        for parameter, value in expected.items():
            assert torch.allclose(gradient[parameter], value, atol=1e-10), (name, parameter)
    assert all(
        torch.allclose(ours, theirs, atol=1e-12) for ours, theirs in zip(two["sinks"], one["sinks"], strict=True)
    )
    # 6 + 2 x 5 tokens, half of them on each process
    assert (two["lengths"], lengths(Accelerator())) == ([8], [16])
    assert "POSTTRAIN_CONTEXT_PARALLEL = 2: the tokens of a mixture of experts cannot be shared" in two["refusal"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("3", "3 must be a divisor of the 4 processes"),
        *((n, f"'{n}': must be the number of processes") for n in ("0", "two")),
    ],
)
def test_a_number_that_divides_no_processes_is_refused(given: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONTEXT_PARALLEL, given)
    with pytest.raises(ConfigError, match=f"POSTTRAIN_CONTEXT_PARALLEL = {words}"):
        context_size(4)
