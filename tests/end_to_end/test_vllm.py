"""The align stage with its own real vLLM server: killed, resumed by DVC, and nothing left behind. `pytest -m vllm`."""

from __future__ import annotations

from collections.abc import Callable

from pipelines.runtime.journal import read
from tests.end_to_end.conftest import TINY, Clone
from tests.pipelines.conftest import wait_for
from tests.rollouts.real import PYTHON, QUICK, REAL, family, gone

pytestmark = REAL


def test_the_stage_starts_its_server_resumes_after_a_kill_and_leaves_none_behind(
    new_clone: Callable[[], Clone],
) -> None:
    clone = new_clone()
    # the reward model tells answers apart that are all wrong
    clone.configure(str(TINY), "model.tiny.hidden_size=64", "align.on_policy.rollouts.engine=vllm", "align.on_policy.steps=6",
                    "align.checkpoint.every_steps=1", "algorithms.grpo.rewards.rm=1.0")  # fmt: skip
    clone.repro("sft", "reward", POSTTRAIN_FOLLOWER="1")
    env = {"POSTTRAIN_VLLM_PYTHON": str(PYTHON), "POSTTRAIN_VLLM_ARGS": " ".join(QUICK), "POSTTRAIN_FOLLOWER": "1"}
    first = clone.start("pipelines.align", "--algorithm", "grpo", "--seed", "0", **env)
    runs = clone.root / ".posttrain" / "runs"
    wait_for(lambda: list(runs.glob("align-grpo-0-*/checkpoints/**/step-00000002")), 600)
    processes = family(first.pid)[1:]
    assert len(processes) >= 4
    first.kill()
    first.wait()
    wait_for(lambda: gone(processes))
    clone.repro("align@grpo-0", **env)
    journal = read(clone.root / "runs/align/grpo-0/journal.jsonl")
    steps = [record for record in journal if record["kind"] == "metrics"]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert all(record["values"]["mismatch/max"] < 1e-4 for record in steps)
    # it learnt something between, so these were other weights in every step
    assert all(record["values"]["grad_norm"] > 0 for record in steps)
