"""Prompts and completions as token ids: a prefix-exact split, at most one beginning-of-sequence, and a trained end-of-sequence.

Example:
    >>> from posttrain.models.tiny import byte_tokenizer
    >>> encoder = TextEncoder(byte_tokenizer(max_length=64), max_length=64)
    >>> tokens = encoder.pair("1+1=", "2")
    >>> len(tokens.prompt), len(tokens.response), tokens.response[-1] in encoder.ends, encoder.text(tokens.response)
    (4, 2, True, '2')
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from posttrain.data.alignment import closed, closing_tokens, continuation_ids, weighted_ids
from posttrain.data.conversations import ChatTemplate, Span, TrainOn, as_messages, row_name
from posttrain.data.ends import end_tokens
from posttrain.data.lost_text import LostText
from posttrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Text = str | Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Tokens:
    """Token ids of a prompt and of the response that follows it. `id` is the id of the table's row, for messages."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    id: str = field(default="", compare=False)
    weights: tuple[float, ...] | None = None
    """How much each response token counts in a loss; 0: not at all, such as a user's turn. None: all count 1."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)

    @property
    def loss_tokens(self) -> int:
        """Return the number of response tokens that carry loss."""
        return len(self.response) if self.weights is None else sum(weight != 0 for weight in self.weights)

    def with_prompt(self) -> Tokens:
        """Return the same tokens with loss on all of them but the first, which no token predicts."""
        return Tokens(self.prompt[:1], self.prompt[1:] + self.response, self.id)

    @property
    def loss_weight(self) -> float:
        """Return the sum of the response tokens' weights."""
        return float(len(self.response)) if self.weights is None else sum(self.weights)


