"""Environments of the package verifiers. Skipped without the extra, except for the words that say so."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from posttrain.api import tiny
from posttrain.api_training import train
from posttrain.environments.base import Conversation, Environment, environment, import_path
from posttrain.environments.parts import KINDS
from posttrain.environments.verifiers import opening
from posttrain.errors import ConfigError, RolloutError
from posttrain.rewards import require_available
from posttrain.rewards.functions import find_function
from posttrain.rollouts.turns import Turns

installed = pytest.mark.skipif(find_spec("verifiers") is None, reason="the extra 'verifiers' is not installed")
absent = pytest.mark.skipif(find_spec("verifiers") is not None, reason="the extra 'verifiers' is installed")
games = pytest.mark.skipif(find_spec("textarena") is None, reason="the packages textarena and nltk are not installed")

SINGLE = """
import verifiers.v1 as vf

class SumData(vf.TaskData):
    answer: str

class SumTask(vf.Task[SumData]):
    @vf.reward(weight=2.0)
    async def exact(self, trace, task) -> float:
        return float(trace.last_reply == task.answer)

    @vf.reward(weight=0.5)
    async def short(self, trace) -> float:
        return float(len(trace.last_reply) < 4)

class SumConfig(vf.TasksetConfig):
    largest: int = 60

class Sums(vf.Taskset[SumTask, SumConfig]):
    def load(self):
        for a in range(self.config.largest):
            for b in range(2):
                yield SumTask(SumData(prompt=f"{a}+{b}=", answer=str(a + b)), self.config.task)

__all__ = ["Sums"]
"""
TURNS = """
import random
import verifiers.v1 as vf

class Count(vf.Task[vf.TaskData]):
    pass

class Counting(vf.Taskset[Count]):
    INFINITE = True

    def load(self):
        number = 0
        while True:
            yield Count(vf.TaskData(name=str(number), description=str(number)), self.config.task)
            number += 1

class Config(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig()
    PLAYERS

class Env(vf.Env[Config]):
    async def run(self, task, agents):
        goal, said = int(task.data.description) % 3, 0
        async with agents.player.interaction(task) as interaction:
            segment = await interaction.turn(f"{task.data.name}: count to {goal}")
            while not segment.terminated and said < goal:
                said += 1
                segment = await interaction.turn(f"said {segment.last_reply}, draw {random.random():.6f}{NOISE}")
        interaction.trace.record_reward("turns", said, 1.0)

__all__ = ["Counting", "Env"]
"""


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Write a module of tasks and return its environment."""
    made: list[str] = []

    def write(name: str, code: str) -> Environment:
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        made.append(name)
        return environment(f"verifiers:{name}")

    monkeypatch.syspath_prepend(str(tmp_path))
    yield write
    for name in made:
        sys.modules.pop(name, None)


def counting(name: str, players: str = "", noise: str = "''") -> str:
    return TURNS.replace("PLAYERS", players or "pass").replace("{NOISE}", "{" + noise + "}")


def test_a_source_is_the_import_path_of_its_wrapper() -> None:
    assert import_path("verifiers:textarena") == "posttrain.environments.verifiers:textarena"
    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "Guess."}]
    assert opening(asked, None) == asked
    assert [message["content"] for message in opening(asked, 4)] == ["s", "Task 4.\n\nGuess."]


@absent
def test_without_the_extra_every_way_in_says_what_to_type() -> None:
    name = "verifiers:textarena"
    for used in (lambda: environment(name), lambda: require_available(name), lambda: find_function(name)):
        with pytest.raises(ConfigError, match=r"pip install -c constraints.txt '.\[verifiers\]'"):
            used()


@installed
def test_rows_are_the_tasks_and_the_reward_is_the_weighted_sum_of_theirs(written: Any) -> None:
    found = written("sums_of_test", SINGLE)
    tables = {kind: found.rows(kind, 6, 0) for kind in ("sft", "problems", "evaluation")}
    prompts = [json.dumps(row["prompt"]) for rows in tables.values() for row in rows]
    assert len(set(prompts)) == 18
    assert tables["problems"] == found.rows("problems", 6, 0) != found.rows("problems", 6, 1)
    asked = tables["problems"][0]
    first, second = asked["prompt"][0]["content"].rstrip("=").split("+")
    gold = str(int(first) + int(second))
    assert (asked["prompt"][0]["role"], asked["answer"]) == ("user", gold)
    demonstrated = tables["sft"][0]
    first, second = demonstrated["prompt"][0]["content"].rstrip("=").split("+")
    assert demonstrated["completion"] == str(int(first) + int(second))
    # exact weighs 2 and short .5
    rewards = found.reward([""] * 3, [gold, "1000", "99"], answer=[gold] * 3, entry=[asked["entry"]] * 3)
    assert rewards == [2.5, 0.0, 0.5]
    turn = Conversation((*asked["prompt"], {"role": "assistant", "content": gold}), {"entry": asked["entry"]}, 1)
    assert found.step is not None
    assert found.step(turn) is None


