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

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from os import path
from typing import TYPE_CHECKING, Any, Literal

from posttrain.data.call_spellings import shows_calls, shows_python, spellings
from posttrain.data.limits import bounded
from posttrain.data.stand_ins import LeftOut, form, hidden_names, last_change, left_out, shared, turn_part
from posttrain.data.template_errors import changed_letters, not_shown, refusal, uncertain, unnamed
from posttrain.data.turn_texts import Shown, after_reasoning, hidden_reasoning, place_of
from posttrain.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
TrainOn = Literal["completion", "last", "each", "marked", "all"]
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
DATE = datetime(2024, 7, 26)
"""The date for a template that prints today's date: the same rows must give the same tokens on any day."""
_PROBES = (("posttrain-question", "posttrain-answer"), ("WXYZVKUJ", "HJKQLMGP"), ("172839", "584736"), ("何故雲", "其理風"))  # fmt: skip
"""Questions and answers by which a template's closings are found: a template may alter some letters, and shows others."""
_MOST_FORMS = 4096
PROBE = "?"
"""The name of that conversation where messages name a row."""


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
    shown: str = ""
    """The probe as the template shows it."""

    @property
    def is_footer(self) -> bool:
        """Return True if the end of a conversation has a text that other answers are not closed with."""
        return self.inner is not None and not self.inner.strip().startswith(self.last.strip())


