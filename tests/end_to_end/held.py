"""Settings of an alignment whose training waits after its fourth step until a file exists, so that a test surely sees it at work."""

SETTINGS = (
    "align.on_policy.steps=10", "align.on_policy.measure_kl_every=0", "align.checkpoint.every_steps=2",
    "rewards.held={function: held:held}", "limits.reward_seconds.held=100000", "algorithms.grpo.rewards.held=0.0",
)  # fmt: skip
HELD = """
import os, time
from pathlib import Path

calls = 0


def held(prompts, completions, **columns):
    \"\"\"Wait from the fifth step on until the machine's file exists: a stage cannot end before the test has seen it at work.\"\"\"
    global calls
    calls += 1
    while calls > 4 and "HELD_UNTIL" in os.environ and not Path(os.environ["HELD_UNTIL"]).exists():
        time.sleep(0.05)
    return [0.0] * len(completions)
"""
"""Text of the module held.py of a project with these settings; HELD_UNTIL names the file."""
QUICK = ("checkpoint_seconds: 30", "checkpoint_seconds: 1")
"""Replacement in infra/workers.yaml, so that a checkpoint is soon in the remote."""
