"""Conversations of several turns: the model answers, the environment replies, and so on, on top of any engine.

Sampled ids are kept as they were sampled. Only the text between two turns of the model is tokenised: the template's marks and the
environment's messages. Those tokens have weight 0, so they carry no loss and count in no denominator.

Example:
    An environment that asks once more and then ends. Every token ends a turn here, so the model samples two tokens:

    >>> from posttrain.models.tiny import TinyShape, tiny_model
    >>> from posttrain.rollouts.native import NativeEngine
    >>> model, tokenizer = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1), seed=0)
    >>> again = lambda conversation: [{"role": "user", "content": "Once more: "}] if conversation.turn == 1 else None
    >>> encoder = TextEncoder(tokenizer, max_length=256)
    >>> engine = TurnEngine(NativeEngine(model, range(300)), encoder, Turns(again, limit=3))
    >>> request = Request(tuple(encoder.prompt("Say: ")), ((0,),), asked="Say: ")
    >>> [[answer]] = engine.sample([request], SamplingSettings(max_new_tokens=4, temperature=1.0))
    >>> [message["role"] for message in answer.messages]
    ['assistant', 'user', 'assistant']
    >>> answer.sampled, len(answer.tokens) - answer.sampled == len("Once more: ")
    (2, True)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from posttrain.api_arguments import checked, require_function
from posttrain.data.conversations import as_messages
from posttrain.data.limits import bounded
from posttrain.data.tokens import TextEncoder, row_tools
from posttrain.environments.base import Conversation, Messages, Step
from posttrain.errors import ConfigError, DataError, RolloutError
from posttrain.rollouts.engine import Completion, Engine, Request, SamplingSettings
from posttrain.text import one_line, shortened

OnError = Literal["stop", "end", "tell"]
REPLYING = ("user", "tool", "system")
"""Roles of an environment's messages."""
_MARK = "\ue000\ue001\ue000"
"""Stands for the model's turn when the template is asked what follows it; no text contains it."""


@dataclass(frozen=True)
class Turns:
    """An environment's `step`, and the policies of its conversations.

    Attributes:
        limit: most turns of the model. The conversation then ends without a reply, and is judged as it is.
        on_error: what happens if `step` raises or takes too long. stop: the run ends, naming the row; end: the conversation ends and is
            judged as it is; tell: the model reads the error as the user's message and goes on.
        seconds: time limit of one `step`.
    """

    step: Step
    limit: int
    on_error: OnError = "stop"
    seconds: float = 10.0

    def __post_init__(self) -> None:
        require_function("Turns", "step", self.step, "an environment's step: f(conversation) -> messages or None")
        checked("Turns", limit=self.limit, seconds=self.seconds)
        if self.on_error not in get_args(OnError):
            raise ConfigError(f"Turns: on_error = {self.on_error!r}; it is one of {', '.join(get_args(OnError))}")


class TurnEngine:
    """An engine whose completions are whole conversations: turn after turn, all unfinished ones together."""

    def __init__(self, engine: Engine, encoder: TextEncoder, turns: Turns) -> None:
        self.engine, self.encoder, self.turns = engine, encoder, turns

    def sample(self, requests: Sequence[Request], settings: SamplingSettings) -> list[list[Completion]]:
        """Return one conversation per request and seed. The first turn is that of the engine; later ones have other seeds.

        Raises:
            RolloutError: `step` failed, and the policy is to stop.
            DataError: the chat template does not show what follows the model's turn.
        """
        # an engine in this process keeps keys and values, so that a turn computes only what is new; servers cache prefixes themselves
        keeping = getattr(self.engine, "keeping", nullcontext)
        with keeping():
            return self._conversations(requests, settings)

    def _conversations(self, requests: Sequence[Request], settings: SamplingSettings) -> list[list[Completion]]:
        # processes that share the model's weights sample together until none has a conversation left
        goes_on: Callable[[int], bool] = getattr(self.engine, "any_running", bool)
        first = self.engine.sample(requests, settings)
        groups = [[_Unfinished(request, seed) for seed in request.seeds] for request in requests]
        running = [one for group in groups for one in group]
        answers = [completion for group in first for completion in group]
        for turn in range(1, self.turns.limit + 1):
            pairs = zip(running, answers, strict=True)
            running = [one for one, answer in pairs if self._goes_on(one, answer, turn, settings)]
            if not goes_on(len(running)):
                break
            asked = [Request(one.ids, ((*one.seed, turn),), known=one.known) for one in running]
            answers = [completion for (completion,) in self.engine.sample(asked, settings)]
        return [[one.completion() for one in group] for group in groups]

    def _goes_on(self, one: _Unfinished, answer: Completion, turn: int, settings: SamplingSettings) -> bool:
        """Add the model's turn and the environment's reply. Return False at the end of the conversation."""
        one.add(answer.tokens, answer.logprobs, 1.0)
        one.messages.append({"role": "assistant", "content": self.encoder.text(answer.tokens)})
        one.finished, one.known = answer.finished, len(one.ids)
        if not answer.finished or turn == self.turns.limit:
            return False
        reply = self._reply(one, turn)
        if not reply:
            return False
        between = reply_ids(self.encoder, one.request, one.messages, reply)
        if len(one.ids) + len(between) + settings.max_new_tokens > self.encoder.max_length:
            one.finished = False
            return False
        one.add(between, (0.0,) * len(between), 0.0)
        one.messages += reply
        return True

    def _reply(self, one: _Unfinished, turn: int) -> list[Mapping[str, Any]]:
        # copies: what `step` writes into them would be lost when a run continues
        messages, columns = copy.deepcopy(
            ([*as_messages(one.request.asked, "user"), *one.messages], one.request.columns)
        )
        place = f"after turn {turn} of the prompt {str(one.request.asked)[-80:]!r}"
        try:
            with bounded(self.turns.seconds):
                reply = self.turns.step(Conversation(tuple(messages), columns, turn))
        except (Exception, SystemExit) as error:  # a user's environment may raise anything; the policy decides
            reason = f"{type(error).__name__}: {error}"
            if self.turns.on_error == "stop":
                raise RolloutError(
                    f"the environment's step failed {place} ({one_line(reason)}). Correct it, or set turns.on_error to `end` or `tell`"
                ) from error
            return [] if self.turns.on_error == "end" else [{"role": "user", "content": f"error: {reason}"}]
        return checked_reply(reply, place)


