"""Prompts and completions as token ids: a prefix-exact split, at most one beginning-of-sequence, and a trained end-of-sequence.

Example:
    >>> from posttrain.models.tiny import byte_tokenizer
    >>> encoder = TextEncoder(byte_tokenizer(max_length=64), max_length=64)
    >>> tokens = encoder.pair("1+1=", "2")
    >>> len(tokens.prompt), len(tokens.response), tokens.response[-1] == encoder.eos_id, encoder.text(tokens.response)
    (4, 2, True, '2')
"""

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
    """Token ids of a prompt and of the response that follows it. `id` is the id of the table's row, for messages."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    id: str = field(default="", compare=False)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


class TextEncoder:
    """A tokenizer with the rules that all steps share.

    Prompt and completion are tokenised separately, so that the prompt's ids are an exact prefix whatever merges the tokenizer has. Plain
    prompts get the special tokens that the tokenizer adds by default. Chat messages go through its chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.eos_id = int(tokenizer.eos_token_id)

    def prompt(self, prompt: Text) -> list[int]:
        """Return the ids of a prompt, ready for a response to follow."""
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt, add_special_tokens=True)["input_ids"]
            # some tokenizers end every text with an end-of-sequence token; no response may follow it
            ids = ids[:-1] if len(ids) > 1 and ids[-1] == self.eos_id else list(ids)
            # a text that already contains the beginning-of-sequence token does not get a second one
            doubled = len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id
            return ids[1:] if doubled else ids
        messages = [dict(message) for message in prompt]
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def completion(self, completion: Text) -> list[int]:
        """Return the ids of a completion, closed by the end-of-sequence token."""
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.eos_id]

    def pair(self, prompt: Text, completion: Text, row: str = "") -> Tokens:
        """Return the ids of prompt and completion.

        Args:
            row: id of the table's row, for messages.

        Raises:
            DataError: the prompt is empty, or both together exceed the model's context.
        """
        tokens = Tokens(tuple(self.prompt(prompt)), tuple(self.completion(completion)), row)
        where = f"row {row}" if row else "a row"
        if not tokens.prompt:
            raise DataError(
                f"{where}: the prompt has no tokens, so the first response token has no context; remove the row"
            )
        if len(tokens) > self.max_length:
            raise DataError(
                f"{where}: {len(tokens)} tokens exceed the model's context of {self.max_length};"
                " lower validation.max_prompt_tokens or max_completion_tokens so that validation quarantines such rows"
            )
        return tokens

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of response ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def table_tokens(encoder: TextEncoder, rows: Sequence[dict[str, Any]], completion: str) -> list[Tokens]:
    """Return the `Tokens` of the columns `prompt` and `completion` of every row."""
    return [encoder.pair(row["prompt"], row[completion], str(row.get("id", i))) for i, row in enumerate(rows)]
