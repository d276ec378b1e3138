"""Render a conversation once and find which characters of it are trained.

A turn's text is found by rendering the conversation up to it (prefix rendering). Templates that render history differently, e.g. without
its reasoning, are asked with two stand-ins for the turn's content: only the content changes. `{% generation %}` marks are used if both
fail, or if only they are asked for. A row for which nothing is exact is refused.

Example:
    >>> from posttrain.models.tiny import byte_tokenizer
    >>> text = ChatTemplate(byte_tokenizer(64)).render([{"role": "user", "content": "hi"}], generate=True)
    >>> text.endswith("assistant\\n"), "hi" in text
    (True, True)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from os import path
from typing import TYPE_CHECKING, Any, Literal

from posttrain.data.call_spellings import shows_calls, spellings
from posttrain.data.limits import bounded
from posttrain.data.stand_ins import LeftOut, form, last_change, left_out, shared, turn_part
from posttrain.data.template_errors import not_shown, refusal, require_tools, uncertain
from posttrain.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
TrainOn = Literal["completion", "last", "marked", "all"]
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
DATE = datetime(2024, 7, 26)
"""The date for a template that prints today's date: the same rows must give the same tokens on any day."""
_CLOSED = re.compile(r"</\w+>|\[/\w+\]|<\|\w+\|>")
"""The end of reasoning, which templates may cut off."""
_TAGS = re.compile(r"</?\w+>|\[/?\w+\]|<\|\w+\|>")
_PROBES = (("posttrain-question", "posttrain-answer"), ("WXYZVKUJ", "HJKQLMGP"), ("172839", "584736"), ("何故雲", "其理風"))  # fmt: skip
"""Questions and answers by which a template's closings are found: a template may alter some letters, and shows others."""
_MOST_FORMS = 4096
PROBE = "?"
"""The name of that conversation where messages name a row."""
_OTHER_FIELDS = ("tool_calls", "reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Span:
    """Characters [start, stop) of the rendered text that one assistant turn is trained on, and their weight."""

    start: int
    stop: int
    weight: float = 1.0
    turn: int = 0
    """The turn's position in the conversation."""
    said: tuple[int, int] | None = None
    """Characters [start, stop) of the turn's own text; the template closes the turn after it. None: not found, as for a tool call."""


@dataclass(frozen=True)
class Closings:
    """The texts that a chat template writes after an answer."""

    last: str
    """At the end of a conversation."""
    inner: str | None = None
    """Before and including a user's next turn; None if the template refuses such a conversation."""
    opening: str = ""
    """How it opens a user's turn."""

    @property
    def is_footer(self) -> bool:
        """Return True if the end of a conversation has a text that other answers are not closed with."""
        return self.inner is not None and not self.inner.strip().startswith(self.last.strip())


class ChatTemplate:
    """A tokenizer's chat template. `row` names the row in messages."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._probed: tuple[str, str] | None = None
        self._forms: set[tuple[Any, ...]] = set()
        """Forms of conversations that the template shows whole."""

    def closings(self) -> Closings | None:
        """Return the texts that the template writes after an answer, None if it refuses a question and its answer, or alters every text.

        Raises ModelError for a template that is no program.
        """
        for asked, answered in _PROBES:
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
            try:
                _, found, last = self.render(turns, row=PROBE).rpartition(answered)
            except DataError:  # rows of such turns are refused by name when they are read
                return None
            if found:
                return self._closings(turns, last)
        return None

    def _closings(self, turns: Sequence[Message], last: str) -> Closings:
        """Return the closings of a question and an answer that the template shows as they are."""
        asked, answered = (str(turn["content"]) for turn in turns)
        longer = self._try([*turns, turns[0]], None)
        if longer is None or longer.count(asked) != 2 or longer.count(answered) != 1:
            return Closings(last)
        head, (_, _, after) = longer.partition(asked)[0], longer.partition(answered)
        between = after.rpartition(asked)[0]
        shared = len(path.commonprefix([head[::-1], between[::-1]]))  # noqa: RUF071
        return Closings(last, after, between[len(between) - shared :])

    def render(
        self, messages: Sequence[Message], tools: list[Any] | None = None, generate: bool = False, row: str = ""
    ) -> str:
        """Return the text of a conversation; `generate` opens the assistant's next turn.

        Raises ModelError without a template, DataError if the template refuses the conversation.
        """
        if not self.tokenizer.chat_template:
            raise ModelError(
                f"{row_name(row)}: its text is chat messages, and the tokenizer has no chat template. Take a chat model, or give plain"
                " text (in the pipeline: model.source, data.*.columns)."
            )
        try:
            with bounded():
                _fix_date(self.tokenizer.chat_template)
                text = self.tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    tools=tools,
                    add_generation_prompt=generate,
                    tokenize=False,
                )
        except (TimeoutError, MemoryError) as error:
            reason = str(error) or "it asked for more than 1 GiB of memory"
            raise ModelError(
                f"{row_name(row)}: the model's chat template was stopped: {reason}. Take a model whose template you trust."
            ) from None
        except Exception as error:  # a template is a program of the model's author, which may raise anything
            raise refusal(error, messages, row_name(row), self._fails_always) from error
        return str(text)

    def _fails_always(self) -> bool:
        """Return True if the template refuses even a question and its answer."""
        return self.closings() is None

    def conversation(
        self, messages: Sequence[Message], tools: list[Any] | None = None, generate: bool = False, row: str = ""
    ) -> str:
        """Return the text of a conversation, which contains every turn's own text, and the names of its tools and calls.

        Raises DataError if the template leaves out or refuses a turn, a tool or a call.
        """
        messages = self._suited(messages, tools, generate)
        text = self.render(messages, tools, generate, row)
        require_tools(text, messages, tools, row_name(row))
        self.require_shown(messages, tools, row)
        shown, as_written = _plain(text), " ".join(text.split())
        for i, message in enumerate(messages):
            content = message.get("content")
            if not isinstance(content, str) or message.get("role") == "tool" or message.get("tool_calls"):
                continue
            end = _after_reasoning(content)
            spellings = (end, json.dumps(end)[1:-1], json.dumps(end, ensure_ascii=False)[1:-1])
            if not any(_plain(one) in shown for one in spellings):
                raise not_shown(messages, LeftOut(i), row_name(row))
            if not any(" ".join(one.split()) in as_written for one in spellings):
                raise DataError(
                    f"{row_name(row)}: the model's chat template changes the letters of turn {i} ({message.get('role')}), as its filters"
                    f" upper and lower do: {_shorter(end)} is not in what it shows. The model would learn another text than the row's; take"
                    " a model with another template, or correct the template."
                )
        asked = max((i for i, message in enumerate(messages) if message.get("role") == "user"), default=-1)
        hidden = [turn for turn in hidden_reasoning(text, messages) if turn > asked]
        if hidden:
            raise DataError(
                f"{row_name(row)}: the model's chat template leaves out the reasoning of turn {hidden[0]} (assistant), so the model would"
                " never learn it. Take a model whose template shows reasoning, write it into the text of the turn, or remove it from"
                " the row."
            )
        return text

    def _suited(
        self, messages: Sequence[Message], tools: list[Any] | None, generate: bool = False
    ) -> Sequence[Message]:
        """Return the conversation with its tool calls spelt so that the template shows them, as it is if no spelling helps."""
        if not any(message.get("tool_calls") for message in messages):
            return messages
        for spelt in spellings(messages):
            text = self._try(spelt, tools, generate)
            if text is not None and shows_calls(text, messages):
                return spelt
        return messages

    def require_shown(self, messages: Sequence[Message], tools: list[Any] | None, row: str = "") -> None:
        """Raise DataError if the template leaves out a turn's text or a call's argument, whatever they are."""
        shape = (str(self.tokenizer.chat_template), tools is None, form(messages))
        if shape in self._forms:
            return
        for part in left_out(messages, lambda some: self._try(some, tools)):
            raise not_shown(messages, part, row_name(row))
        if len(self._forms) < _MOST_FORMS:
            self._forms.add(shape)

    def spans(
        self,
        prompt: Sequence[Message],
        completion: Sequence[Message],
        tools: list[Any] | None = None,
        train_on: TrainOn = "completion",
        row: str = "",
    ) -> tuple[str, list[Span]]:
        """Return the rendered conversation and the trained spans: assistant turns of the completion whose weight is not 0.

        Raises DataError if a span cannot be found exactly, or if a turn has a weight that `all` would not heed.
        """
        messages, first = self._suited([*prompt, *completion], tools), len(prompt)
        if train_on == "all":
            _require_even_weights(messages, row)
        full = self.conversation(messages, tools, row=row)
        turns = [i for i in range(first, len(messages)) if messages[i].get("role") == "assistant"]
        if train_on == "last":
            turns = turns[-1:]
        if train_on == "marked":
            return full, self._marked(messages, turns, tools, row)
        found = []
        for turn in turns:
            weight = float(messages[turn].get("weight", 1.0))
            if weight:
                span = self._by_prefix(messages, turn, full, tools) or self._by_stand_ins(messages, turn, full, tools)
                if span is None and has_marks(str(self.tokenizer.chat_template)):
                    return full, self._marked(messages, turns, tools, row)
                if span is None:
                    raise uncertain(turn, turn < turns[-1], row_name(row))
                found.append(Span(*span, weight, turn, self._said(messages[turn], full, *span)))
        return full, found

    def is_asked(self, messages: Sequence[Message], span: Span, text: str, tools: list[Any] | None) -> bool:
        """Return True if the text before a trained span is the prompt by which sampling asks for the turn."""
        asked = self._try(messages[: span.turn], tools, generate=True)
        return asked is None or asked == text[: span.start]

    def _by_prefix(
        self, messages: Sequence[Message], turn: int, full: str, tools: list[Any] | None
    ) -> tuple[int, int] | None:
        if not turn:
            return None
        before = self._try(messages[:turn], tools, generate=True)
        after = self._try(messages[: turn + 1], tools)
        if before is None or after is None or not full.startswith(before) or not full.startswith(after):
            return None
        return (len(before), len(after)) if len(before) <= len(after) else None

    def _by_stand_ins(
        self, messages: Sequence[Message], turn: int, full: str, tools: list[Any] | None
    ) -> tuple[int, int] | None:
        """Find the turn by its changes, and its opening by the generation prompt."""
        specials = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        found = turn_part(messages, turn, full, lambda some: self._try(some, tools), specials)
        if found is None:
            return None
        opened = self._opening(messages, turn, full, found[0], tools)
        return None if opened is None else (opened, found[1])

    def _opening(
        self, messages: Sequence[Message], turn: int, full: str, content: int, tools: list[Any] | None
    ) -> int | None:
        """Return where the answer begins: after the common start of generation prompt and conversation, at its content at the latest."""
        if not turn:
            return content
        before = messages[:turn]
        history, asked = self._try(before, tools), self._try(before, tools, generate=True)
        if history is None or asked is None:
            return content
        opening = asked[len(history) :] if asked.startswith(history) else ""
        if not full.startswith(history) and full.startswith(asked[:content]):
            return min(len(asked), content)  # the template ends every conversation with a token
        if not full.startswith(history):  # earlier turns are shown differently
            last = last_change(messages, turn - 1, full, lambda some: self._try(some, tools))
            once = last is not None and opening.strip() and full.count(opening, last, content) == 1
            return full.index(opening, last, content) + len(opening) if once else None
        # a template that closes the question only before the answer: the opening is there, but not where sampling puts it
        place = (
            full.rfind(opening, len(history), content) if opening and not full.startswith(opening, len(history)) else -1
        )
        return place + len(opening) if place >= 0 else max(len(history), min(shared(asked, full), content))

    def _said(self, message: Message, full: str, start: int, stop: int) -> tuple[int, int] | None:
        """Return the characters of a turn's own text within its span, None if it is not there as it is written."""
        content = message.get("content")
        text = _after_reasoning(content).strip() if isinstance(content, str) and not message.get("tool_calls") else ""
        closing = self._closing()
        last = stop - len(closing) if closing and full.endswith(closing, start, stop) else stop
        place = full.rfind(text, start, last) if text else -1
        return (place, place + len(text)) if place >= 0 else None

    def _closing(self) -> str:
        """Return the text that the template writes after a last answer; its probe is rendered once."""
        template = str(self.tokenizer.chat_template)
        if self._probed is None or self._probed[0] != template:
            found = self.closings()
            self._probed = (template, found.last if found else "")
        return self._probed[1]

    def _try(self, messages: Sequence[Message], tools: list[Any] | None, generate: bool = False) -> str | None:
        """Render a part of a conversation, which templates may refuse though they take the whole."""
        try:
            return self.render(messages, tools, generate)
        except DataError:
            return None

    def _marked(self, messages: Sequence[Message], turns: Sequence[int], tools: Any, row: str) -> list[Span]:
        template = str(self.tokenizer.chat_template)
        if not has_marks(template):
            raise DataError(
                f"{row_name(row)}: sft.train_on is `marked`, and the model's chat template has no {{% generation %}} marks;"
                " set train_on: completion, or give a template that has them"
            )
        from transformers.utils.chat_template_utils import render_jinja_template

        options: dict[str, Any] = {"return_assistant_tokens_mask": True, **self.tokenizer.special_tokens_map}
        conversation = [dict(message) for message in messages]
        rendered: Any = render_jinja_template([conversation], tools=tools, chat_template=template, **options)
        (marks,) = rendered[1]
        every = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        if len(marks) != len(every):
            raise DataError(
                f"{row_name(row)}: the chat template marks {len(marks)} spans, and the conversation has {len(every)} assistant turns, so"
                " it is not certain which span is which turn; correct the template, or remove the row"
            )
        weights = {i: float(messages[i].get("weight", 1.0)) for i in turns}
        return [Span(mark[0], mark[1], weights[i], i) for i, mark in zip(every, marks, strict=True) if weights.get(i)]


def _require_even_weights(messages: Sequence[Message], row: str) -> None:
    """Raise DataError if a turn has another weight than 1: a conversation of which all is trained has no such turns."""
    for i, message in enumerate(messages):
        if float(message.get("weight", 1.0)) != 1.0:
            raise DataError(
                f"{row_name(row)}: turn {i} ({message.get('role')}) has the weight {float(message['weight']):g}, and sft.train_on: all"
                " trains every turn alike; set train_on: completion, or remove the weights of turns"
            )


def hidden_reasoning(text: str, messages: Sequence[Message]) -> list[int]:
    """Return the assistant turns whose reasoning, in its own field or in tags, the rendered text lacks.

    Many templates leave it out of earlier turns on purpose.
    """
    shown = _plain(text)
    found = []
    for i, message in enumerate(messages):
        fields = [message.get(name) for name in _OTHER_FIELDS[1:]]
        content = message.get("content")
        inline = content[: len(content) - len(_after_reasoning(content))] if isinstance(content, str) else ""
        parts = [*(part for part in fields if isinstance(part, str)), *_TAGS.split(inline)]
        if message.get("role") == "assistant" and any(_plain(part) not in shown for part in parts):
            found.append(i)
    return found


def has_marks(template: str) -> bool:
    """Return True if a chat template marks the answers with {% generation %}."""
    return _MARK.search(template) is not None


def as_messages(text: str | Sequence[Message], role: str) -> list[Message]:
    """Return a conversation as it is, a string as one turn of `role`."""
    return [{"role": role, "content": text}] if isinstance(text, str) else list(text)


def _fix_date(template: Any) -> None:
    """Let a template that prints today's date print `DATE`."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    for text in template.values() if isinstance(template, dict) else (template,):
        if isinstance(text, str) and "strftime_now" in text:
            _compile_jinja_template(text).environment.globals["strftime_now"] = DATE.strftime


def _after_reasoning(content: str) -> str:
    """Return the part of a turn that every template shows."""
    last = _CLOSED.split(content)[-1]
    return last if last.strip() else content


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _shorter(text: str) -> str:
    """Return a text as one short line."""
    line = repr(" ".join(text.split()))
    return line if len(line) <= 60 else line[:57] + "…" + line[0]


def row_name(row: str) -> str:
    """Return how a message names a row, which may have no name."""
    return "check of the chat template" if row == PROBE else f"row {row}" if row else "a row"
