"""Models of a few thousand parameters and rows for them, built from seeds. Each is built once a process; callers get copies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeVar

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3ForSequenceClassification,
)

from posttrain.data.tokens import Tokens
from posttrain.models.policy import Policy, Scorer
from posttrain.models.tiny import TinyShape, tiny_model

SHAPE = TinyShape(hidden_size=16, intermediate_size=32, layers=2, heads=2, kv_heads=1, max_length=64)
MOE = TinyShape(
    hidden_size=16, intermediate_size=16, layers=2, heads=2, kv_heads=1, max_length=64, experts=4, experts_per_token=2
)
EOS = 2
Trunk = TypeVar("Trunk", bound=torch.nn.Module)


def sharpened(model: PreTrainedModel, by: float = 20.0) -> PreTrainedModel:
    """Larger weights, so that distributions differ from token to token instead of all being nearly uniform."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(by if parameter.dim() == 2 and parameter.shape[0] > 200 else 4.0)
    return model


def language_model(seed: int = 0, shape: TinyShape = SHAPE) -> PreTrainedModel:
    return copy.deepcopy(_language_model(seed, shape))


@cache
def _language_model(seed: int, shape: TinyShape) -> PreTrainedModel:
    return sharpened(tiny_model(shape, seed)[0]).eval()


def tied_llama(seed: int = 0, vocabulary: int = 40) -> PreTrainedModel:
    """Tied input and output embeddings, and a vocabulary small enough for exact sums."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=EOS,
        bos_token_id=1,
        pad_token_id=EOS,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8.0)
    return model


def trunk_with_score(seed: int = 0) -> PreTrainedModel:
    """A reward model or critic over the byte vocabulary."""
    model, state = _trunk_with_score(seed)
    torch.set_rng_state(state)
    return copy.deepcopy(model)


@cache
def _trunk_with_score(seed: int) -> tuple[PreTrainedModel, torch.Tensor]:
    """Return the model, and the generator's state after its weights were drawn, which tests may go on from."""
    config = tiny_model(SHAPE, seed)[0].config
    config.num_labels = 1
    torch.manual_seed(seed + 100)
    return sharpened(Qwen3ForSequenceClassification(config)).eval(), torch.get_rng_state()


class ExactNorm(torch.nn.Module):
    """Root mean square norm in the dtype of its input; those of transformers round to float32, whatever the model is in."""

    def __init__(self, weight: torch.nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = weight, epsilon

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.epsilon)


def in_double(module: Trunk) -> Trunk:
    """Return the module in float64, without a step that rounds to less."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, ExactNorm(child.weight, child.variance_epsilon))
    return module.double()


def policy(seed: int = 0, critic: bool = False, double: bool = False) -> Policy:
    made, state = _policy(language_model, trunk_with_score, seed, critic, double)
    if critic:
        torch.set_rng_state(state)
    return copy.deepcopy(made)


@cache
def _policy(
    lm: Callable[[int], PreTrainedModel], trunk: Callable[[int], PreTrainedModel], seed: int, critic: bool, double: bool
) -> tuple[Policy, torch.Tensor]:
    """Return the policy after its trials, which take four times as long as a copy, and the generator's state."""
    made = Policy(lm(seed), trunk(seed) if critic else None)
    return in_double(made) if double else made, torch.get_rng_state()


def scorer(seed: int = 0, double: bool = False) -> Scorer:
    made, state = _scorer(trunk_with_score, seed, double)
    torch.set_rng_state(state)
    return copy.deepcopy(made)


@cache
def _scorer(trunk: Callable[[int], PreTrainedModel], seed: int, double: bool) -> tuple[Scorer, torch.Tensor]:
    made = Scorer(trunk(seed))
    return in_double(made) if double else made, torch.get_rng_state()


def answers(prompts: Sequence[Tokens], seed: int, longest: int = 9) -> list[Tokens]:
    """Other responses to the prompts of given rows."""
    return [
        Tokens(p.prompt, r.response)
        for p, r in zip(prompts, rows(len(prompts) + 2, seed, 259, longest)[2:], strict=True)
    ]


def rows(count: int, seed: int = 0, vocabulary: int = 259, longest: int = 9) -> list[Tokens]:
    """Prompts and responses of uneven length with ids anywhere in the vocabulary, the last one the end of sequence."""
    generator = np.random.default_rng(seed)
    made = []
    for i in range(count):
        prompt = generator.integers(3, vocabulary, 1 + int(generator.integers(0, 6)))
        response = generator.integers(3, vocabulary, i % longest)
        made.append(Tokens(tuple(map(int, prompt)), (*map(int, response), EOS)))
    return made


def numbers(tokens: Sequence[Tokens], seed: int, scale: float = 1.0) -> list[np.ndarray]:
    """A random number for every response token."""
    generator = np.random.default_rng(seed)
    return [(scale * generator.standard_normal(len(t.response))).astype(np.float32) for t in tokens]
