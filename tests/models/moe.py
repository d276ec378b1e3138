"""The small models as mixtures of experts: inside `moe()` everything that tests/models/small.py makes is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import torch
from transformers import PreTrainedModel, Qwen3MoeForSequenceClassification

from posttrain.models.tiny import tiny_model
from tests.models import small

dense = small.language_model


def language_model(seed: int = 0, experts: str | None = None) -> PreTrainedModel:
    return _computing(dense(seed, small.MOE), experts)


def trunk_with_score(seed: int = 0, experts: str | None = None) -> PreTrainedModel:
    config = tiny_model(small.MOE, seed)[0].config
    config.num_labels = 1
    torch.manual_seed(seed + 100)
    return _computing(small.sharpened(Qwen3MoeForSequenceClassification(config)).eval(), experts)


@contextmanager
def moe(experts: str | None = None) -> Iterator[None]:
    """`experts`: how transformers computes them, if not by its default; "eager" is the one way that knows float64."""
    with (
        patch.object(small, "language_model", partial(language_model, experts=experts)),
        patch.object(small, "trunk_with_score", partial(trunk_with_score, experts=experts)),
    ):
        yield


def _computing(model: PreTrainedModel, experts: str | None) -> PreTrainedModel:
    if experts is not None:
        model.set_experts_implementation(experts)
    return model
