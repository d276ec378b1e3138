"""Recognise the models whose layers posttrain computes with its own functions: Llama, Mistral, Qwen 2 and 3, SmolLM 3 and equal ones.

Classes are compared by their code, as in `posttrain.models.fused`. A module that a hook or a different function changes is not plain.
One with an adapter is only if the caller asks for it.

Example:
    >>> from posttrain.models.tiny import TinyShape, tiny_model
    >>> model, _ = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1), seed=0)
    >>> is_plain_model(model.model), is_plain_layer(model.model.layers[0]), is_plain_layer(model.lm_head)
    (True, True, False)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.smollm3 import modeling_smollm3 as smollm3

from posttrain.models.fused import has_code_of, is_rms_norm
from posttrain.models.last_layer import NarrowLayer

MODELS = (llama.LlamaModel, mistral.MistralModel, qwen2.Qwen2Model)
LAYERS = (llama.LlamaDecoderLayer,)
ATTENTIONS = (
    llama.LlamaAttention,
    mistral.MistralAttention,
    qwen2.Qwen2Attention,
    qwen3.Qwen3Attention,
    smollm3.SmolLM3Attention,
)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def window_of(attention: nn.Module) -> int | None:
    """Return the number of tokens that a query of a plain attention sees, None without a window."""
    # Mistral's attention reads the configuration
    windowed: Any = attention.config if _has_code_of_any(type(attention), (mistral.MistralAttention,)) else attention
    window: int | None = getattr(windowed, "sliding_window", None)
    return window


def is_plain_model(model: Any, adapted: bool = False) -> bool:
    """Return True if all of a model without its head is plain.

    Args:
        adapted: also take linear modules with a low-rank adapter, which must be called as modules.
    """
    return is_plain_trunk(model) and all(is_plain_layer(layer, adapted) for layer in model.layers)


def is_plain_trunk(model: Any) -> bool:
    """Return True if the loop of a model over its layers, its embeddings and its last norm are plain; it does not look at the layers."""
    if not (_has_forward_of(model, MODELS) and is_rms_norm(model.norm) and type(model.embed_tokens) is nn.Embedding):
        return False
    return _unchanged(model.embed_tokens) and _unchanged(model.norm) and len(model.layers) > 0


def is_plain_layer(layer: Any, adapted: bool = False) -> bool:
    """Return True if a module is a plain decoder layer, `adapted` as in `is_plain_model`."""
    if not _has_forward_of(layer, LAYERS):
        return False
    attention, mlp = layer.self_attn, layer.mlp
    if not (_has_forward_of(attention, ATTENTIONS) and _has_forward_of(mlp, (llama.LlamaMLP,))):
        return False
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [norm for name in ("q_norm", "k_norm") if (norm := getattr(attention, name, None)) is not None]
    modules = [*(getattr(attention, name) for name in PROJECTIONS), mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    linear = all(_is_linear(module) or (adapted and is_adapted(module)) for module in modules)
    return all(map(_is_norm, norms)) and linear and len(norms) in (2, 4)


def is_adapted(module: Any) -> bool:
    """Return True for a linear module with a low-rank adapter of peft, by its class's name: peft is not always installed."""
    kind = type(module)
    is_lora = (kind.__module__, kind.__qualname__) == ("peft.tuners.lora.layer", "Linear")
    return is_lora and _unchanged(module) and _is_linear(module.base_layer)


def _is_norm(module: nn.Module) -> bool:
    return is_rms_norm(module) and _unchanged(module)


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear and _unchanged(module)


def _has_forward_of(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Return True if the module's forward function is the same as that of one of `kinds`."""
    return _unchanged(module) and _has_code_of_any(type(module), kinds)


@cache
def _has_code_of_any(own: type[nn.Module], kinds: tuple[type[nn.Module], ...]) -> bool:
    return any(has_code_of(_innermost(own), _innermost(kind)) for kind in kinds)


def _innermost(kind: type[nn.Module]) -> Callable[..., Any]:
    """Return the forward function of a class without its decorators."""
    function: Any = kind.forward
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    found: Callable[..., Any] = function
    return found


def _unchanged(module: nn.Module) -> bool:
    """Return True if a call of the module is one of its class: no function replaces it, and no hook changes a number."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    hooks += [*module._backward_pre_hooks.values(), *module._backward_hooks.values()]
    return "forward" not in vars(module) and all(map(_keeps_numbers, hooks))


def _keeps_numbers(hook: Any) -> bool:
    """Return True for a hook that narrows the last layer, and for that of checkpointing, which marks embeddings for the gradient."""
    marks = getattr(hook, "__code__", None) in PreTrainedModel.enable_input_require_grads.__code__.co_consts
    return marks or isinstance(getattr(hook, "__self__", None), NarrowLayer)
