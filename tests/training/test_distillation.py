"""On-policy distillation: advantages from the teacher, and the exact gradient of the reverse KL."""

from __future__ import annotations

import pytest
import torch

from posttrain.algorithms.distill import DISTILL
from posttrain.api import tiny
from posttrain.api_training import train
from posttrain.data.tokens import TextEncoder, require_same_vocabulary
from posttrain.errors import ConfigError
from posttrain.models.inference import token_logprobs
from posttrain.models.tiny import byte_tokenizer
from posttrain.objectives.policy import policy_loss
from tests.models import small
from tests.training.runs import source_of


def test_the_advantage_of_a_token_is_teacher_minus_student() -> None:
    student, teacher = small.policy(), small.policy(seed=1)
    source, _ = source_of(DISTILL, student, teacher, rewards=[], weights={})
    (rows,) = source.next(0).batches
    tokens = [row.tokens for row in rows]
    own, theirs = (token_logprobs(policy, tokens, 100, 0.9) for policy in (student, teacher))
    for row, mine, other in zip(rows, own, theirs, strict=True):
        assert row.advantages.tolist() == pytest.approx((other.logprobs - mine.logprobs).tolist(), abs=1e-5)
        assert row.old_logprobs.tolist() == pytest.approx(mine.logprobs.tolist(), abs=1e-5)


def test_the_expected_gradient_is_that_of_the_reverse_kl() -> None:
    """By the exact sum over a vocabulary of five: E[A grad log p] = -grad KL(student || teacher)."""
    generator = torch.Generator().manual_seed(0)
    logits, other = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))
    student = logits.clone().requires_grad_()
    teacher = other.log_softmax(-1)
    logprobs = student.log_softmax(-1)
    advantages = (teacher - logprobs).detach()
    mask = torch.ones(1, 5, dtype=torch.bool)
    surrogate, _ = policy_loss(DISTILL, logprobs[None], logprobs.detach()[None], advantages[None], mask)
    expected_loss = (logprobs.detach().exp() * surrogate.loss[0]).sum()
    (gradient,) = torch.autograd.grad(expected_loss, student)
    again = logits.clone().requires_grad_()
    own = again.log_softmax(-1)
    (of_kl,) = torch.autograd.grad((own.exp() * (own - teacher)).sum(), again)
    assert torch.allclose(gradient, of_kl, atol=1e-14)


def test_a_teacher_is_asked_for_and_refused_where_it_has_no_effect() -> None:
    shape = {"hidden_size": 16, "intermediate_size": 16, "layers": 1, "heads": 2, "kv_heads": 1}
    model = tiny(seed=0, **shape)
    budget = {"steps": 1, "learning_rate": 0.1, "batch_size": 1}
    with pytest.raises(ConfigError, match="pass teacher= if and only if"):
        train(model, "distill", ["1"], **budget)
    with pytest.raises(ConfigError, match="pass teacher= if and only if"):
        train(model, "grpo", ["1"], reward="answer", teacher=model, **budget)


def test_a_teacher_with_another_vocabulary_is_refused() -> None:
    own, other = (TextEncoder(byte_tokenizer(64), 64) for _ in range(2))
    require_same_vocabulary(other, own, "teacher")
    other.tokenizer.add_tokens(["<new>"])
    with pytest.raises(
        ConfigError, match="teacher: 1 of its 260 tokens have another id in the model's vocabulary of 259"
    ):
        require_same_vocabulary(other, own, "teacher")