class TextEncoder:
    """A tokenizer with the rules that all steps share.

    Prompt and completion are tokenised separately, so that the prompt's ids are an exact prefix whatever merges the tokenizer has. Plain
    prompts get the special tokens that the tokenizer adds by default. Chat messages go through its chat template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, configured_ends: Iterable[int] = ()
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.eos_id = int(tokenizer.eos_token_id)
        self.end_origins = end_tokens(tokenizer, configured_ends)
        self.ends = tuple(self.end_origins)
        self.template = ChatTemplate(tokenizer)
        self._footer: str | None = None
        self._closing = closing_tokens(tokenizer)

    def prompt(self, prompt: Text, tools: list[Any] | None = None, row: str = "") -> list[int]:
        """Return the ids of a prompt, ready for a response to follow."""
        if isinstance(prompt, str):
            _require_turns(tools, row)
            ids = list(self.tokenizer(prompt, add_special_tokens=True)["input_ids"])
            # some tokenizers close every text with special tokens; no response may follow them
            ids = ids[: len(ids) - self._closing]
            # a text that already contains the beginning-of-sequence token does not get a second one
            doubled = len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id
            return ids[1:] if doubled else ids
        text = self.template.conversation(prompt, tools, generate=True, row=row)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def completion(self, completion: str, row: str = "") -> list[int]:
        """Return the ids of a plain completion, closed by one end of sequence. Raises DataError if it goes on after an end."""
        return closed(self.tokenizer, continuation_ids(self.tokenizer, completion), self.ends, self.eos_id, row)

    def pair(
        self,
        prompt: Text,
        completion: Text,
        row: str = "",
        tools: list[Any] | None = None,
        train_on: TrainOn = "completion",
    ) -> Tokens:
        """Return the ids of both. Raises DataError if they do not fit the model's context; `row` is for messages."""
        return self.fitting(self.tokens(prompt, completion, row, tools, train_on), row)

    def fitting(self, tokens: Tokens, row: str = "") -> Tokens:
        """Return the tokens as they are. Raises DataError if they have no prompt or do not fit the model's context."""
        where = f"row {row}" if row else "a row"
        if not tokens.prompt:
            raise DataError(
                f"{where}: the prompt has no tokens, so the first response token has no context; remove the row"
            )
        if len(tokens) > self.max_length:
            raise DataError(
                f"{where}: {len(tokens)} tokens exceed the model's context of {self.max_length}; shorten or remove the row. In the"
                " pipeline, lower validation.max_prompt_tokens or max_completion_tokens, so that validation quarantines such rows"
            )
        return tokens

    def tokens(
        self,
        prompt: Text,
        completion: Text,
        row: str = "",
        tools: list[Any] | None = None,
        train_on: TrainOn = "completion",
    ) -> Tokens:
        """Return the ids of both, of any length. If one is chat messages, both go through the template, which is applied once.

        The response begins with the first token that carries loss and ends with the last one. With `all` it is that of `completion`: see
        `Tokens.with_prompt`.
        """
        if isinstance(prompt, str) and isinstance(completion, str):
            if train_on == "marked":
                raise DataError(f"row {row}: is plain text, which has no marks; set sft.train_on: completion")
            return Tokens(tuple(self.prompt(prompt, tools, row)), tuple(self.completion(completion, row)), row)
        text, spans = self.template.spans(
            as_messages(prompt, "user"), as_messages(completion, "assistant"), tools, train_on, row
        )
        ids, weights = weighted_ids(self.tokenizer, text, spans, self.ends, row)
        self._require_no_footer(text, spans, row)
        trained = [i for i, weight in enumerate(weights) if weight]
        if not trained:
            raise DataError(
                f"row {row}: no token carries loss: no assistant turn has text and a weight above 0; remove the row"
            )
        first, stop = trained[0], trained[-1] + 1
        own = tuple(weights[first:stop])
        return Tokens(tuple(ids[:first]), tuple(ids[first:stop]), row, None if set(own) == {1.0} else own)

    def _require_no_footer(self, text: str, spans: Sequence[Span], row: str) -> None:
        """Raise DataError if the text ends with a footer, which the template writes only after a last answer, and which has no end."""
        if not spans or text[spans[-1].stop :].strip():
            return
        if self._footer is None:
            found = self.template.closings()
            ids = self.tokenizer(found.last, add_special_tokens=False)["input_ids"] if found else []
            self._footer = found.last.strip() if found and found.is_footer and not {*ids} & {*self.ends} else ""
        if self._footer:
            raise DataError(
                f"{row_name(row)}: the model's chat template writes {self._footer!r} after a last answer and not after others, so the model"
                " would learn it as a part of the answer. Let chat_template.jinja write it only if add_generation_prompt is true, or take a"
                " model with another template."
            )

    def answers(self, prompt: Text, completion: Text, row: str = "", tools: list[Any] | None = None) -> list[Tokens]:
        """Return each trained answer of a conversation with its own prompt: the turns before it, as the template shows them there.

        They have any length. So a template that shows reasoning only in a last answer shows that of every answer.
        """
        parts = asked_and_answered(prompt, completion)
        if not parts:
            return [self.tokens(prompt, completion, row, tools)]
        return [self.tokens(asked, [answered], row, tools, "each") for asked, answered in parts]

    def unknown_share(self, texts: Sequence[Text]) -> float:
        """Return the share of the texts' tokens that are the tokenizer's unknown token, or of their characters that it drops."""
        unknown = self.tokenizer.unk_token_id
        if unknown is None and not self._lost.possible:
            return 0.0
        parts = [[text] if isinstance(text, str) else [message["content"] for message in text] for text in texts]
        plain = [part for several in parts for part in several if isinstance(part, str) and part]
        ids = [i for text in plain for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]]
        return max(self._lost.share(plain), ids.count(unknown) / len(ids) if ids else 0.0)

    @cached_property
    def _lost(self) -> LostText:
        return LostText(self.tokenizer)

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of response ids as it was sampled, with special tokens such as `<think>`; only the end is cut off."""
        shown = list(ids[:-1]) if ids and ids[-1] in self.ends else list(ids)
        return str(self.tokenizer.decode(shown, skip_special_tokens=False))


def _require_turns(tools: list[Any] | None, row: str) -> None:
    """Raise DataError for plain text that offers tools: only a chat template shows them."""
    if tools:
        raise DataError(
            f"{row_name(row)}: offers tools, and its prompt is plain text, so the model would not see them; write the prompt as messages,"
            " or leave the tools out"
        )


def table_tokens(
    encoder: TextEncoder, rows: Sequence[dict[str, Any]], completion: str, train_on: TrainOn = "completion"
) -> list[Tokens]:
    """Return `Tokens` of the columns `prompt` and `completion` of every row."""
    return [
        encoder.pair(row["prompt"], row[completion], str(row.get("id", i)), row_tools(row), train_on)
        for i, row in enumerate(rows)
    ]


def table_answers(
    encoder: TextEncoder, rows: Sequence[dict[str, Any]], completion: str, train_on: TrainOn = "completion"
) -> list[list[Tokens]]:
    """Return the sequences of every row: one, or with `each` one for every trained answer of a conversation."""
    if train_on != "each":
        return [[tokens] for tokens in table_tokens(encoder, rows, completion, train_on)]
    found = []
    for i, row in enumerate(rows):
        name = str(row.get("id", i))
        answers = encoder.answers(row["prompt"], row[completion], name, row_tools(row))
        found.append([encoder.fitting(tokens, name) for tokens in answers])
    return found


def demonstrated_as(train_on: TrainOn) -> TrainOn:
    """Return how the demonstrations of an on-policy algorithm train: with `each` as in SFT, else all answers of a conversation.

    Example:
        >>> demonstrated_as("each"), demonstrated_as("last")
        ('each', 'completion')
    """
    return "each" if train_on == "each" else "completion"


def asked_and_answered(prompt: Text, completion: Text) -> list[tuple[list[Any], Any]]:
    """Return each assistant turn of the completion that has a weight, with the turns before it; none for plain text.

    Example:
        >>> turns = [{"role": "assistant", "content": "2"}, {"role": "user", "content": "+1"}, {"role": "assistant", "content": "3"}]
        >>> [(len(asked), answered["content"]) for asked, answered in asked_and_answered("1+1", turns)]
        [(1, '2'), (3, '3')]
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        return []
    asked = as_messages(prompt, "user")
    messages = [*asked, *as_messages(completion, "assistant")]
    return [
        (messages[:i], messages[i])
        for i in range(len(asked), len(messages))
        if messages[i].get("role") == "assistant" and float(messages[i].get("weight", 1.0))
    ]


