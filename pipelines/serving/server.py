"""The OpenAI-compatible server. Every answer names the version of the weights in `system_fingerprint` and a header."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from pipelines.runtime.web import Guard, refusal_words
from pipelines.serving.batching import Job
from pipelines.serving.models import Models, Served
from pipelines.serving.observation import Observer
from pipelines.serving.protocol import (
    CHAT,
    TEXT,
    ChatWanted,
    TextWanted,
    Wanted,
    choice,
    cut,
    piece,
    settled,
    usage,
)
from pipelines.serving.refusals import Refusal, read
from posttrain.errors import ConfigError, DataError, ModelError, PosttrainError
from posttrain.rollouts.engine import Completion, SamplingSettings
from posttrain.rollouts.engine import Request as Prompt

VERSION_HEADER = "X-Model-Version"
MOST_ANSWERS = 1024
"""Answers of one request. They wait in memory together."""


@dataclass
class Call:
    """One prompt of a request: which model answers it, and the tokens that were drawn so far."""

    wanted: Wanted
    kind: str
    served: Served
    job: Job
    tokens: asyncio.Queue[tuple[int, int] | None]
    name: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")

    def head(self, kind: str) -> dict[str, Any]:
        """Return the fields that every answer and every piece has."""
        return {
            "id": self.name,
            "object": kind,
            "created": int(time.time()),
            "model": self.wanted.model,
            "system_fingerprint": self.served.fingerprint,
        }

    def finished(self, completion: Completion) -> tuple[str, str]:
        """Return an answer's text, and why it ended."""
        return _finished(self.served, self.wanted, completion)


def application(
    models: Models, port: int, token: str, default_tokens: int, observer: Observer | None = None
) -> ASGIApp:
    """Return the application. `default_tokens` limits answers to requests without max_tokens."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(PosttrainError)
    def refuse(_: Request, error: PosttrainError) -> JSONResponse:
        # the models are loaded: what a configuration, row or template cannot do is the request's fault
        status = 400 if isinstance(error, ConfigError | DataError | ModelError) else 500
        return Refusal(str(error), status=status).response()

    @app.exception_handler(HTTPException)
    def refuse_path(_: Request, error: HTTPException) -> JSONResponse:
        return Refusal(str(error.detail), status=error.status_code).response()

    @app.exception_handler(Exception)
    def fail(_: Request, error: Exception) -> JSONResponse:
        return Refusal(f"the server failed with {type(error).__name__}; its terminal shows more", status=500).response()

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"status": "ok", "models": {served.name: served.fingerprint for served in models.all()}}

    @app.get("/v1/models")
    def listed() -> dict[str, Any]:
        data = [
            {"id": served.name, "object": "model", "owned_by": "posttrain", "version": served.fingerprint}
            for served in models.all()
        ]
        return {"object": "list", "data": data}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        wanted = read(ChatWanted, await request.body())
        if isinstance(wanted, Refusal):
            return wanted.response()
        limit = wanted.max_completion_tokens or wanted.max_tokens or default_tokens
        messages = [{"role": message.role, "content": message.content} for message in wanted.messages]
        return await _answer(models, observer, wanted, CHAT, [messages], limit)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Any:
        wanted = read(TextWanted, await request.body())
        if isinstance(wanted, Refusal):
            return wanted.response()
        return await _answer(models, observer, wanted, TEXT, wanted.prompts, wanted.max_tokens or default_tokens)

    def refused(status: int) -> bytes:
        return Refusal(
            refusal_words(status), code="invalid_api_key" if status == 401 else None, status=status
        ).encoded()

    return Guard(app, port, token, ("/health",), refused)


def _refusal(models: Models, wanted: Wanted, prompts: Sequence[Any]) -> Refusal | None:
    """Return the refusal of a request that cannot be answered, whatever its prompts say."""
    if found := wanted.refusal():
        return found
    if not models.has(wanted.model):
        return Refusal(models.missing(wanted.model), "model", "model_not_found", 404)
    if not prompts:
        return Refusal("prompt is an empty list; give at least one prompt", "prompt")
    if len(prompts) * wanted.n > MOST_ANSWERS:
        message = (
            f"{len(prompts)} prompts with n = {wanted.n}: a request has at most {MOST_ANSWERS} answers; send several"
        )
        return Refusal(message, "prompt")
    if wanted.stream and len(prompts) > 1:
        message = "stream = True with several prompts is not implemented here; send one request per prompt"
        return Refusal(message, "stream")
    return None


async def _answer(
    models: Models, observer: Observer | None, wanted: Wanted, kind: str, prompts: Sequence[Any], limit: int
) -> Any:
    """Answer all prompts of one request, as a whole or streamed."""
    if found := _refusal(models, wanted, prompts):
        return found.response()
    seed = secrets.randbits(31) if wanted.seed is None else wanted.seed
    calls = [
        _submit(models, wanted, kind, prompt, tuple((seed, place * wanted.n + i) for i in range(wanted.n)), limit)
        for place, prompt in enumerate(prompts)
    ]
    if observer is not None:
        for call, prompt in zip(calls, prompts, strict=True):
            _watch(observer, call, prompt, limit)
    headers = {VERSION_HEADER: calls[0].served.fingerprint}
    if wanted.stream:
        return StreamingResponse(_pieces(calls[0]), media_type="text/event-stream", headers=headers)
    drawn = [await asyncio.wrap_future(call.job.done) for call in calls]
    answers = [(call, completion) for call, completions in zip(calls, drawn, strict=True) for completion in completions]
    choices = [choice(kind, i, *call.finished(completion)) for i, (call, completion) in enumerate(answers)]
    counted = usage(sum(len(call.job.request.prompt) for call in calls), sum(len(each.tokens) for _, each in answers))
    return JSONResponse(calls[0].head(kind) | {"choices": choices, "usage": counted}, headers=headers)


def _submit(
    models: Models, wanted: Wanted, kind: str, prompt: Any, seeds: tuple[tuple[int, ...], ...], limit: int
) -> Call:
    """Give a prompt to the model. Raises ConfigError if it does not fit, DataError if the model is not served."""
    loop, tokens = asyncio.get_running_loop(), asyncio.Queue[tuple[int, int] | None]()

    def report(answer: int, token: int) -> None:
        loop.call_soon_threadsafe(tokens.put_nowait, (answer, token))

    def make(served: Served) -> Job:
        ids, room = _fitting(served, kind, prompt)
        settings = SamplingSettings(min(limit, room), wanted.temperature)
        return Job(Prompt(ids, seeds), settings, report if wanted.stream else None)

    served, job = models.submit(wanted.model, make)
    job.done.add_done_callback(lambda _: loop.call_soon_threadsafe(tokens.put_nowait, None))
    return Call(wanted, kind, served, job, tokens)


def _watch(observer: Observer, call: Call, prompt: Any, limit: int) -> None:
    """Let the observer log the answers to a prompt, and ask its shadow the same with the same seeds."""

    def ask(shadow: Served) -> Job:
        ids, room = _fitting(shadow, call.kind, prompt)
        return Job(Prompt(ids, call.job.request.seeds), SamplingSettings(min(limit, room), call.wanted.temperature))

    is_ids = call.kind == TEXT and isinstance(prompt, list)
    shown = call.served.batcher.model.encoder.text(prompt) if is_ids else prompt
    observer.watch(call.name, call.served, call.job, shown, lambda s, c: _finished(s, call.wanted, c), ask)


def _finished(served: Served, wanted: Wanted, completion: Completion) -> tuple[str, str]:
    """Return an answer's text, and why it ended."""
    text, stopped = cut(served.batcher.model.encoder.text(completion.tokens), wanted.stops)
    return text, "stop" if completion.finished or stopped else "length"


