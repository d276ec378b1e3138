"""Arguments of the environment for a vLLM server that a stage starts."""

from __future__ import annotations

import pytest

from pipelines.training.rollout_engine import SHARE, _server_arguments
from posttrain.errors import ConfigError


@pytest.mark.parametrize("given", [" 1.5", "=1.5", " 0", " 90%", "=-0.5", " nan", "=inf"])
def test_a_share_of_memory_that_is_none_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_VLLM_ARGS", f"--seed 1 {SHARE}{given}")
    share = given[1:]
    with pytest.raises(ConfigError, match=f"{SHARE} {share} is no share of the GPU's memory; write a number above 0"):
        _server_arguments()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", []),
        ("--seed 1 --x='a b'", ["--seed", "1", "--x=a b"]),
        (f"{SHARE} 0.4", [SHARE, "0.4"]),
        (f"{SHARE}=1", [f"{SHARE}=1"]),
    ],
)
def test_arguments_are_split_as_by_a_shell(given: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_VLLM_ARGS", given)
    assert _server_arguments() == expected


def test_an_open_quotation_mark_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_VLLM_ARGS", "'--seed 1")
    with pytest.raises(
        ConfigError, match=r"POSTTRAIN_VLLM_ARGS = .*cannot be split into arguments: No closing quotation"
    ):
        _server_arguments()
