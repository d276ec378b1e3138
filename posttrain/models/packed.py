"""Hidden states of a flat batch: every token is computed once, by an attention function that transformers calls in each layer.

Padded rows are used instead if a model does not accept attention functions, or mixes tokens in other ways (convolutions, state spaces,
position biases). `prepare` finds out with a trial.

Example:
    >>> from posttrain.models.tiny import TinyShape, tiny_model
    >>> model, _ = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1), seed=0)
    >>> prepare(model)
    True
    >>> batch = collate(PROBE)
    >>> hidden_states(model, batch, packs=True, reads=batch.predicting()).shape
    torch.Size([11, 16])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from posttrain.data.batches import TokenBatch, collate
from posttrain.data.layout import Attended, Parts, Reads, masked_parts, take_parts
from posttrain.data.offsets import ByOffsets, takes_offsets
from posttrain.data.tokens import Tokens
from posttrain.data.transfer import together
from posttrain.errors import ModelError
from posttrain.models.context import (
    ContextGroup,
    Split,
    active,
    enough_heads,
    heads_for_tokens,
    joined_slices,
    own_heads,
    own_slice,
    padded_length,
    tokens_for_heads,
)
from posttrain.models.flash import version
from posttrain.models.fused import fuse
from posttrain.models.kernel_trial import refusal, refusal_of
from posttrain.models.kernels import Scores, attention, stores_scores
from posttrain.models.last_layer import narrow_last_layer
from posttrain.models.plain_layer import join_layers
from posttrain.models.reach import SMALL_WINDOW, find_reach, probe_ids, shrunk
from posttrain.models.refusals import ends
from posttrain.models.varlen import takes_size, varlen_attention
from posttrain.settings import CONTEXT_PARALLEL

NAME = "posttrain_packed"
WITHOUT_EFFECT = {"dropout", "is_causal", "output_attentions", "position_ids", "use_cache"}
"""Arguments of attention functions that do not change causal attention."""
REACH = "_posttrain_reach"
"""Attribute of a prepared model: tokens of the longest row that packed attention computes as the model does, None without a limit."""
REFUSED = "cannot be used here"
"""Words in the name of the attention if the kernel of the device failed its trial."""
OTHER_MIXERS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError)
"""Errors of a trial: attention that is not plain raises TypeError, layers that mix tokens in other ways one of the rest."""
PROBE = (Tokens((3, 4), (5, 6, 7)), Tokens((3, 4), (6,)), Tokens((5,), (3, 4)))
"""Two rows that share a prompt, and one with its own prompt."""


class Opaque:
    """A value that passes through a compiled layer unseen: the number of parts and their sizes differ in each batch."""

    def __init__(self, value: Any) -> None:
        self.value = value


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    parts: Parts | Split | Opaque | None = None,
    reads: Reads | Opaque | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return attention over a flat batch [1, heads, tokens, size] by its parts; tokens outside all parts get 0.

    Without parts this is attention over padded rows with transformers' mask. `reads` is for the last layer, which has already replaced
    its parts.

    Raises:
        TypeError: the attention has more than windows, soft caps and sinks.
    """
    found: Parts | Split | None = parts.value if isinstance(parts, Opaque) else parts
    scores = Scores(scaling, sliding_window, softcap, s_aux)
    if found is None:
        return padded_attention(module, query, key, value, attention_mask, scores, **kwargs)
    refuse_more_than_plain(kwargs)
    states = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    outputs = _shared(found, *states, scores) if isinstance(found, Split) else _over_parts(found, *states, scores)
    return outputs[None], None