def require_same_vocabulary(other: TextEncoder, own: TextEncoder, where: str) -> None:
    """Raise ConfigError unless both encoders give each token the same id, so that log-probabilities can be compared."""
    theirs, mine = other.tokenizer.get_vocab(), own.tokenizer.get_vocab()
    if theirs != mine:
        different = sum(mine.get(token) != number for token, number in theirs.items())
        raise ConfigError(
            f"{where}: {different} of its {len(theirs)} tokens have another id in the model's vocabulary of {len(mine)}. Probabilities of"
            " tokens could not be compared; choose a model of the same family"
        )


def require_context(other: TextEncoder, own: TextEncoder, tokens: int, where: str) -> None:
    """Raise ConfigError if rows of so many tokens, or of the model's whole context if that is less, do not fit the other model's."""
    most = min(own.max_length, tokens)
    if most > other.max_length:
        raise ConfigError(
            f"{where} reads at most {other.max_length} tokens, and prompt and answer have up to {most}. Lower max_new_tokens, shorten the"
            " prompts, or take a model with a longer context"
        )


def row_tools(row: dict[str, Any]) -> list[Any] | None:
    """Return the tools that a row offers, which a table holds as JSON."""
    tools = row.get("tools")
    return json.loads(tools) or None if isinstance(tools, str) and tools else tools or None
