"""Environments of OpenEnv servers, through a server that speaks its protocol: sessions, replies, rewards, refusals."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from websockets.sync.server import ServerConnection, serve

from posttrain.api import tiny
from posttrain.api_training import train
from posttrain.environments import openenv
from posttrain.environments.base import Conversation, environment, import_path
from posttrain.errors import ConfigError, RolloutError
from posttrain.rewards.functions import find_function
from posttrain.rollouts.turns import Turns


class Game:
    """A hidden number between 0 and 9, seed modulo 10: hints until it is guessed, a tenth off for each wrong guess."""

    noisy = False

    def __init__(self) -> None:
        self.sessions = self.steps = 0

    def handle(self, socket: ServerConnection) -> None:
        self.sessions += 1
        assert socket.request is not None
        assert socket.request.path == "/ws"
        hidden = 0
        for text in socket:
            asked = json.loads(text)
            if asked["type"] == "reset":
                hidden = asked["data"]["seed"] % 10
                answer = {"observation": {"hint": "Guess."}, "reward": None, "done": False}
            elif "message" not in asked["data"]:
                socket.send(json.dumps({"type": "error", "data": {"message": "message: missing"}}))
                continue
            else:
                self.steps += 1
                answer = self.judged(asked["data"]["message"], hidden)
            socket.send(json.dumps({"type": "observation", "data": answer}))

    def judged(self, said: str, hidden: int) -> dict[str, Any]:
        right = said.strip() == str(hidden)
        hint = "right" if right else f"no {self.steps}" if self.noisy else "no"
        return {"observation": {"hint": hint}, "reward": 1.0 if right else -0.1, "done": right}


@pytest.fixture
def game(monkeypatch: pytest.MonkeyPatch) -> Iterator[Game]:
    made = Game()
    openenv.environment_of.cache_clear()
    with serve(made.handle, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        port = server.socket.getsockname()[1]
        monkeypatch.setenv("POSTTRAIN_OPENENV_GAME", f"http://127.0.0.1:{port}/")
        yield made
        server.shutdown()
    thread.join()


def play(row: dict[str, Any], *said: str) -> tuple[list[Any], list[dict[str, Any]]]:
    """Return the replies to each turn, and the turns after the prompt."""
    step = environment("openenv:game").step
    assert step is not None
    turns: list[dict[str, Any]] = []
    replies = []
    for number, text in enumerate(said, start=1):
        turns.append({"role": "assistant", "content": text})
        reply = step(Conversation((*row["prompt"], *turns), row, number))
        replies.append(reply and reply[0]["content"])
        turns += reply or []
    return replies, turns


def test_rows_are_seeds_and_their_first_observation(game: Game) -> None:
    assert import_path("openenv:game") == "posttrain.environments.openenv:game"
    found = environment("openenv:game")
    tables = {kind: found.rows(kind, 4, 0, observation="hint") for kind in ("problems", "evaluation")}
    assert tables["problems"] == found.rows("problems", 4, 0, observation="hint")
    prompts = [row["prompt"][0]["content"] for table in tables.values() for row in table]
    assert len(set(prompts)) == 8
    row = tables["problems"][0]
    assert row["prompt"][0]["content"] == f"Episode {row['answer']}.\n\nGuess."
    with pytest.raises(ConfigError, match="an environment has no demonstrations"):
        found.rows("sft", 2, 0)


def test_replies_repeat_the_turns_in_a_new_session_and_rewards_are_summed(game: Game) -> None:
    row = environment("openenv:game").rows("problems", 1, 0, observation="hint")[0]
    hidden = str(int(row["answer"]) % 10)
    wrong = str((int(hidden) + 1) % 10)
    sessions = game.sessions
    replies, turns = play(row, wrong, wrong, hidden)
    assert replies == ["no", "no", None]
    assert game.sessions == sessions + 3
    score = find_function("openenv:game")
    columns = {"entry": [row["entry"]] * 2, "conversation": [turns, turns[:3]]}
    assert score([""] * 2, [""] * 2, answer=[""] * 2, **columns) == pytest.approx([0.8, -0.2])
    assert score([""], [hidden], answer=[""], entry=[row["entry"]]) == [1.0]
    with pytest.raises(ConfigError, match="needs the column 'entry'"):
        score([""], [hidden], answer=[""])


def test_servers_that_differ_refuse_or_are_gone_are_named(game: Game, monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment("openenv:game")
    row = found.rows("problems", 1, 0, observation="hint")[0]
    wrong = str((int(row["answer"]) + 1) % 10)
    monkeypatch.setattr(Game, "noisy", True)
    with pytest.raises(RolloutError, match="is not deterministic: after the same seed and turns it answered 'no"):
        play(row, wrong, wrong)
    other = found.rows("problems", 1, 0, field="text")[0]
    with pytest.raises(RolloutError, match=r"refused step with .*message: missing"):
        play(other, wrong)
    with pytest.raises(ConfigError, match="'clue' is no field of the observation, which has hint"):
        found.rows("problems", 1, 0, observation="clue")
    monkeypatch.setenv("POSTTRAIN_OPENENV_GAME", "http://127.0.0.1:1")
    with pytest.raises(RolloutError, match="does not answer"):
        play(row, wrong)
    openenv.environment_of.cache_clear()
    monkeypatch.delenv("POSTTRAIN_OPENENV_GAME")
    with pytest.raises(ConfigError, match="set POSTTRAIN_OPENENV_GAME to the address"):
        environment("openenv:game")


def test_grpo_trains_on_turns_of_a_server(game: Game) -> None:
    found = environment("openenv:game")
    assert found.step is not None
    model = tiny(seed=0, hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1)
    history = train(
        model, "grpo", found.rows("problems", 2, 0, observation="hint"), reward="openenv:game",
        turns=Turns(found.step, limit=2), steps=1, learning_rate=1e-3, batch_size=2, samples=3, max_new_tokens=2,
    )  # fmt: skip
    assert history[0]["mismatch/max"] < 1e-3
    assert game.steps > 0