def _fitting(served: Served, kind: str, prompt: Any) -> tuple[tuple[int, ...], int]:
    """Return the prompt's ids, and how many tokens of an answer fit the model's context."""
    encoder = served.batcher.model.encoder
    if kind == CHAT and not encoder.tokenizer.chat_template:
        raise ConfigError(f"{served.name} has no chat template, so it answers at /v1/completions only")
    vocabulary: int = served.batcher.model.lm.get_input_embeddings().weight.shape[0]  # type: ignore[index, assignment]
    ids = tuple(prompt) if isinstance(prompt, list) and kind == TEXT else tuple(encoder.prompt(prompt))
    if not ids or not all(0 <= each < vocabulary for each in ids):
        raise ConfigError("the prompt is empty, or has an id that the model's vocabulary does not have")
    if len(ids) >= encoder.max_length:
        raise ConfigError(f"the prompt has {len(ids)} tokens, and the context {encoder.max_length}; shorten it")
    return ids, encoder.max_length - len(ids)


async def _pieces(call: Call) -> AsyncIterator[str]:
    """Yield the events of a streamed answer. A sampler that reports no tokens gives each answer as one piece."""
    kind = f"{call.kind}.chunk" if call.kind == CHAT else call.kind
    drawn: list[list[int]] = [[] for _ in call.job.request.seeds]
    sent = [""] * len(drawn)
    started = [False] * len(drawn)
    text_of = call.served.batcher.model.encoder.text

    def event(answer: int, text: str, reason: str | None) -> str:
        made = piece(call.kind, answer, text[len(sent[answer]) :], reason, not started[answer])
        sent[answer], started[answer] = text, True
        return _event(call.head(kind) | {"choices": [made]})

    while (found := await call.tokens.get()) is not None:
        answer, token = found
        drawn[answer].append(token)
        whole, stopped = cut(text_of(drawn[answer]), call.wanted.stops)
        ready = whole if stopped else settled(whole, call.wanted.stops)
        if len(ready) > len(sent[answer]):
            yield event(answer, ready, None)
    error = call.job.done.exception()
    if error is not None:
        yield _event(Refusal(str(error), status=500).body())
        return
    completions = call.job.done.result()
    for answer, completion in enumerate(completions):
        yield event(answer, *call.finished(completion))
    if call.wanted.stream_options and call.wanted.stream_options.include_usage:
        counted = usage(len(call.job.request.prompt), sum(len(each.tokens) for each in completions))
        yield _event(call.head(kind) | {"choices": [], "usage": counted})
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