@dataclass
class _Unfinished:
    """One conversation while it is sampled; `ids` are prompt and response, of which `known` end with the model's newest turn."""

    request: Request
    seed: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    messages: list[Mapping[str, Any]] = field(default_factory=list)
    finished: bool = False
    known: int = 0

    @property
    def ids(self) -> tuple[int, ...]:
        return (*self.request.prompt, *self.tokens)

    def add(self, tokens: Sequence[int], logprobs: Sequence[float], weight: float) -> None:
        self.tokens += tokens
        self.logprobs += logprobs
        self.weights += [weight] * len(tokens)

    def completion(self) -> Completion:
        own = tuple(self.weights)
        return Completion(tuple(self.tokens), tuple(self.logprobs), self.finished, own, tuple(self.messages))


def checked_reply(reply: Any, place: str) -> list[Mapping[str, Any]]:
    """Return the messages that `step` returned; none at the end of the conversation. `place` is for the error.

    Raises:
        RolloutError: it returned something else than messages of other roles than the assistant's.

    Example:
        >>> checked_reply([{"role": "user", "content": "later"}], "")
        [{'role': 'user', 'content': 'later'}]
    """
    if reply is None or (isinstance(reply, list | tuple) and not reply):
        return []
    listed = isinstance(reply, Iterable) and not isinstance(reply, str | bytes | Mapping)
    messages = list(reply) if listed else [reply]
    fault = "" if listed else "is no list of messages"
    for i, message in enumerate(messages if listed else ()):
        said = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(message, Mapping) or message.get("role") not in REPLYING:
            fault = f"has the message {shortened(message)}, whose role is none of {', '.join(REPLYING)}"
        elif not isinstance(said, str):
            fault = f"has the message {shortened(message)}, whose content is no text"
        elif said.encode(errors="replace").decode() != said:
            fault = f"has half of a surrogate pair in message {i}, which is no text"
        if fault:
            break
    if fault:
        raise RolloutError(
            f"the environment's step returned, {place}, {shortened(reply)}, which {fault}. Return None to end the conversation, or"
            " messages such as [{'role': 'user', 'content': 'later'}]"
        )
    return messages


def reply_ids(encoder: TextEncoder, request: Request, said: Messages, reply: Messages) -> list[int]:
    """Return the ids between the model's newest turn and its next one. The turn's own end token has been sampled and is left out.

    Args:
        said: the turns after the prompt, of which the last one is the model's.

    Raises:
        DataError: the chat template leaves out a turn, such as a tool's result.
    """
    if isinstance(request.asked, str):
        text = "".join(str(message["content"]) for message in reply)
        return list(encoder.tokenizer(text, add_special_tokens=False)["input_ids"])
    history = [*request.asked, *said[:-1], {**said[-1], "content": _MARK}]
    messages, tools = [*history, *reply], row_tools(dict(request.columns))
    text = encoder.template.render(messages, tools, generate=True)
    if text.count(_MARK) != 1:
        raise DataError(
            f"the model's chat template shows the assistant's newest turn {text.count(_MARK)} times before the environment's reply, so"
            " the tokens between them are not certain; take a model with another template"
        )
    encoder.template.require_shown(messages, tools)
    ids = list(encoder.tokenizer(text.partition(_MARK)[2], add_special_tokens=False)["input_ids"])
    return ids[1:] if ids and ids[0] in encoder.ends else ids


def transcript(messages: Messages) -> str:
    """Return a conversation as text, one line or more for each turn."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
