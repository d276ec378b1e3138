"""Check by forward passes that a model is causal and that its logits are the plain output of its head; other models are refused.

Example:
    >>> from posttrain.models.tiny import TinyShape, tiny_model
    >>> model, _ = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1), seed=0)
    >>> check_policy(model, "models/base")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.errors import ModelError
from posttrain.models.reach import probe_ids, trial_length
from posttrain.models.refusals import ends
from posttrain.settings import context_limit

CAUSAL_TOLERANCE = 1e-4
"""Greatest change of an earlier hidden state by later tokens, as a share of the largest one: experts compute in varying batches."""
LOGIT_TOLERANCE = 1e-3
"""Greatest difference of a log-probability, in nats."""


@torch.no_grad()
def check_policy(model: PreTrainedModel, source: str | Path) -> None:
    """Raise ModelError unless the states of a row's start are the same without its end, and the logits are the head's output.

    Log-probabilities here are fused with the head. If a model scales, caps or transforms its logits (Gemma 2, Cohere, Granite, Falcon-H1
    and others), it would be trained on other log-probabilities than it samples from.
    """
    name, text = type(model).__name__, model.config.get_text_config()
    length = min(trial_length(text), context_limit(text.to_dict()) or 2**31)
    row = torch.tensor([probe_ids(length, text.vocab_size)], device=model.device)
    hidden, logits = _outputs(model, row, source)
    if not bool(torch.isfinite(logits).all()):
        raise ModelError(
            f"{source}: the logits of {name} are NaN or infinite although its weights are finite: a setting of config.json, such as a"
            " norm's epsilon or rope, is wrong, or the weights are far too large; fetch the model again"
        )
    # most of the row: sparse attention leaks only beyond the tokens that it keeps
    start, _ = _outputs(model, row[:, : length - length // 4], source)
    change = float((hidden[:, : start.shape[1]] - start).abs().max())
    if not change <= CAUSAL_TOLERANCE * float(hidden.abs().max()):
        raise ModelError(
            f"{source}: {name} is not causal: later tokens change the states of earlier ones (by up to {change:.2g}), so it has no"
            " probability of a next token; give a causal language model, such as Qwen3 or Llama, or set is_decoder: true in its"
            " config.json if it has such an option"
        )
    head: Any = model.get_output_embeddings()
    if head is not None and head.weight.shape[-1] == hidden.shape[-1]:
        plain = torch.nn.functional.linear(hidden, head.weight, head.bias).log_softmax(-1)
        own = logits.log_softmax(-1)
        if plain.shape == own.shape and bool((plain - own).abs().max() <= LOGIT_TOLERANCE):
            return
    raise ModelError(
        f"{source}: the logits of {name} are not the plain output of its head, so training would use"
        " other log-probabilities than sampling does; choose an architecture with plain logits, such as Qwen3 or Llama"
    )


def _outputs(model: PreTrainedModel, ids: Tensor, source: str | Path) -> tuple[Tensor, Tensor]:
    """Return last hidden states and logits of one row. Raises ModelError if the model does not compute them from token ids."""
    training = model.training
    model.eval()  # dropout would change the states from one pass to the next
    try:
        hidden: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    # models of other modalities want other inputs and may raise anything; the error becomes the reason
    except Exception as error:
        if ends(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{source}: {type(model).__name__} does not compute logits from a row of token ids ({type(error).__name__}: {reason});"
            " choose a causal language model, such as Qwen3 or Llama"
        ) from error
    finally:
        model.train(training)
    return hidden, logits