def _over_parts(found: Parts, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """Return the outputs [tokens, heads, size] of all tokens."""
    shape = (*query.shape[:-1], value.shape[-1])
    if not found:
        return query.new_zeros(shape)
    attended, order = _attended(found, query, key, value, scores)
    if order is None:
        return attended
    every = attended.new_empty if len(order) == len(query) else attended.new_zeros
    return every(shape).index_copy_(0, order, attended)


def _shared(split: Split, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """Return the outputs of this process's tokens, by attention over all tokens with its own heads."""
    group = split.group
    # one exchange for all three would need equal numbers of heads
    every = query, enough_heads(key, group), enough_heads(value, group)
    states = [heads_for_tokens(each, group)[: split.tokens] for each in every]
    if scores.sinks is not None:
        scores = scores._replace(sinks=own_heads(scores.sinks, group))
    outputs = _over_parts(split.parts, states[0], states[1], states[2], scores)
    missing = padded_length(split.tokens, group.size) - split.tokens
    return tokens_for_heads(functional.pad(outputs, (0, 0, 0, 0, 0, missing)), group)


def padded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scores: Scores,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return attention over padded rows with transformers' mask, which contains the window."""
    causal = kwargs.get("is_causal") is not False and getattr(module, "is_causal", True)
    square = mask is None and query.shape[2] == key.shape[2] > 1
    if scores.are_plain and not (causal and square and stores_scores(query, key, mask)):
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scores.scaling, **kwargs)
    return attention(query, key, value, mask, scores).transpose(1, 2), None


def _attended(found: Parts, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> tuple[Tensor, Tensor | None]:
    """Return the outputs [queries, heads, size] and the token of each; None if these are all tokens in order."""
    first = found[0]
    if isinstance(first, ByOffsets):
        if torch.is_autocast_enabled(query.device.type):
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = (states.to(dtype) for states in (query, key, value))
        fits = scores.softcap is None and takes_size(query.shape[-1], value.shape[-1])
        if fits and not refusal(query, key, scores):
            outputs = varlen_attention(query, key, value, first, scores)
            return outputs, None if first.in_order else first.own.queries
        found = _masked(first, query.device)
    parts = [part for part in found if isinstance(part, Attended)]
    attended = torch.cat([_attend(part, query, key, value, scores) for part in parts])
    return attended, torch.cat([part.tokens for part in parts])


def _masked(layout: ByOffsets, device: torch.device) -> Parts:
    """Return the layout as parts with masks, for attention that the kernel does not compute. They are made once a batch."""
    if not layout.masked:
        parts: Parts = masked_parts(layout.segments)
        moved = together([tensor for part in parts for tensor in part.tensors()], device)
        layout.masked.extend(take_parts(parts, iter(moved)))
    return tuple(layout.masked)


def refuse_more_than_plain(arguments: Mapping[str, Any]) -> None:
    """Raise TypeError if a model passes an argument that plain attention would silently ignore."""
    more = {name for name, given in arguments.items() if given is not None} - WITHOUT_EFFECT
    if more:
        raise TypeError(f"attention with {', '.join(sorted(more))} is not plain attention")


def _attend(part: Attended, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """Return the outputs of the part's real queries, [queries, heads, size]."""
    states = (_rows(query, part.queries), _rows(key, part.keys), _rows(value, part.keys))
    gathered = attention(*states, part.within(scores.window), scores)
    return gathered.transpose(1, 2).flatten(0, 1).index_select(0, part.real)


def _rows(states: Tensor, index: Tensor) -> Tensor:
    """Gather [tokens, heads, size] at [segments, length] into [segments, heads, length, size]."""
    gathered: Tensor = states.index_select(0, index.flatten()).unflatten(0, index.shape)
    return gathered.transpose(1, 2)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def prepare(model: PreTrainedModel) -> bool:
    """Make `model` compute flat batches. Return False, with the model unchanged, if only padded rows work."""
    before = model.config._attn_implementation
    if before == NAME:
        return True
    if not model._can_set_attn_implementation():
        return False
    batch = collate(PROBE).to(model.device)
    own = _probed(model, batch, _padded)
    fuse(model)
    join_layers(model)
    model.set_attn_implementation(NAME)
    try:
        packs = _agree(_probed(model, batch, _packed), own)
        reach = find_reach(model.config, partial(_packs_long, model, before), partial(_packs_in, model)) if packs else 0
        setattr(model, REACH, reach)
        packs = getattr(model, REACH) != 0
    # padded rows are the model's own way of computing
    except OTHER_MIXERS as error:
        if ends(error):
            raise
        packs = False
    if not packs:
        # pyrefly: ignore[bad-argument-type]
        model.set_attn_implementation(before)
        return False
    with narrow_last_layer(model) as narrowed:
        narrowed.keep = _narrows(model, batch, own)
    return True


def _narrows(model: PreTrainedModel, batch: TokenBatch, own: Tensor) -> bool:
    """Return True if the last layer computes only the tokens that are read; a layer that cannot is left unchanged."""
    try:
        return all(
            _agree(_probed(model, batch, partial(_packed, reads=reads))[reads.tokens], own[reads.tokens])
            for reads in (batch.predicting(), batch.ending())
        )
    except OTHER_MIXERS as error:
        if ends(error):
            raise
        return False


def _packs_long(model: PreTrainedModel, own: str | None, length: int) -> bool:
    """Return True if one row of `length` tokens has the same hidden states packed, padded, and as the attention `own` computes them."""
    ids = probe_ids(length, model.config.get_text_config().vocab_size)
    batch = collate([Tokens(ids[:1], ids[1:])]).to(model.device)
    packed, padded = _probed(model, batch, _packed), _probed(model, batch, _padded)
    # pyrefly: ignore[bad-argument-type]
    model.set_attn_implementation(own)
    wanted = _probed(model, batch, _padded)
    model.set_attn_implementation(NAME)
    return _agree(packed, wanted) and _agree(padded, wanted)


def _packs_in(model: PreTrainedModel, window: int) -> bool:
    """Return True if rows longer than `window` have the same hidden states packed and padded, by a trial with a short one in its place."""
    ids = probe_ids(4 * SMALL_WINDOW, model.config.get_text_config().vocab_size)
    batch = collate([Tokens(ids[:4], ids[4:]), Tokens(ids[:4], ids[5:])]).to(model.device)
    usual = _probed(model, batch, _padded)
    with shrunk(model, window, SMALL_WINDOW):
        padded, packed = _probed(model, batch, _padded), _probed(model, batch, _packed)
    # padded rows that the short window does not change would prove nothing
    return _agree(packed, padded) and not _agree(padded, usual)


@torch.no_grad()
def _probed(model: PreTrainedModel, batch: TokenBatch, way: Callable[[PreTrainedModel, TokenBatch], Tensor]) -> Tensor:
    training = model.training
    model.eval()
    hidden = way(model, batch)
    model.train(training)
    return hidden


def _agree(packed: Tensor, own: Tensor) -> bool:
    difference, scale = (packed - own).abs().max(), own.abs().max()
    return float(difference) <= max(1e-4, 4 * torch.finfo(own.dtype).eps) * float(scale)


def hidden_states(model: PreTrainedModel, batch: TokenBatch, packs: bool, reads: Reads) -> Tensor:
    """Return the last hidden states [tokens, hidden], without the head. Only positions in `reads` are valid; the others are undefined.

    Args:
        packs: the result of `prepare` for this model.
    """
    group = active()
    if computes_flat(model, batch, packs):
        return _packed(model, batch, reads) if group is None else _packed_slices(model, batch, group)
    if group is not None:
        raise ModelError(
            f"{CONTEXT_PARALLEL} = {group.size}: {type(model).__name__} computes padded rows, whose tokens processes cannot share; remove"
            " the variable, so that each process computes its own rows"
        )
    return _padded(model, batch)


def computes_flat(model: PreTrainedModel, batch: TokenBatch, packs: bool) -> bool:
    """Return True if a batch is computed flat: `packs`, the result of `prepare`, is True, and its longest row within the model's reach."""
    reach = getattr(model, REACH, None)
    return packs and (reach is None or batch.rows.shape[1] <= reach)


def _packed_slices(model: PreTrainedModel, batch: TokenBatch, group: ContextGroup) -> Tensor:
    """Return the states of all tokens, of which each process of the group computes a slice."""
    tokens = len(batch.input_ids)
    output = model.base_model(
        input_ids=own_slice(batch.input_ids, group)[None],
        position_ids=own_slice(batch.positions, group)[None],
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device),
        use_cache=False,
        parts=Split(batch.parts, tokens, group),
        reads=None,
    )
    return joined_slices(output.last_hidden_state[0], group, tokens)


def attention_name(module: nn.Module, device: torch.device) -> str:
    """Return the name of the attention that the first language model in `module` computes with on the device, under autocast's dtype."""
    model = next(each for each in module.modules() if isinstance(each, PreTrainedModel))
    if model.config._attn_implementation != NAME:
        return "the model's own, over padded rows"
    config, reach = model.config.get_text_config(), getattr(model, REACH, None)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    by_offsets = takes_offsets(device) and takes_size(size, getattr(config, "v_head_dim", None) or size)
    by_offsets = by_offsets and getattr(config, "attn_logit_softcapping", None) is None
    name = "scaled dot-product attention with masks"
    if by_offsets:
        heads = (
            config.num_attention_heads,
            getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            size,
        )
        name = _by_offsets(name, _kinds(model), device, heads)
    return name if reach is None else f"{name}; over padded rows beyond {reach} tokens"


def _by_offsets(
    masks: str, kinds: Sequence[tuple[str, Scores]], device: torch.device, heads: tuple[int, int, int]
) -> str:
    """Return the name of attention by offsets, with the kinds of layers for which its kernel failed the trial."""
    dtype = torch.get_autocast_dtype(device.type)
    reasons = {words: refusal_of(device, dtype, heads, scores) for words, scores in kinds}
    flash = f"FlashAttention{version()} by offsets"
    failed = {words: reason for words, reason in reasons.items() if reason}
    if len(set(failed.values())) == 1 and len(failed) == len(kinds):
        return f"{masks}, because {flash} {REFUSED} ({next(iter(failed.values()))})"
    return "; ".join(
        [flash, *(f"{masks} {words}, for which it {REFUSED} ({reason})" for words, reason in failed.items())]
    )


def _kinds(model: PreTrainedModel) -> list[tuple[str, Scores]]:
    """Return the kinds of a model's layers that its kernel is tried for, each with its name."""
    config = model.config.get_text_config()
    sliding = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    types = getattr(config, "layer_types", None) or ["sliding_attention" if sliding else "full_attention"]
    sinks = next((p for name, p in model.named_parameters() if name.endswith(".sinks")), None)
    kinds = {"in layers with a window": 1} if any(each == "sliding_attention" for each in types) else {}
    if any(each != "sliding_attention" for each in types):
        kinds["in layers without a window"] = 0
    return [(words, Scores(window=window or None, sinks=sinks)) for words, window in sorted(kinds.items())]


def _packed(model: PreTrainedModel, batch: TokenBatch, reads: Reads | None = None) -> Tensor:
    # transformers passes a mask of four dimensions through; without one it would build [tokens, tokens]
    placeholder = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)
    output = model.base_model(
        input_ids=batch.input_ids[None],
        position_ids=batch.positions[None],
        attention_mask=placeholder,
        use_cache=False,
        parts=batch.parts,
        reads=reads,
    )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


def _padded(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """Compute padded rows. Padding follows every real token, so causal attention never sees it and no mask is needed."""
    hidden: Tensor = model.base_model(input_ids=batch.input_ids[batch.rows], use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[batch.place]
