"""Norms and rotary embeddings of a model in fewer passes over memory, on CPUs.

PyTorch has no CPU kernel for either. Written in single operators, as in transformers, a norm and its gradient read or write all states
about twenty times, and a rotation about fifteen times. Here they take half as many.

A module is replaced only if its class has the same bytecode as Llama's, so the function is the same. Other modules, dtypes and devices
keep their own code.

Example:
    >>> from posttrain.models.tiny import TinyShape, tiny_model
    >>> model, _ = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1), seed=0)
    >>> fuse(model)  # two norms of the layer, two of its attention, the last norm, and one rotation
    6
"""

from __future__ import annotations

from functools import cache
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.llama import modeling_llama as llama

ROTATION = "apply_rotary_pos_emb"
"""Name, common to most architectures, of the function that rotates queries and keys."""


def fuse(model: nn.Module) -> int:
    """Give the norms and attentions of `model` faster functions with the same results. Return how many modules have got one."""
    changed = 0
    for module in model.modules():
        faster = _faster(type(module))
        if faster is not None and "forward" not in vars(module):
            # a class, because a function that refers to its own module would keep a deleted model in memory
            module.__class__ = faster
            changed += 1
    return changed


@cache
def _faster(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Return a class of the same name with a faster forward function, or None."""
    if _same_code(kind.forward, llama.LlamaRMSNorm.forward):
        return with_forward(kind, _norm_of(kind))
    if _rotates_as_llama(kind.forward):
        return with_forward(kind, _rotating(kind.forward))
    return None


def is_rms_norm(module: nn.Module) -> bool:
    """Return True if a module computes Llama's norm, also if `fuse` has changed it."""
    own = type(module).forward
    return _same_code(own, llama.LlamaRMSNorm.forward) or _same_code(own, _norm_of(llama.LlamaRMSNorm))


def has_code_of(function: Any, other: Any) -> bool:
    """Return True if two functions compute the same with the same names."""
    return _same_code(function, other)


def with_forward(kind: type[nn.Module], forward: Any) -> type[nn.Module]:
    """Return a class of the same name with a different forward function."""
    own = {"forward": forward, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), own)


def _norm_of(kind: type[nn.Module]) -> Any:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if _takes(hidden_states, self.weight):
            return rms_norm(hidden_states, self.weight, self.variance_epsilon)
        own: Tensor = kind.forward(self, hidden_states)
        return own

    return forward


def _rotating(forward: FunctionType) -> FunctionType:
    """Return an attention's own forward function, which finds a different rotation under the same name."""
    known = {**forward.__globals__, ROTATION: rotated_pair}
    own = FunctionType(forward.__code__, known, forward.__name__, forward.__defaults__, forward.__closure__)
    own.__kwdefaults__ = forward.__kwdefaults__
    return own


def _rotates_as_llama(forward: Any) -> bool:
    """Return True if a module's forward function calls a rotation that is the same function as Llama's."""
    if not isinstance(forward, FunctionType) or ROTATION not in forward.__code__.co_names:
        return False
    pairs = ((ROTATION, llama.apply_rotary_pos_emb), ("rotate_half", llama.rotate_half))
    return all(_same_code(forward.__globals__.get(name), function) for name, function in pairs)


def _same_code(function: Any, other: Any) -> bool:
    return isinstance(function, FunctionType) and _code(function.__code__) == _code(other.__code__)


def _code(code: CodeType) -> tuple[Any, ...]:
    """Return what a function computes, without its place in a file; the first constant is its docstring."""
    return code.co_code, code.co_names, code.co_varnames, [each for each in code.co_consts if not isinstance(each, str)]


def _takes(states: Tensor, other: Tensor) -> bool:
    """Return True if the functions here compute these tensors: float32 of a CPU, which neither a compiler nor processes split."""
    plain = type(states) is Tensor and type(other) in (Tensor, nn.Parameter)
    wide = states.dtype == other.dtype == torch.float32
    return plain and wide and states.device.type == "cpu" and not torch.compiler.is_compiling()


def scale_of_norm(states: Tensor, epsilon: float) -> Tensor:
    """Return 1 / sqrt(mean(x^2) + epsilon) over the last dimension, [..., 1]."""
    squares = torch.linalg.vector_norm(states, dim=-1, keepdim=True).square_()
    return squares.div_(states.shape[-1]).add_(epsilon).rsqrt_()


def rotate(states: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    """Return x cos + (-x2, x1) sin for halves x1 and x2 of each head, in `out` if there is one, and in the wider dtype otherwise."""
    half = states.shape[-1] // 2
    rotated = torch.mul(states, cos, out=out)
    states = states.to(rotated.dtype)
    rotated[..., :half].addcmul_(states[..., half:], sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(states[..., :half], sin[..., half:])
    return rotated


def rotate_back(gradient: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the gradient dy cos + (dy2 sin2, -dy1 sin1) of a rotation's input."""
    half = gradient.shape[-1] // 2
    back = gradient * cos
    back[..., :half].addcmul_(gradient[..., half:], sin[..., half:])
    back[..., half:].addcmul_(gradient[..., :half], sin[..., :half], value=-1)
    return back


def rms_norm(states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return x w / sqrt(mean(x^2) + epsilon) over the last dimension (1910.07467)."""
    normalised: Tensor = _Normalised.apply(states, weight, epsilon)
    return normalised


class _Normalised(torch.autograd.Function):
    """With r = 1 / sqrt(mean(x^2) + epsilon), y = r x w and dx = r (w dy - r^2 x mean(x w dy)).

    PyTorch's kernel for the gradient of a layer norm computes that, given a mean of 0, less r mean(w dy), which is added.
    """

    @staticmethod
    # pyrefly: ignore[bad-override]
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        scale = scale_of_norm(states, epsilon)
        ctx.save_for_backward(states, weight, scale)
        return (states * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        states, weight, scale = ctx.saved_tensors
        wanted_states, wanted_weight, _ = ctx.needs_input_grad
        size, gradient = states.shape[-1], gradient.contiguous()
        of_states = of_weight = None
        if wanted_states:
            of_states, _, _ = torch.ops.aten.native_layer_norm_backward(
                gradient, states, [size], torch.zeros_like(scale), scale, weight, None, [True, False, False]
            )
            of_states += (gradient @ weight).div_(size)[..., None].mul_(scale)
        if wanted_weight:
            # the kernel's own sum adds row after row: 27 times this error at 8,000 rows, and other bits with other numbers of threads
            of_weight = (gradient * states).mul_(scale).flatten(0, -2).sum(0)
        return of_states, of_weight, None


def rotated_pair(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Return queries and keys rotated by their positions, as transformers' function of Llama does."""
    if not (_takes(q, cos) and _takes(k, sin)):
        return llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotated.apply(q, cos, sin), _Rotated.apply(k, cos, sin)


class _Rotated(torch.autograd.Function):
    """Autograd function of a rotation (2104.09864)."""

    @staticmethod
    # pyrefly: ignore[bad-override]
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(states, cos, sin)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return rotate_back(gradient, *ctx.saved_tensors), None, None
