"""The OpenAI-compatible server over real tiny models: answers are the model's own, streamed ones the same, none is lost at a change."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import posttrain as pt
from pipelines.serving.batching import Batcher
from pipelines.serving.models import Models, Served, Watch, load_champion
from pipelines.serving.server import VERSION_HEADER, application
from pipelines.tracking.content import folder_md5
from posttrain.rollouts.engine import Request, SamplingSettings
from posttrain.rollouts.native import NativeEngine
from tests import coroutines
from tests.workspace import dvc

SIZES = {"hidden_size": 16, "intermediate_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "max_length": 64}
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
TOKEN, PORT = "secret", 8000
HEADERS = {"Authorization": f"Bearer {TOKEN}"}


def tiny(seed: int) -> pt.Model:
    model = pt.tiny(seed=seed, **SIZES)
    model.encoder.tokenizer.chat_template = TEMPLATE
    return model


@pytest.fixture
def models() -> Iterator[Models]:
    made = Models({"champion": Served("champion", "aaaa.dir", "3", Batcher(tiny(0)))})
    yield made
    made.close()


def ask(models: Models, *requests: dict[str, Any], path: str = "completions") -> list[httpx.Response]:
    """Send requests at the same time and return their answers in order."""

    async def gather() -> list[httpx.Response]:
        transport = httpx.ASGITransport(application(models, PORT, TOKEN, 12))
        base = f"http://127.0.0.1:{PORT}"
        async with httpx.AsyncClient(transport=transport, base_url=base, headers=HEADERS, timeout=120) as client:
            sent = [client.post(f"/v1/{path}", json={"model": "champion"} | each) for each in requests]
            return list(await asyncio.gather(*sent))

    return coroutines.run(gather())


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    *lines, last = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert last == "[DONE]"
    return [json.loads(line) for line in lines]


def test_an_answer_is_the_models_own_and_names_its_version(models: Models) -> None:
    (answer,) = ask(models, {"prompt": ["1+1=", "2+2="], "temperature": 0.0, "max_tokens": 6})
    own = tiny(0).generate(["1+1=", "2+2="], max_new_tokens=6)
    body = answer.json()
    assert [each["text"] for each in body["choices"]] == own
    assert body["system_fingerprint"] == answer.headers[VERSION_HEADER] == "version 3, md5 aaaa.dir"
    assert body["usage"]["prompt_tokens"] == 8
    assert body["usage"]["total_tokens"] == 8 + body["usage"]["completion_tokens"]
    (sampled,) = ask(models, {"prompt": "1+1=", "seed": 5, "n": 2})
    expected = tiny(0).generate(["1+1=", "1+1="], max_new_tokens=12, temperature=1.0, seed=5)
    assert [each["text"] for each in sampled.json()["choices"]] == expected


def test_a_streamed_chat_says_the_same_as_a_whole_one(models: Models) -> None:
    asked = {"messages": [{"role": "user", "content": "hi"}], "seed": 1, "max_completion_tokens": 20}
    streaming = asked | {"stream": True, "stream_options": {"include_usage": True}}
    whole, streamed = ask(models, asked, streaming, path="chat/completions")
    choice = whole.json()["choices"][0]
    *pieces, counted = events(streamed)
    deltas = [each["choices"][0]["delta"] for each in pieces]
    assert len(deltas) > 2
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == choice["message"]["content"]
    assert pieces[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    assert counted["usage"] == whole.json()["usage"]
    assert {each["system_fingerprint"] for each in pieces} == {"version 3, md5 aaaa.dir"}


def test_stop_texts_cut_whole_and_streamed_answers_at_the_same_place(models: Models) -> None:
    asked = {"prompt": "1+1=", "seed": 7, "max_tokens": 30}
    text = ask(models, asked)[0].json()["choices"][0]["text"]
    stop = text[10:12]
    whole, streamed = ask(models, asked | {"stop": stop}, asked | {"stop": [stop], "stream": True})
    choice = whole.json()["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"
    assert "".join(each["choices"][0]["text"] for each in events(streamed)) == choice["text"]


@pytest.mark.parametrize(
    ("given", "status", "words"),
    [
        ({"model": "champoin"}, 404, "'champoin' is not served here; did you mean 'champion'?"),
        ({"top_p": 0.5}, 400, "top_p = '0.5' is not implemented here; leave it out"),
        ({"prompt": "x" * 64}, 400, "the prompt has 64 tokens, and the context 64"),
        ({"prompt": [100000]}, 400, "an id that the model's vocabulary does not have"),
    ],
)
def test_an_error_says_what_to_do(models: Models, given: dict[str, Any], status: int, words: str) -> None:
    (answer,) = ask(models, {"prompt": "1"} | given)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]
    assert ask(models, {"prompt": "1", "top_p": 1, "user": "me"})[0].status_code == 200


def test_no_request_is_lost_while_the_model_changes(models: Models) -> None:
    other = Served("champion", "bbbb.dir", "4", Batcher(tiny(1)))
    change = asyncio.Event()

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(application(models, PORT, TOKEN, 12))
        base = f"http://127.0.0.1:{PORT}"
        async with httpx.AsyncClient(transport=transport, base_url=base, headers=HEADERS, timeout=120) as client:

            async def one(i: int) -> httpx.Response:
                if i >= 100:
                    await change.wait()
                if i == 99:
                    models.replace(other)
                    change.set()
                body = {"model": "champion", "prompt": f"{i}=", "seed": i, "max_tokens": 8}
                return await client.post("/v1/completions", json=body)

            return list(await asyncio.gather(*(one(i) for i in range(200))))

    answers = coroutines.run(run())
    assert [answer.status_code for answer in answers] == [200] * 200
    named = {answer.headers[VERSION_HEADER] for answer in answers}
    assert named == {"version 3, md5 aaaa.dir", "version 4, md5 bbbb.dir"}
    weights = {"version 3, md5 aaaa.dir": tiny(0), "version 4, md5 bbbb.dir": tiny(1)}
    for i in (0, 98, 99, 150, 199):
        model = weights[answers[i].headers[VERSION_HEADER]]
        (own,) = NativeEngine(model.lm, model.encoder.ends).sample(
            [Request(tuple(model.encoder.prompt(f"{i}=")), ((i, 0),))], SamplingSettings(8, 1.0)
        )
        assert answers[i].json()["choices"][0]["text"] == model.encoder.text(own[0].tokens)


def test_drawn_tokens_are_reported_as_they_are_returned() -> None:
    model = tiny(0)
    seen: dict[int, list[int]] = {}
    requests = [
        Request((5, 6), ((1,), (2,))),
        Request((7,), ((3,),)),
        Request((9, 9, 9), tuple((i,) for i in range(4, 12))),
    ]
    found = NativeEngine(model.lm, model.encoder.ends, max_rows=4).sample(
        requests, SamplingSettings(20, 1.0), lambda answer, token: seen.setdefault(answer, []).append(token)
    )
    completions = [completion for answers in found for completion in answers]
    assert [tuple(seen[i]) for i in range(len(completions))] == [completion.tokens for completion in completions]


def test_a_stranger_is_refused(models: Models) -> None:
    async def statuses() -> list[int]:
        transport = httpx.ASGITransport(application(models, PORT, TOKEN, 12))
        async with httpx.AsyncClient(transport=transport, base_url=f"http://127.0.0.1:{PORT}") as client:
            foreign = {"Origin": "http://evil.example"}, {"Host": "evil.example"}
            tried = [{}, *(HEADERS | each for each in foreign), HEADERS]
            return [(await client.get("/v1/models", headers=each)).status_code for each in tried] + [
                (await client.get("/health")).status_code
            ]

    assert coroutines.run(statuses()) == [401, 403, 403, 200, 200]


def test_the_hash_of_a_folder_is_dvcs_own_and_a_half_changed_one_is_not_loaded(workspace: Path) -> None:
    folder = workspace / "models" / "champion"
    tiny(0).save(folder)
    dvc(workspace, "add", "-q", "models/champion")
    shutil.move(workspace / "models" / "champion.dvc", workspace / "champion.dvc")
    md5 = folder_md5(folder)
    assert f"md5: {md5}\n" in (workspace / "champion.dvc").read_text()
    served = load_champion(workspace, {md5: "5"}.__getitem__)
    assert served is not None
    assert served.fingerprint == f"version 5, md5 {md5}"
    models = Models({"champion": served})
    (folder / "README.md").write_text("half")
    assert load_champion(workspace, str) is None

    (workspace / "champion.dvc").write_text((workspace / "champion.dvc").read_text().replace(md5, folder_md5(folder)))
    Watch(workspace, models, lambda _: "6")._look()
    assert models.get("champion").version == "6"
    assert models.get("champion") is not served
    models.close()


def test_a_judge_asks_this_server_with_its_key(tmp_path: Path) -> None:
    from threading import Thread

    import uvicorn

    from posttrain.network import free_port
    from posttrain.rewards.judge import Judge, JudgeSettings
    from posttrain.rewards.judge_server import JudgeServer

    wide = pt.tiny(seed=0, **(SIZES | {"max_length": 1024}))
    wide.encoder.tokenizer.chat_template = TEMPLATE
    made = Models({"champion": Served("champion", "aaaa.dir", "3", Batcher(wide))})
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(application(made, port, TOKEN, 12), port=port, log_level="error"))
    thread = Thread(target=server.run, daemon=True)
    thread.start()
    settings = JudgeSettings("champion", max_tokens=4)
    try:
        asked, stranger = (
            Judge(settings, 120.0, JudgeServer(f"http://127.0.0.1:{port}/v1", key, folder=folder))(
                ["1+1="], ["2"], {}, {}
            )
            for key, folder in ((TOKEN, tmp_path), ("wrong", None))
        )
    finally:
        server.should_exit = True
        thread.join()
        made.close()
    # an untrained model says no grade, and what it says is kept and named
    (kept,) = tmp_path.rglob("*.json")
    answer = json.loads(kept.read_text(encoding="utf-8"))
    assert answer["completion_tokens"] == 4
    assert asked.failures == {0: f"the judge's answer {answer['text'][:80]!r} holds no verdict"}
    assert "refused the request with status 401" in stranger.failures[0]
