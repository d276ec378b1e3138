"""Attention of the newest tokens of answers that share a prompt: the prompt's keys are read once for all answers of a group.

As in Hydragen (2402.05099): a group's queries meet the prompt's keys in one matrix product, and each answer's own keys in a second one.
One softmax covers both. The result is exact to rounding.

Example:
    Models sample with this attention once it is chosen by its name; without slots it is torch's own:

    >>> from transformers import AttentionInterface
    >>> AttentionInterface()[NAME] is shared_attention
    True
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from posttrain.models.kernels import Scores
from posttrain.models.packed import padded_attention, refuse_more_than_plain
from posttrain.rollouts.slots import Slots

NAME = "posttrain_shared_prompts"


def shared_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    slots: Slots | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return attention of one new token per answer, [answers, heads, 1, size], over the keys and values in `slots`.

    The new token's key and value must already be in the slots. Without slots this is attention over padded rows: prompts.
    """
    scores = Scores(scaling, sliding_window, softcap, s_aux)
    if slots is None:
        return padded_attention(module, query, key, value, attention_mask, scores, **kwargs)
    refuse_more_than_plain(kwargs)
    # transformers expects [answers, 1, heads, size]
    return slot_attention(query[:, :, 0], slots, cast(int, module.layer_idx), scores)[:, None], None


def slot_attention(query: Tensor, slots: Slots, number: int, scores: Scores) -> Tensor:
    """Return attention of one new token per answer, [answers, heads, size], over the keys and values of layer `number`."""
    layer = slots.layers[number]
    own = layer.answers[0]
    scaled = query * (query.shape[-1] ** -0.5 if scores.scaling is None else scores.scaling)
    # heads are split into [key heads, repeats] for grouped queries
    grouped = scaled.to(own.dtype).unflatten(1, (own.shape[1], -1))
    # the slots already have the dtype of the products; autocast would cast all keys and values in every step
    with torch.autocast(query.device.type, enabled=False):
        parts = [
            part.attend(grouped[part.rows], layer.prompts, layer.answers, scores)
            for part in slots.within(scores.window)
        ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1, 2)


AttentionInterface.register(NAME, shared_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
