"""Norms and rotations in fewer passes: the numbers of transformers' own modules, and only for modules with the same function."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Olmo2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from posttrain.models.fused import fuse, rms_norm, rotated_pair

SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).requires_grad_()


def test_norm_by_hand() -> None:
    """mean(x^2) = 12.5, so r = 0.2828427; with dy = (1, 0): dx = r w (1 - x1^2 / 25, -x1 x2 / 25), dw = r x dy."""
    states, weight = torch.tensor([[3.0, 4.0]], requires_grad=True), torch.tensor([2.0, 5.0], requires_grad=True)
    normalised = rms_norm(states, weight, 0.0)
    normalised.backward(torch.tensor([[1.0, 0.0]]))
    r = 12.5**-0.5
    assert normalised.tolist() == [pytest.approx([6 * r, 20 * r])]
    assert states.grad is not None
    assert weight.grad is not None
    # r (w dy - r^2 x mean(x w dy)), and mean(x w dy) = 3
    assert states.grad.tolist() == [pytest.approx([r * (2 - 9 / 12.5), -r * 12 / 12.5])]
    assert weight.grad.tolist() == pytest.approx([3 * r, 0.0])


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_transformers_in_float64(frozen: bool) -> None:
    states, weight, gradient = drawn(1, 50, 2, 8), drawn(8), drawn(1, 50, 2, 8).detach()
    weight.requires_grad_(not frozen)
    rms_norm(states.transpose(1, 2), weight, 1e-6).transpose(1, 2).backward(gradient)
    wide = states.detach().double().requires_grad_()
    factor = weight.detach().double().requires_grad_()
    (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * factor).backward(gradient.double())
    assert torch.allclose(states.grad.double(), wide.grad, atol=2e-6)
    assert (weight.grad is None) if frozen else torch.allclose(weight.grad.double(), factor.grad, atol=1e-5)


def test_gradient_of_many_rows_is_exact_for_every_number_of_threads() -> None:
    """Row after row added in float32, the error would be 1.6e-6 at 8,000 rows."""
    states, weight, gradient = drawn(1, 8000, 128).detach(), drawn(128), drawn(8000, 128)[None].detach()
    found, threads = [], torch.get_num_threads()
    for number in (1, 2):
        torch.set_num_threads(number)
        try:
            found += torch.autograd.grad(rms_norm(states, weight, 1e-6), weight, gradient)
        finally:
            torch.set_num_threads(threads)
    wide = states.double()
    exact = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * gradient.double()).sum((0, 1))
    assert torch.equal(*found)
    assert float((found[0] - exact).norm() / exact.norm()) < 5e-7


def test_rotation_is_that_of_transformers() -> None:
    pair, angles = (drawn(1, 3, 7, 8), drawn(1, 2, 7, 8)), drawn(1, 7, 8).detach()
    gradients = [drawn(*states.shape).detach() for states in pair]
    found = []
    for rotate in (rotated_pair, apply_rotary_pos_emb):
        outputs = rotate(*pair, angles.cos(), angles.sin())
        found.append([*outputs, *torch.autograd.grad(outputs, pair, gradients)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "changed"),
    [
        (Qwen3Config(**SIZES), 6),
        (LlamaConfig(**SIZES), 4),
        # its norms multiply by 1 + w, so only the rotation is the same function
        (Gemma2Config(**SIZES), 1),
        # its norms multiply in float32, and its rotation casts
        (Olmo2Config(**SIZES), 0),
    ],
    ids=lambda value: value.model_type if hasattr(value, "model_type") else str(value),
)
def test_models_compute_as_before(config: object, changed: int) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.arange(24).view(2, 12)
    before = model(input_ids=ids).logits
    before.logsumexp(-1).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    assert fuse(model) == changed
    assert fuse(model) == 0
    after = model(input_ids=ids).logits
    after.logsumexp(-1).sum().backward()
    assert torch.allclose(after, before, atol=1e-6)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-5)


def test_other_dtypes_keep_their_own_code() -> None:
    norm, states = LlamaRMSNorm(8), drawn(3, 8)
    given = [states.bfloat16(), states.double()]
    own = [norm(each) for each in given]
    assert fuse(norm) == 1
    assert all(torch.equal(norm(each), wanted) for each, wanted in zip(given, own, strict=True))


def test_a_copy_computes_with_its_own_weights() -> None:
    norm, states = LlamaRMSNorm(8), drawn(3, 8)
    fuse(norm)
    assert type(norm).__name__ == "LlamaRMSNorm"
    copied = copy.deepcopy(norm)
    torch.nn.init.constant_(copied.weight, 2.0)
    assert torch.allclose(copied(states), 2 * norm(states))


def test_a_deleted_model_is_freed_without_the_collector() -> None:
    model = AutoModelForCausalLM.from_config(Qwen3Config(**SIZES))
    layer = model.model.layers[0]
    fuse(layer)
    kept = [weakref.ref(module) for module in (layer.input_layernorm, layer.self_attn)]
    del model, layer
    assert [reference() for reference in kept] == [None, None]