@installed
def test_a_reply_replays_the_turns_before_it_and_leaves_the_generators_alone(written: Any) -> None:
    import random

    found = written("counting_of_test", counting("counting_of_test"))
    rows = found.rows("problems", 8, 0)
    row = next(row for row in rows if row["prompt"][-1]["content"].endswith("count to 2"))
    random.seed(5)
    state = random.getstate()
    assert found.step is not None
    messages = list(row["prompt"])
    replies = []
    for turn, said in enumerate(("one", "two", "three"), start=1):
        messages.append({"role": "assistant", "content": said})
        reply = found.step(Conversation(tuple(messages), row, turn))
        replies.append(reply and reply[0]["content"].partition(", ")[0])
        messages += reply or []
    assert replies == ["said one", "said two", None]
    assert random.getstate() == state
    turns = messages[len(row["prompt"]) :]
    score = find_function("verifiers:counting_of_test")
    said = [turns, turns[:3], turns[:1]]
    # a conversation that was cut off is judged as it is: the next turn is refused, and what was counted stays
    assert score([""] * 3, [""] * 3, answer=[""] * 3, entry=[row["entry"]] * 3, conversation=said) == [2.0, 2.0, 1.0]
    with pytest.raises(ConfigError, match="needs the column 'entry'"):
        score([""], [""], answer=[""])


@installed
def test_environments_that_do_not_fit_are_refused_in_words(written: Any) -> None:
    with pytest.raises(ConfigError, match="cannot load this taskset"):
        environment("verifiers:no_such_module")
    two = written("two_players", counting("two_players", "judge: vf.AgentConfig = vf.AgentConfig()"))
    with pytest.raises(ConfigError, match=r"it has 2 agents \(player, judge\), and one is trained here"):
        two.rows("problems", 2, 0)
    random_one = written("noisy", counting("noisy", noise="__import__('os').urandom(8).hex()"))
    row = next(r for r in random_one.rows("problems", 8, 0) if r["prompt"][-1]["content"].endswith("to 2"))
    turns = [
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "said one"},
        {"role": "assistant", "content": "two"},
    ]
    with pytest.raises(RolloutError, match="is not deterministic"):
        random_one.step(Conversation((*row["prompt"], *turns), row, 2))
    single = written("sums_again", SINGLE)
    with pytest.raises(ConfigError, match="no rejected answers"):
        single.rows("preferences", 2, 0)
    with pytest.raises(ConfigError, match="largst"):
        single.rows("problems", 2, 0, largst=3)
    with pytest.raises(ConfigError, match="has few tasks with different prompts"):
        single.rows("evaluation", 50, 0, largest=4)
    runtime = SINGLE.replace("exact(self, trace, task)", "exact(self, trace, task, runtime)")
    with pytest.raises(ConfigError, match="its tasks prepare or read a runtime"):
        written("with_runtime", runtime).rows("problems", 2, 0)


@installed
def test_grpo_trains_on_turns_of_an_environment_of_verifiers(written: Any) -> None:
    found = written("counting_again", counting("counting_again"))
    model = tiny(seed=0, hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1)
    assert found.step is not None
    history = train(
        model, "grpo", found.rows("problems", 4, 0), reward="verifiers:counting_again", turns=Turns(found.step, limit=3),
        steps=1, learning_rate=1e-3, batch_size=2, samples=4, max_new_tokens=2,
    )  # fmt: skip
    assert history[0]["mismatch/max"] < 1e-3


@installed
@games
def test_hangman_of_textarena_is_won_letter_by_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = tmp_path / "corpora" / "words"
    corpus.mkdir(parents=True)
    for name in ("en", "en-basic"):
        (corpus / name).write_text("table\n", encoding="utf-8")
    (corpus / "README").write_text("", encoding="utf-8")
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)
    found = environment("verifiers:textarena")
    rows = {kind: found.rows(kind, 2, 0, game="Hangman-v0", numbered=True) for kind in KINDS[2:]}
    assert len({row["prompt"][-1]["content"] for table in rows.values() for row in table}) == 4
    row = rows["problems"][0]
    messages = list(row["prompt"])
    assert found.step is not None
    for turn, letter in enumerate("TABLE", start=1):
        messages.append({"role": "assistant", "content": f"[{letter}]"})
        reply = found.step(Conversation(tuple(messages), row, turn))
        messages += reply or []
    assert reply is None
    assert "T   A   B   L" in messages[-2]["content"]
    turns = messages[len(row["prompt"]) :]
    wrong = [{"role": "assistant", "content": "[chair]"}]
    asked = {"answer": [row["answer"]] * 2, "entry": [row["entry"]] * 2, "conversation": [turns, wrong]}
    assert found.reward([""] * 2, [""] * 2, **asked) == [1.0, 0.0]
