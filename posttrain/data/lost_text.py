"""Count the characters that a tokenizer drops: without an unknown token, those that its vocabulary lacks leave no trace.

Example:
    >>> from posttrain.models.tiny import byte_tokenizer
    >>> LostText(byte_tokenizer(64)).share(["4 and 2"])
    0.0
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TWO, _THREE = range(0xC4, 0xE0), (*range(0xE0, 0xED), 0xEF)
_PROBE = "".join(
    map(
        chr,
        (
            *range(33, 127),
            *range(0x4E00, 0x4E40),
            *((lead & 31) << 6 | 0x2B for lead in _TWO),
            *((lead & 15) << 12 | 0x925 for lead in _THREE),
            0xD125,
            0x1F600,
        ),
    )
)
"""Letters of many scripts, which have every byte that letters have in UTF-8."""


class LostText:
    """Knows which characters a tokenizer drops. Most tokenizers drop none, which one trial finds out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._lost: dict[str, bool] = {}
        self.possible = any(map(self.drops, _PROBE))

    def share(self, texts: Sequence[str]) -> float:
        """Return the share of the texts' characters, white space and control characters apart, that are dropped."""
        if not self.possible:
            return 0.0
        visible = [character for text in texts for character in text if character.isprintable() and character != " "]
        return sum(map(self.drops, visible)) / len(visible) if visible else 0.0

    def drops(self, character: str) -> bool:
        """Return True if the character adds no token to a text. Offsets do not show it: those of later tokens shift."""
        if character not in self._lost:
            alone, followed = (self.tokenizer(text, add_special_tokens=False) for text in ("0", f"0{character}"))
            ids = list(followed["input_ids"])
            # one unknown token may stand for both
            self._lost[character] = ids == list(alone["input_ids"]) and self.tokenizer.unk_token_id not in ids
        return self._lost[character]
