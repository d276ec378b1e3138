"""A language model with its tokenizer, as `posttrain.load` and `posttrain.tiny` return it.

Example:
    >>> model = tiny(seed=0, hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1)
    >>> answers = model.generate(["1+1=", "2+2="], max_new_tokens=4)
    >>> len(answers), answers == model.generate(["1+1=", "2+2="], max_new_tokens=4)
    (2, True)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from posttrain.data.tokens import Text, TextEncoder
from posttrain.models.folders import load_encoder, load_policy, save_model
from posttrain.models.tiny import TinyShape, tiny_model
from posttrain.rollouts.engine import Request, SamplingSettings
from posttrain.rollouts.native import NativeEngine


@dataclass(frozen=True)
class Model:
    """A causal language model and its tokenizer. Training changes the weights of `lm` in place."""

    lm: PreTrainedModel
    encoder: TextEncoder

    def generate(
        self, prompts: Sequence[Text], *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """Return one answer per prompt; temperature 0 is greedy. The seed decides the answers at any other temperature."""
        requests = [Request(tuple(self.encoder.prompt(prompt)), ((seed, i),)) for i, prompt in enumerate(prompts)]
        answers = NativeEngine(self.lm, self.encoder.ends).sample(
            requests, SamplingSettings(max_new_tokens, temperature)
        )
        return [self.encoder.text(answer.tokens) for (answer,) in answers]

    def save(self, folder: str | Path, card: str = "") -> None:
        """Write a folder that `load` and `from_pretrained` read: safetensors weights, configuration, tokenizer, README.md."""
        save_model(self.lm, self.encoder.tokenizer, Path(folder), card, ends=self.encoder.ends)


def load(source: str | Path) -> Model:
    """Load a model folder, or a hub id if downloads are allowed.

    Raises:
        ModelError: the folder cannot be used.
    """
    return Model(load_policy(source), load_encoder(source))


def tiny(seed: int, **sizes: Any) -> Model:
    """Build a tiny Qwen3 with a byte tokenizer from a seed; `sizes` are fields of `TinyShape`. Nothing is downloaded."""
    shape = TinyShape(**sizes)
    lm, tokenizer = tiny_model(shape, seed)
    return Model(lm, TextEncoder(tokenizer, shape.max_length))
