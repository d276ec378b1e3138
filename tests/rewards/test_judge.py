"""A judge behind a URL: grades, rubrics, pairs in both orders; answers are kept, requests bounded and counted, wrong settings refused."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipelines.config.reward_arguments import check_arguments, judge_settings
from pipelines.config.schema import ComputeParams, RewardFunctionParams
from pipelines.training import reward_sources as sources
from pipelines.training.reward_sources import JudgeTokens, judges_used
from posttrain.api import tiny
from posttrain.api_training import train
from posttrain.data.tokens import Tokens
from posttrain.errors import ConfigError, RewardError, RewardTimeoutError
from posttrain.rewards.judge import Judge, JudgeSettings, opponents
from posttrain.rewards.judge_server import JudgeServer, server_of_environment
from posttrain.rewards.sources import FunctionReward, RewardBatch, RewardSource
from tests.rewards.judging import TestServer, answer_in, judge_server


def judge(server: TestServer, folder: Path | None = None, seconds: float = 60.0, **settings: Any) -> Judge:
    return Judge(JudgeSettings(model="m", **settings), seconds, JudgeServer(server.url, folder=folder))


def length_grade(question: str) -> str:
    return f"Grade: {len(answer_in(question))}"


def longer(question: str) -> str:
    """Prefer the longer answer, and A if both are as long: a judge with a preference for a position."""
    return "B" if len(answer_in(question, "answer B")) > len(answer_in(question, "answer A")) else "A"


def test_grades_become_rewards_from_0_to_1() -> None:
    with judge_server(length_grade) as server:
        rewards = judge(server, scale=5).reward(["p"] * 3, ["a", "abc", "abcde"])
    assert rewards == [0.0, 0.5, 1.0]
    assert server.asked[0]["temperature"] == 0
    assert {request["model"] for request in server.asked} == {"m"}


def test_a_rubric_is_the_weighted_share_of_criteria_that_hold() -> None:
    def reply(question: str) -> str:
        text = answer_in(question)
        return (
            "yes" if ("polite" in question and "please" in text) or ("short" in question and len(text) < 9) else "No."
        )

    criteria = {"it is polite": 3.0, "it is short": 1.0}
    with judge_server(reply) as server:
        rubric = judge(server, mode="rubric", criteria=criteria)
        rewards = rubric.reward(["p"] * 4, ["please", "please wait", "now", "not this time"])
        assert rubric.used()["questions"] == 8
    assert rewards == [1.0, 0.75, 0.25, 0.0]


def test_pairs_are_asked_in_both_orders_so_a_preference_for_a_position_cancels() -> None:
    with judge_server(longer) as server:
        pairs = judge(server, mode="pairs")
        # one prompt with three answers, in a ring: "a" meets "bb", "bb" meets "cc", "cc" meets "a"; one prompt with a single answer
        rewards = pairs(["p", "p", "p", "q"], ["a", "bb", "cc", "a"], {}, {}).values
        used = pairs.used()
    # "bb" and "cc" are as long: the judge says A in both orders, which is a tie
    assert rewards == [0.0, 0.5, 1.0, None]
    assert used["questions"] == 6
    assert used["order_changed"] == pytest.approx(1 / 3)
    assert opponents(["p", "p", "p", "q"], 5) == [[1, 2], [2, 0], [0, 1], []]


def test_answers_are_compared_with_the_text_of_a_column() -> None:
    with judge_server(longer) as server:
        against = judge(server, mode="pairs", against="answer")
        assert against.reward(["p", "p"], ["long one", "a"], answer=["short", "short"]) == [1.0, 0.0]
        with pytest.raises(RewardError, match="compares with the column 'answer', and the rows have gold"):
            against.reward(["p"], ["a"], gold=["b"])


def test_answers_are_kept_by_content_and_equal_questions_are_sent_once(tmp_path: Path) -> None:
    with judge_server(length_grade) as server:
        first = judge(server, tmp_path)
        assert first.reward(["p", "p"], ["ab", "ab"]) == [1 / 9, 1 / 9]
        assert len(server.asked) == 1
        used = first.used()
        again = judge(server, tmp_path)
        assert again.reward(["p"], ["ab"]) == [1 / 9]
        assert len(server.asked) == 1
        # counts of a run that repeats a batch are those of the first one, although it has paid nothing
        assert (
            again.used()
            == used
            == {
                "questions": 1.0,
                "prompt_tokens": float(len(server.asked[0]["messages"][0]["content"])),
                "completion_tokens": float(len("Grade: 2")),
            }
        )
        assert (first.server.paid["requests"], again.server.paid["requests"]) == (1, 0)
        (kept,) = tmp_path.rglob("*.json")
        judge(server, tmp_path, instruction="Shorter is better.").reward(["p"], ["ab"])
        assert len(server.asked) == 2
        kept.write_text('{"text": "Gra', encoding="utf-8")
        assert judge(server, tmp_path).reward(["p"], ["ab"]) == [1 / 9]
        assert len(server.asked) == 3
        assert json.loads(kept.read_text(encoding="utf-8"))["text"] == "Grade: 2"


def test_no_more_requests_than_allowed_run_at_the_same_time() -> None:
    together = threading.Barrier(3)

    def reply(question: str) -> str:
        together.wait(timeout=60)  # answers only if three requests are open at once
        return "7"

    with judge_server(reply) as server:
        asked = Judge(JudgeSettings("m"), 60.0, JudgeServer(server.url, concurrency=3, folder=None))
        assert asked.reward(["p"] * 9, [str(i) for i in range(9)]) == [pytest.approx(6 / 9)] * 9
    assert server.most == 3


def test_a_busy_server_is_asked_again_and_a_refusal_is_not() -> None:
    tries: list[str] = []

    def reply(question: str) -> str | int:
        tries.append(answer_in(question))
        return {"busy": 503 if tries.count("busy") < 3 else "9", "refused": 401, "broken": 500}[answer_in(question)]

    with judge_server(reply) as server:
        quick = JudgeServer(server.url, folder=None, waits_seconds=(0.01,) * 3)
        result = Judge(JudgeSettings("m"), 60.0, quick)(["p"] * 3, ["busy", "refused", "broken"], {}, {})
    assert result.values == [pytest.approx(8 / 9), None, None]
    assert "refused the request with status 401" in result.failures[1]
    assert "failed 4 times: status 500" in result.failures[2]
    assert (tries.count("busy"), tries.count("refused"), tries.count("broken")) == (3, 1, 4)


def test_a_batch_that_takes_too_long_is_a_time_out_of_the_reward() -> None:
    release = threading.Event()

    def reply(question: str) -> str:
        release.wait(60)
        return "5"

    with judge_server(reply) as server:
        slow = judge(server, seconds=0.3)
        with pytest.raises(RewardTimeoutError, match="did not answer within the time limit"):
            slow.reward(["p"], ["a"])
        source = FunctionReward("j", slow, on_failure="skip")
        batch = RewardBatch(["p"], ["a"], [Tokens((1,), (2,))], {})
        (value,) = source.score(batch)
        release.set()
    assert value is not None
    assert value != value  # NaN: failed, and no 0
    assert source.failures == {"timed_out": 1}


def test_an_answer_without_a_verdict_is_a_failure_of_that_answer_only(capsys: pytest.CaptureFixture[str]) -> None:
    with judge_server(lambda question: "I cannot say." if answer_in(question) == "odd" else "10") as server:
        source = FunctionReward("j", judge(server), on_failure="skip")
        values = source.score(RewardBatch(["p"] * 2, ["odd", "fine"], [Tokens((1,), (2,))] * 2, {}, [4, 5]))
    assert values[1] == 1.0
    assert values[0] != values[0]
    assert "reward 'j' failed on 1 of 2 answers (rows 4" in capsys.readouterr().err


def test_a_redirect_is_not_followed_because_it_would_carry_the_key() -> None:
    with judge_server(lambda question: 302) as server:
        result = Judge(JudgeSettings("m"), 60.0, JudgeServer(server.url, "sk-key", folder=None))(["p"], ["a"], {}, {})
    assert "refused the request with status 302" in result.failures[0]
    assert server.headers[0]["Authorization"] == "Bearer sk-key"


def test_params_build_the_judge_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("POSTTRAIN_JUDGE_URL", raising=False)
    section = RewardFunctionParams(function="judge", arguments={"model": "m", "scale": 3})
    compute = ComputeParams(micro_batch_tokens=64, bf16=False, threads=1)

    def build() -> list[RewardSource]:
        return sources.reward_sources({"j": section}, ["j"], torch.device("cpu"), compute, {})

    with pytest.raises(ConfigError, match="set POSTTRAIN_JUDGE_URL"):
        build()
    with judge_server(length_grade) as server:
        monkeypatch.setenv("POSTTRAIN_JUDGE_URL", server.url)
        (source,) = build()
        assert source.score(RewardBatch(["p"], ["ab"], [Tokens((1,), (2,))], {})) == [0.5]
        source.used()  # each step's counts start at 0 again; the line counts the whole process
        (line,) = judges_used([source])
        noted: list[tuple[str, int, int]] = []
        tokens = JudgeTokens(SimpleNamespace(judged=lambda *each: noted.append(each)), [source])  # type: ignore[arg-type]
        tokens.record()
        tokens.record()
        assert source.score(RewardBatch(["p"] * 2, ["ab", "abc"], [Tokens((1,), (2,))] * 2, {})) == [0.5, 1.0]
        tokens.record()
    sent = len(server.asked[0]["messages"][0]["content"])
    assert line == f"judge j: 1 questions, 1 of them sent to {server.url}: {sent + 8} tokens"
    assert [model for model, _, _ in noted] == ["m", "m"]
    assert [asked for _, asked, _ in noted] == [sent, len(server.asked[1]["messages"][0]["content"])], (
        "a kept answer costs nothing"
    )
    assert len(list(Path(".posttrain/judges").rglob("*.json"))) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "model: missing"),
        ({"model": "m", "mod": "grade"}, "mod: the reward function 'judge' has no such argument; did you mean 'mode'"),
        ({"model": "m", "mode": "rank"}, "mode = 'rank': must be one of grade, rubric, pairs"),
        ({"model": "m", "mode": "rubric"}, "criteria: mode rubric needs sentences with weights above 0"),
        ({"model": "m", "criteria": {"a": 1}}, "criteria: only mode rubric reads them"),
        ({"model": "m", "against": "answer"}, "against: only mode pairs reads it"),
        ({"model": "m", "scale": 1}, "scale = 1: must be at least 2"),
        ({"model": "m", "scale": "ten"}, "scale = 'ten': must be a whole number"),
        ({"model": "m", "mode": "rubric", "criteria": {"a": "b"}}, "must be sentences with weights"),
        ({"model": 3}, "model = 3: must be text"),
    ],
)
def test_arguments_are_checked_before_anything_runs(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_arguments("judge", arguments)


def test_settings_of_the_environment_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_JUDGE_URL", "127.0.0.1:8000")
    with pytest.raises(ConfigError, match="is not the address of a server"):
        server_of_environment(None)
    monkeypatch.setenv("POSTTRAIN_JUDGE_URL", "http://127.0.0.1:8000/v1/")
    assert server_of_environment(None).url == "http://127.0.0.1:8000/v1"
    for name, value in (("CONCURRENCY", "0"), ("CONCURRENCY", "many")):
        monkeypatch.setenv(f"POSTTRAIN_JUDGE_{name}", value)
        with pytest.raises(ConfigError, match=f"POSTTRAIN_JUDGE_{name} = '{value}'"):
            server_of_environment(None)
        monkeypatch.delenv(f"POSTTRAIN_JUDGE_{name}")
    monkeypatch.setenv("POSTTRAIN_JUDGE_PRICES", "0.5,2.0")
    with pytest.raises(ConfigError, match=r"POSTTRAIN_JUDGE_PRICES is not read any more: .* prices\.yaml"):
        server_of_environment(None)


def test_grpo_trains_on_a_judge_and_logs_what_it_asked() -> None:
    settings = judge_settings({"model": "m", "mode": "pairs"})
    model = tiny(seed=0, hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1)
    with judge_server(longer) as server:
        asked = Judge(settings, 60.0, JudgeServer(server.url, folder=None))
        history = train(
            model, "grpo", ["a", "b"], reward=asked.reward,
            steps=1, learning_rate=1e-3, batch_size=2, samples=4, max_new_tokens=3,
        )  # fmt: skip
    assert len(server.asked) > 0
    assert 0.0 <= history[0]["reward/total/mean"] <= 1.0
