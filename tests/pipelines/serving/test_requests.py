"""Whatever a body holds, the answer has status 200, or one of 4xx in the form of OpenAI's errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.serving.batching import Batcher
from pipelines.serving.models import Models, Served
from pipelines.serving.server import application
from tests import coroutines
from tests.pipelines.serving.test_server import HEADERS, PORT, TOKEN, tiny

PATHS: dict[str, dict[str, Any]] = {
    "completions": {"prompt": "1+"},
    "chat/completions": {"messages": [{"role": "user", "content": "1+"}]},
}
BASE: dict[str, Any] = {"model": "champion", "max_tokens": 2}
LONE = "\ud800"
ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=2**62, max_value=2**80)
    | st.floats()
    | st.sampled_from(["", "5", "true", LONE, "a" + LONE, "\x00", "champion", 1e-38, 1e-3, 1e308, -0.0, 10**400])
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
FIELDS = (
    *("model", "max_tokens", "max_completion_tokens", "temperature", "seed", "n", "stop", "stream", "stream_options"),
    *("top_p", "logprobs", "logit_bias", "tools", "response_format", "user", "prompt", "messages", "role", "content"),
    *("include_usage", "name", LONE),
)
MESSAGES = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "name", "tool_calls"]), ODD, max_size=4), max_size=2
)
GIVEN = st.fixed_dictionaries(
    {},
    optional={"messages": MESSAGES, "stream_options": st.dictionaries(st.sampled_from(FIELDS), ODD, max_size=2)},
)


@pytest.fixture(scope="module")
def models() -> Iterator[Models]:
    made = Models({"champion": Served("champion", "aaaa.dir", "3", Batcher(tiny(0)))})
    yield made
    made.close()


def post(models: Models, path: str, body: bytes, headers: dict[str, str] = HEADERS) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(application(models, PORT, TOKEN, 2), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://127.0.0.1:{PORT}", timeout=120) as client:
            return await client.post(f"/v1/{path}", content=body, headers=headers)

    return coroutines.run(send())


def refused(answer: httpx.Response) -> dict[str, Any]:
    """Return the error of a refused request, after checking its form."""
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text)
    assert answer.json().keys() == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    return error


@pytest.mark.parametrize("path", PATHS)
@given(given=GIVEN, odd=st.dictionaries(st.sampled_from(FIELDS), ODD, max_size=2))
@settings(max_examples=100, deadline=None)
def test_every_object_is_answered_or_refused(
    models: Models, path: str, given: dict[str, Any], odd: dict[str, Any]
) -> None:
    answer = post(models, path, json.dumps(BASE | PATHS[path] | given | odd).encode())
    if answer.status_code == 200:
        assert '"error"' not in answer.text
    else:
        refused(answer)


@given(body=st.binary(max_size=40) | ODD.map(lambda tree: json.dumps(tree).encode()))
@settings(max_examples=60, deadline=None)
def test_every_other_body_is_refused(models: Models, body: bytes) -> None:
    refused(post(models, "completions", body))


@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        ({"temperature": float("nan")}, "temperature", "temperature = nan is no number of JSON"),
        ({"temperature": float("inf")}, "temperature", "temperature = inf is no number of JSON"),
        ({"temperature": 1e-38}, "temperature", "must be 0, which is greedy, or at least 0.001, and is 1e-38"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0, and is -1"),
        ({"temperature": "1"}, "temperature", "should be a valid number"),
        ({"max_tokens": True}, "max_tokens", "should be a valid integer, and is true"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"n": 65}, "n", "less than or equal to 64"),
        ({"n": 64, "prompt": ["1"] * 17}, "prompt", "17 prompts with n = 64: a request has at most 1024 answers"),
        ({"seed": 2**63}, "seed", "less than 9223372036854775808"),
        ({"stop": ["x"] * 17}, "stop", "at most 16 items"),
        ({"stop": [1]}, "stop[0]", "should be a valid string"),
        ({"stream": 1}, "stream", "should be a valid boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "has an effect only with stream = true"),
        ({"stream": True, "stream_options": {"extra": 1}}, "stream_options", "Extra inputs are not permitted"),
        ({"top_p": 0.5}, "top_p", "top_p = '0.5' is not implemented here; leave it out"),
        ({"top_p": float("nan")}, "top_p", "no number of JSON"),
        ({"prompt": "a" + LONE}, "prompt", "half of a surrogate pair"),
        ({"prompt": []}, "prompt", "is an empty list"),
        ({"prompt": [True]}, "prompt[0]", "should be a valid"),
        ({"prompt": ["1", "2"], "stream": True}, "stream", "send one request per prompt"),
        ({"model": None}, "model", "should be a valid string"),
    ],
)
def test_a_refusal_names_the_field(models: Models, given: dict[str, Any], param: str, words: str) -> None:
    error = refused(post(models, "completions", json.dumps(BASE | {"prompt": "1+"} | given).encode()))
    assert error["param"] == param
    assert words in error["message"]


def test_messages_are_refused_by_their_place(models: Models) -> None:
    for message, param in (
        ({"role": "user", "content": LONE}, "messages"),
        ({"role": "user"}, "messages[1].content"),
        ({"role": "user", "content": ["a"]}, "messages[1].content"),
        ({"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}, "messages[1].tool_calls"),
    ):
        body = BASE | {"messages": [{"role": "user", "content": "hi", "name": None}, message]}
        assert refused(post(models, "chat/completions", json.dumps(body).encode()))["param"] == param


def test_unknown_models_paths_and_strangers_get_the_same_form(models: Models) -> None:
    body = json.dumps(BASE | {"prompt": "1", "model": "champoin"}).encode()
    error = refused(post(models, "completions", body))
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "did you mean 'champion'?" in error["message"]
    assert refused(post(models, "embeddings", b"{}"))["message"] == "Not Found"
    assert refused(post(models, "completions", body, {}))["code"] == "invalid_api_key"


def test_the_smallest_temperature_answers_as_greedy_sampling_and_ids_may_be_nested(models: Models) -> None:
    asked = BASE | {"prompt": [[49, 43], [50, 43]], "max_tokens": 8, "seed": 1}
    cold, greedy = (post(models, "completions", json.dumps(asked | {"temperature": t}).encode()) for t in (0.001, 0))
    texts = [choice["text"] for choice in greedy.json()["choices"]]
    assert len(texts) == 2
    assert [choice["text"] for choice in cold.json()["choices"]] == texts
