"""Functions in a process of their own: the same values, a limit that holds, and failures that name their rows."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.tokens import Tokens
from posttrain.errors import ConfigError, NotFiniteError, RewardError, RewardTimeoutError
from posttrain.rewards import worker as worker_module
from posttrain.rewards.sources import FunctionReward, RewardBatch
from posttrain.rewards.worker import Worker

Make = Callable[..., FunctionReward]


UNSCORED = pytest.approx([math.nan] * 3, nan_ok=True)
"""The source failed on the answers; None would say that it does not apply to them."""


def reward_batch(completions: Sequence[str], prompts: Sequence[Any] | None = None, **columns: list[Any]) -> RewardBatch:
    rows = len(completions)
    asked = list(prompts or [f"prompt {i}" for i in range(rows)])
    return RewardBatch(asked, list(completions), [Tokens((1,), (2,))] * rows, columns, [100 + i for i in range(rows)])


@pytest.fixture
def source() -> Iterator[Make]:
    """Sources whose processes are gone after the test."""
    workers: list[Worker] = []

    def make(function: str, seconds: float = 30.0, on_failure: Any = "stop", **arguments: Any) -> FunctionReward:
        workers.append(Worker(f"tests.rewards.behaving:{function}", seconds))
        return FunctionReward("judge", workers[-1], arguments, on_failure)

    yield make
    for worker in workers:
        worker.close()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def gone(pid: int, within: float = 5.0) -> bool:
    until = time.monotonic() + within
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not alive(pid)


def test_values_columns_and_arguments_arrive_and_prints_do_no_harm(source: Make) -> None:
    assert source("lengths", bonus=0.5).score(reward_batch(["abc", "", "é\n"])) == [3.5, None, 2.5]
    messages = [[{"role": "user", "content": "2+2="}], [{"role": "user", "content": "1+1="}]]
    assert source("seen").score(reward_batch(["2+2=4", "1+1=3"], messages, answer=[4, "2"])) == [1.0, 0.0]


def test_one_process_serves_all_calls_and_is_not_this_one(source: Make) -> None:
    reward = source("process_ids")
    pids = {pid for _ in range(3) for pid in reward.score(reward_batch(["x", "y"]))}
    assert len(pids) == 1
    assert pids != {float(os.getpid())}


def test_what_is_no_number_is_refused_from_there_too(source: Make) -> None:
    with pytest.raises(NotFiniteError, match="returned inf"):
        source("infinite").score(reward_batch(["x"]))
    with pytest.raises(RewardError, match="returned '1j'"):
        source("complex_number").score(reward_batch(["x"]))


def test_time_is_up_the_rows_are_named_and_nothing_stays_behind(source: Make, tmp_path: Path) -> None:
    reward = source("sleeper", 1.0, pid_file=str(tmp_path / "pids"))
    with pytest.raises(
        RewardTimeoutError, match=r"'judge' took too long on 2 of 2 answers \(rows 100, 101; .*'prompt 0'"
    ):
        reward.score(reward_batch(["fine", "slow"]))
    own, child = map(int, (tmp_path / "pids").read_text().split())
    assert gone(own)
    assert gone(child)


@pytest.mark.parametrize("function", ["sleeper", "spinner"])
def test_too_slow_is_missing_and_not_wrong_where_one_may_skip(
    source: Make, function: str, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = source(function, 0.5, "skip")
    assert reward.score(reward_batch(["slow", "x", "y"])) == UNSCORED
    assert reward.failures == {"timed_out": 3}
    assert "'judge' took too long on 3 of 3 answers" in capsys.readouterr().err
    if function == "sleeper":  # and the next batch finds a new process
        assert reward.score(reward_batch(["x"])) == [1.0]
        assert reward.failures == {"timed_out": 3}


def test_an_exception_costs_the_rows_that_raise_and_no_others(source: Make) -> None:
    batch = reward_batch(["a", "bad", "c", "bad", "e"])
    reward = source("picky", on_failure="skip")
    assert reward.score(batch) == pytest.approx([3.0, math.nan, 3.0, math.nan, 3.0], nan_ok=True)
    assert reward.failures == {"failed": 2}
    with pytest.raises(
        RewardError, match=r"failed on 2 of 5 answers \(rows 101, 103; .*'prompt 1': 'bad'\): KeyError"
    ) as caught:
        source("picky").score(batch)
    assert "raise KeyError" in caught.value.__notes__[0]
    assert "rewards.judge.on_failure: skip" in str(caught.value)


def test_a_failure_that_no_row_explains_is_one_of_all_rows(source: Make) -> None:
    reward = source("together", on_failure="skip")
    assert reward.score(reward_batch(["a", "b", "c"])) == UNSCORED
    assert reward.failures == {"failed": 3}


def test_a_process_that_dies_is_an_error_or_missing_rewards(source: Make) -> None:
    with pytest.raises(RewardError, match=r"failed on 2 of 2 answers .*its process ended, killed by SIGSEGV"):
        source("dying").score(reward_batch(["x", "die"]))
    reward = source("dying", on_failure="skip")
    assert reward.score(reward_batch(["x", "die"])) == pytest.approx([math.nan] * 2, nan_ok=True)
    assert reward.score(reward_batch(["x", "y"])) == [0.5, 0.5]
    assert reward.failures == {"failed": 2}


def test_what_cannot_be_imported_is_refused_before_anything_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="cannot import the reward function 'no_such_module:f'"):
        Worker("no_such_module:f", 1.0)
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(3600)\n")
    (tmp_path / "broken_import.py").write_text("raise RuntimeError('half\\n\\nwritten\\n')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"'broken_import:f': RuntimeError: half … written$") as broken:
        Worker("broken_import:f", 1.0)
    assert "half\n\nwritten\n" in "".join(broken.value.__notes__)
    monkeypatch.setattr(worker_module, "START_SECONDS", 0.5)
    with pytest.raises(ConfigError, match=r"'slow_to_import:f': no answer within 0\.5 seconds"):
        Worker("slow_to_import:f", 1.0)


SCRIPT = """
import sys
from posttrain.rewards.worker import Worker
worker = Worker("tests.rewards.behaving:sleeper", float(sys.argv[1]))
try:
    print(worker(["p"], ["slow"], {}, {"pid_file": sys.argv[2]}))
finally:
    print("leaving", flush=True)
"""


def test_the_process_that_asked_can_always_leave(root: Path, tmp_path: Path) -> None:
    """After a time-out it exits by itself; killed while it waits, it takes the hanging function with it."""
    env = os.environ | {"PYTHONPATH": str(root)}
    pids = tmp_path / "pids"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "1", str(pids)], env=env, cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stdout == "leaving\n"
    assert "RewardTimeoutError: no answer within 1 seconds" in done.stderr
    pids.unlink()
    waiting = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "3600", str(pids)], env=env, cwd=root, stdout=subprocess.DEVNULL
    )
    until = time.monotonic() + 120
    while not (pids.exists() and pids.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    waiting.kill()
    waiting.wait()
    assert gone(int(pids.read_text().split()[0]))
