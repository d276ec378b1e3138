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

from posttrain.api_arguments import check_shape, checked, require, require_list, require_path
from posttrain.api_rows import check_prompt
from posttrain.api_surroundings import SEED_LOCK, is_adapted, usual_torch
from posttrain.data.tokens import Text, TextEncoder
from posttrain.errors import ConfigError, ModelError
from posttrain.models.folders import load_encoder, load_policy, save_model
from posttrain.models.tiny import TinyShape, tiny_model
from posttrain.rollouts.engine import Request, SamplingSettings
from posttrain.rollouts.native import NativeEngine
from posttrain.text import shortened as shown


@dataclass(frozen=True)
class Model:
    """A causal language model and its tokenizer. Training changes the weights of `lm` in place."""

    lm: PreTrainedModel
    encoder: TextEncoder

    def __post_init__(self) -> None:
        """Raise ConfigError unless these are a model of transformers and an encoder."""
        if not callable(getattr(self.lm, "get_output_embeddings", None)) or not hasattr(self.lm, "config"):
            raise ConfigError(
                f"Model: lm is a {type(self.lm).__name__}; give a model of transformers, without a wrapper such as DataParallel"
            )
        require("Model", "encoder", self.encoder, TextEncoder, "TextEncoder(tokenizer, max_length)")

    def generate(
        self, prompts: Sequence[Text], *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """Return one answer per prompt; temperature 0 is greedy. The seed decides the answers at any other temperature.

        Raises:
            ConfigError: an argument is of a different type or out of its range.
            DataError: a prompt is no text, is empty, or fills the model's context.
        """
        checked("generate", max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        asked = require_list("generate", "prompts", prompts, "a list of prompts, e.g. ['1+1=']")
        ids = [check_prompt(self.encoder, prompt, f"generate: prompt {i}") for i, prompt in enumerate(asked)]
        requests = [Request(tokens, ((int(seed), i),)) for i, tokens in enumerate(ids)]
        with usual_torch():
            answers = NativeEngine(self.lm, self.encoder.ends).sample(
                requests, SamplingSettings(int(max_new_tokens), float(temperature))
            )
        return [self.encoder.text(answer.tokens) for (answer,) in answers]

    def save(self, folder: str | Path, card: str = "") -> None:
        """Write a folder that `load` and `from_pretrained` read: safetensors weights, configuration, tokenizer, README.md.

        An existing model folder is replaced.

        Raises:
            ModelError: the weights are not finite, or the folder holds other files than a model, or cannot be written.
        """
        require_path("save", "folder", folder, "the path of a folder")
        require("save", "card", card, str, "the text of README.md")
        path = Path(folder)
        if is_adapted(self.lm):
            raise ModelError(
                "save: the model holds an adapter that is not merged; merge it first: peft's merge_and_unload()"
            )
        try:
            taken = path.exists() and (
                not path.is_dir() or (any(path.iterdir()) and not (path / "config.json").exists())
            )
        except OSError as error:
            raise ModelError(
                f"save: {shown(str(path))} cannot be used ({error.strerror}); name another folder"
            ) from error
        if taken:
            raise ModelError(
                f"{path}: is there already and is no model folder, so it is not replaced; give a new folder"
            )
        save_model(self.lm, self.encoder.tokenizer, path, card, ends=self.encoder.ends)


def load(source: str | Path) -> Model:
    """Load a model folder, or a hub id if downloads are allowed.

    Raises:
        ConfigError: `source` is no path.
        ModelError: the folder cannot be used.
    """
    require_path("load", "source", source, "the path of a model folder, or a hub id OWNER/NAME")
    with usual_torch():
        return Model(load_policy(source), load_encoder(source))


def tiny(seed: int, **sizes: Any) -> Model:
    """Build a tiny Qwen3 with a byte tokenizer from a seed; `sizes` are fields of `TinyShape`. Nothing is downloaded.

    Raises:
        ConfigError: there is no such size, or the sizes do not fit together.
    """
    checked("tiny", seed=seed)
    check_shape(sizes)
    shape = TinyShape(**{name: int(size) for name, size in sizes.items()})
    with usual_torch(), SEED_LOCK:
        lm, tokenizer = tiny_model(shape, int(seed))
    return Model(lm, TextEncoder(tokenizer, shape.max_length))
