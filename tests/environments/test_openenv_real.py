"""The environment that the package openenv brings along, behind its own server: `POSTTRAIN_OPENENV_PYTHON=…/python pytest -m slow`."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from posttrain.api import tiny
from posttrain.api_training import train
from posttrain.environments import openenv
from posttrain.environments.base import Conversation, environment
from posttrain.rewards.functions import find_function
from posttrain.rollouts.turns import Turns
from tests.pipelines.conftest import wait_for

PYTHON = os.environ.get("POSTTRAIN_OPENENV_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not Path(PYTHON).is_file(),
        reason="POSTTRAIN_OPENENV_PYTHON names no interpreter of an environment with the package openenv",
    ),
]
NAMES = {"__ENV_NAME__": "echo_env", "__ENV_CLASS_NAME__": "Echo", "__ENV_TITLE_NAME__": "Echo"}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Write the package's template for new environments, which echoes, and serve it."""
    log = tmp_path / "server.log"
    found = subprocess.run([PYTHON, "-c", "import openenv; print(openenv.__file__)"], capture_output=True, text=True)
    template = Path(found.stdout.strip()).parent / "cli" / "templates" / "openenv_env"
    for path in template.rglob("*.py"):
        relative, text = str(path.relative_to(template)), path.read_text(encoding="utf-8")
        for name, value in NAMES.items():
            relative, text = relative.replace(name, value), text.replace(name, value)
        place = tmp_path / "echo_env" / relative
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
    command = [PYTHON, "-m", "uvicorn", "echo_env.server.app:app", "--host", "127.0.0.1", "--port", "0"]
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=out)
    try:
        wait_for(lambda: "running on" in log.read_text() or process.poll() is not None, seconds=300)
        address = log.read_text().partition("running on ")[2].split()[0]
        openenv.environment_of.cache_clear()
        monkeypatch.setenv("POSTTRAIN_OPENENV_ECHO", address)
        yield
    finally:
        process.terminate()
        process.wait()


def test_turns_rewards_and_training_on_the_packages_own_environment(server: None) -> None:
    env = environment("openenv:echo")
    assert env.step is not None
    rows = env.rows("problems", 2, 0, observation="echoed_message")
    assert rows[0]["prompt"][0]["content"].endswith("\n\nEcho environment ready!")
    turns: list[dict[str, Any]] = []
    for number, said in enumerate(("hi", "hello you"), start=1):
        turns.append({"role": "assistant", "content": said})
        reply = env.step(Conversation((*rows[0]["prompt"], *turns), rows[0], number))
        assert reply == [{"role": "user", "content": said}]
        turns += reply
    # by the template: a tenth for each letter, at most 1
    score = find_function("openenv:echo")
    assert score([""], [""], answer=[""], entry=[rows[0]["entry"]], conversation=[turns]) == pytest.approx([0.2 + 0.9])
    model = tiny(seed=0, hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1)
    history = train(
        model, "grpo", rows, reward="openenv:echo", turns=Turns(env.step, limit=2), steps=1, learning_rate=1e-3,
        batch_size=2, samples=3, max_new_tokens=4,
    )  # fmt: skip
    assert history[0]["mismatch/max"] < 1e-3
    assert history[0]["reward/total/mean"] > 0