class ChatTemplate:
    """A tokenizer's chat template. `row` names the row in messages."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._probed: tuple[str, Closings] | None = None
        self._forms: set[tuple[Any, ...]] = set()
        """Forms of conversations that the template shows whole."""

    def control_tokens(self) -> list[str]:
        """Return the special tokens that the template writes around turns; none without a template that shows a question and its answer."""
        if not self.tokenizer.chat_template or not (found := self._probe()).shown:
            return []
        special = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        return sorted(token for token in special if token in found.shown)

    def closings(self) -> Closings | None:
        """Return the texts that the template writes after an answer, None if it refuses a question and its answer, or alters every text.

        Raises ModelError for a template that is no program.
        """
        for asked, answered in _PROBES:
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
            try:
                shown = self.render(turns, row=PROBE)
            except DataError:  # rows of such turns are refused by name when they are read
                return None
            if answered in shown:
                return self._closings(turns, shown)
        return None

    def _closings(self, turns: Sequence[Message], shown: str) -> Closings:
        """Return the closings of a question and an answer that the template shows as they are."""
        asked, answered = (str(turn["content"]) for turn in turns)
        last = shown.rpartition(answered)[2]
        longer = self._try([*turns, turns[0]], None)
        if longer is None or longer.count(asked) != 2 or longer.count(answered) != 1:
            return Closings(last, shown=shown)
        head, (_, _, after) = longer.partition(asked)[0], longer.partition(answered)
        between = after.rpartition(asked)[0]
        shared = len(path.commonprefix([head[::-1], between[::-1]]))  # noqa: RUF071
        return Closings(last, after, between[len(between) - shared :], shown)

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
        self,
        messages: Sequence[Message],
        tools: list[Any] | None = None,
        generate: bool = False,
        row: str = "",
        earlier: bool = True,
    ) -> str:
        """Return the text of a conversation, which contains every turn's own text, and the names of its tools and calls.

        Args:
            earlier: False if parts of answers before the last turn may be missing, as templates show history.

        Raises:
            DataError: the template leaves out or refuses a turn, a tool or a call.
        """
        messages = self.suited(messages, tools, generate)
        text = self.render(messages, tools, generate, row)
        self.require_shown(messages, tools, row, earlier)
        shown = Shown(text)
        for i, message in enumerate(messages):
            content = message.get("content")
            if not earlier and _is_history(messages, i):
                continue
            if not isinstance(content, str) or message.get("role") == "tool" or message.get("tool_calls"):
                continue
            end = after_reasoning(content)
            if not shown.has(end):
                raise not_shown(messages, LeftOut(i), row_name(row))
            if not shown.has_as_written(end):
                raise changed_letters(i, message, end, row_name(row))
        asked = max((i for i, message in enumerate(messages) if message.get("role") == "user"), default=-1)
        hidden = [turn for turn in hidden_reasoning(text, messages) if turn > asked]
        hidden = [turn for turn in hidden if earlier or not _is_history(messages, turn)]
        if hidden:
            raise DataError(
                f"{row_name(row)}: the model's chat template leaves out the reasoning of turn {hidden[0]} (assistant), so the model would"
                " never learn it. Take a model whose template shows reasoning, write it into the text of the turn, or remove it from"
                " the row."
            )
        return text

    def suited(self, messages: Sequence[Message], tools: list[Any] | None, generate: bool = False) -> Sequence[Message]:
        """Return the conversation with its tool calls spelt so that the template shows them, as it is if no spelling helps."""
        if not any(message.get("tool_calls") for message in messages):
            return messages
        for spelt in spellings(messages):
            text = self._try(spelt, tools, generate)
            if text is not None and shows_calls(text, messages) and not shows_python(text, spelt):
                return spelt
        return messages

    def require_shown(
        self, messages: Sequence[Message], tools: list[Any] | None, row: str = "", earlier: bool = True
    ) -> None:
        """Raise DataError if the template leaves out a tool, a call, an argument or a turn's text; `earlier` as above."""
        shape = (str(self.tokenizer.chat_template), len(tools or ()), earlier, form(messages))
        if shape in self._forms:
            return
        for where, name in hidden_names(messages, tools or [], self._try):
            raise unnamed(where, name, row_name(row))
        for part in left_out(messages, lambda some: self._try(some, tools)):
            if earlier or not _is_history(messages, part.turn):
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

        With `each` it is the last turn, and earlier answers may lack parts that the template leaves out of history.

        Raises DataError if a span cannot be found exactly, or if a turn has a weight that `all` would not heed.
        """
        messages, first = self.suited([*prompt, *completion], tools), len(prompt)
        if train_on == "all":
            _require_even_weights(messages, row)
        full = self.conversation(messages, tools, row=row, earlier=train_on != "each")
        turns = [i for i in range(first, len(messages)) if messages[i].get("role") == "assistant"]
        if train_on in ("last", "each"):
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
                    raise uncertain(turn, turn < len(messages) - 1, row_name(row))
                found.append(Span(*span, weight, turn, self._said(messages[turn], full, *span)))
        return full, found

    def is_asked(self, messages: Sequence[Message], span: Span, text: str, tools: list[Any] | None) -> bool:
        """Return True if the text before a trained span is the prompt by which sampling asks for the turn."""
        asked = self._try(self.suited(messages, tools)[: span.turn], tools, generate=True)
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
        specials = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
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
        if place >= 0:
            return place + len(opening)
        same = shared(asked, full)
        return max(len(history), self._token_start(full, same) if same < content else content)

    def _token_start(self, text: str, place: int) -> int:
        """Return the place, or the beginning of the token that lies across it, such as a special token whose first letter is shared."""
        if not self.tokenizer.is_fast:
            return place
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return next((start for start, stop in offsets if start < place < stop), place)

    def _said(self, message: Message, full: str, start: int, stop: int) -> tuple[int, int] | None:
        """Return the characters of a turn's own text within its span, None if it is not there as it is written."""
        content = message.get("content")
        if not isinstance(content, str) or message.get("tool_calls"):
            return None
        closing = self._probe().last
        last = stop - len(closing) if closing and full.endswith(closing, start, stop) else stop
        return place_of(content, full, start, last)

    def _probe(self) -> Closings:
        """Return the closings of a question and its answer, which are rendered once."""
        template = str(self.tokenizer.chat_template)
        if self._probed is None or self._probed[0] != template:
            self._probed = (template, self.closings() or Closings(""))
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


def _is_history(messages: Sequence[Message], turn: int) -> bool:
    """Return True for an answer before the last turn."""
    return messages[turn].get("role") == "assistant" and turn < len(messages) - 1


def _require_even_weights(messages: Sequence[Message], row: str) -> None:
    """Raise DataError if a turn has another weight than 1: a conversation of which all is trained has no such turns."""
    for i, message in enumerate(messages):
        if float(message.get("weight", 1.0)) != 1.0:
            raise DataError(
                f"{row_name(row)}: turn {i} ({message.get('role')}) has the weight {float(message['weight']):g}, and sft.train_on: all"
                " trains every turn alike; set train_on: completion, or remove the weights of turns"
            )


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


def row_name(row: str) -> str:
    """Return how a message names a row, which may have no name."""
    return "check of the chat template" if row == PROBE else f"row {row}" if row else "a row"
