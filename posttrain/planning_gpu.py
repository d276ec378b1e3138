"""Count the memory that the backward pass needs on a GPU under bfloat16 autocast, with attention by offsets.

Norms and residuals are float32 there, each product keeps its own bfloat16 copy of its input, and each weight is cast once in a forward pass
and kept until the backward pass has used it.

Example:
    A layer of Llama's kind, 8 wide, with an intermediate width of 16: 26 x 8 + 8 x 16 + 4 x 8 + 4 x 8 bytes for each token:

    >>> from posttrain.planning import Sizes
    >>> layer_bytes(Sizes(parameters=1000, hidden=8, layers=1, query_width=8, key_width=8, intermediate=16, vocabulary=10))
    400
"""

from __future__ import annotations

from typing import Protocol

HALF_BYTES, WIDE_BYTES = 2, 4


class LayerSizes(Protocol):
    """The fields of `posttrain.planning.Sizes` that are read here."""

    @property
    def hidden(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def query_width(self) -> int: ...
    @property
    def key_width(self) -> int: ...
    @property
    def intermediate(self) -> int: ...
    @property
    def head_norms(self) -> bool: ...


def layer_bytes(model: LayerSizes) -> int:
    """Return the bytes that one layer keeps for each token.

    Of the hidden width: inputs and results of two norms in float32, and the inputs of q, k, v, gate and up. Of the intermediate width:
    gate, its activation, up and their product. Of queries and keys: the inputs of attention, and its output or values. A norm of the heads
    adds its input in float32 and its result in bfloat16.
    """
    heads = 10 if model.head_norms else 4
    return 26 * model.hidden + 8 * model.intermediate + heads * (model.query_width + model.key_width)


def kept_bytes(model: LayerSizes, tokens: int, recomputes: bool, cast: int) -> int:
    """Return the bytes that one micro-batch keeps for its backward pass.

    Args:
        recomputes: each layer keeps only its input, and one layer at a time is computed again.
        cast: parameters of the layers that are cast to bfloat16.
    """
    # the tokens that the last layer computes, the last norm, and the head's input with its gradient
    ends = 16 * model.hidden + 4 * model.query_width
    if not recomputes:
        return tokens * (model.layers * layer_bytes(model) + ends) + HALF_BYTES * cast
    # the casts are freed at the end of the forward pass, before the first layer is computed again
    inputs = tokens * (WIDE_BYTES * model.hidden * model.layers + ends)
    return inputs + max(HALF_BYTES * cast, tokens * layer_bytes(model))
