"""Prompts and completions as token ids: a prefix-exact split, one beginning-of-sequence at most, and a trained end of sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from posttrain.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Text = str | Sequence[dict[str, str]]


@dataclass(frozen=True)
class Tokens:
    """Token ids of a prompt and of the response that follows it. `id` names the table's row behind them, for messages."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    id: str = field(default="", compare=False)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


class TextEncoder:
    """A tokenizer with the rules that every step shares.

    Prompt and completion are tokenised apart, so that the prompt's ids are an exact prefix whatever merges the tokenizer knows. Plain
    prompts get the special tokens that the tokenizer adds by itself; chat messages go through its chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.eos_id = int(tokenizer.eos_token_id)

    def prompt(self, prompt: Text) -> list[int]:
        """Ids of a prompt that a response may follow."""
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt, add_special_tokens=True)["input_ids"]
            # some tokenizers close every text with an end of sequence; nothing may follow one
            ids = ids[:-1] if len(ids) > 1 and ids[-1] == self.eos_id else list(ids)
            # a text that spells its own beginning of sequence does not get a second one
            doubled = len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id
            return ids[1:] if doubled else ids
        messages = [dict(message) for message in prompt]
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def completion(self, completion: Text) -> list[int]:
        """Ids of a completion, closed by the end of sequence."""
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.eos_id]

    def pair(self, prompt: Text, completion: Text, row: str = "") -> Tokens:
        """Ids of both. Raises DataError where they do not fit the model's context; `row` names what they come from."""
        tokens = Tokens(tuple(self.prompt(prompt)), tuple(self.completion(completion)), row)
        where = f"row {row}" if row else "a row"
        if not tokens.prompt:
            raise DataError(f"{where}: the prompt has no tokens, so there is nothing to predict the first token from")
        if len(tokens) > self.max_length:
            raise DataError(
                f"{where}: {len(tokens)} tokens exceed the model's context of {self.max_length};"
                " lower validation.max_prompt_tokens or max_completion_tokens so that validation sets such rows aside"
            )
        return tokens

    def text(self, ids: Sequence[int]) -> str:
        """The text of response ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def table_tokens(encoder: TextEncoder, rows: Sequence[dict[str, Any]], completion: str) -> list[Tokens]:
    """`Tokens` of the columns `prompt` and `completion` of every row."""
    return [encoder.pair(row["prompt"], row[completion], str(row.get("id", i))) for i, row in enumerate(rows)]
