"""Read from a configuration whether a model folder holds a language model or a reward model; torch is not imported."""

from __future__ import annotations

from typing import Any

_LANGUAGE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def language_model(architectures: Any) -> str:
    """Return the name of the first architecture that predicts tokens, empty if there is none.

    Example:
        >>> language_model(["Qwen3ForCausalLM"]), language_model(["Qwen3ForSequenceClassification"]), language_model(None)
        ('Qwen3ForCausalLM', '', '')
    """
    listed = architectures if isinstance(architectures, list) else []
    return next((name for name in listed if isinstance(name, str) and name.endswith(_LANGUAGE)), "")


def no_score(model: str) -> str:
    """Return why a language model cannot be used as a reward model."""
    return (
        f"the folder holds a language model ({model}) without a score head, which cannot score answers; give a finished reward model"
        " (…ForSequenceClassification with num_labels = 1), or leave reward.source out to train one"
    )
