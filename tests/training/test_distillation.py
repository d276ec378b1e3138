"""On-policy distillation: advantages from the teacher, and the exact gradient of the reverse KL."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from posttrain.algorithms.distill import DISTILL
from posttrain.api import tiny
from posttrain.api_training import train
from posttrain.data.teacher_prompts import teacher_ids, teacher_prompt
from posttrain.data.tokens import TextEncoder, Tokens, require_same_vocabulary
from posttrain.errors import ConfigError, DataError
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


def test_a_prompted_teacher_reads_its_own_prompt_before_the_same_answer() -> None:
    student, teacher = small.policy(), small.policy(seed=1)
    source, _ = source_of(DISTILL, student, teacher, rewards=[], weights={})
    longer = (7, 8, 9, 10, 11)
    source.sampler.problems = [replace(problem, teacher_ids=longer) for problem in source.sampler.problems]
    (rows,) = source.next(0).batches
    (own,) = (token_logprobs(student, [row.tokens for row in rows], 100, 0.9),)
    told = token_logprobs(teacher, [Tokens(longer, row.tokens.response) for row in rows], 100, 0.9)
    for row, mine, other in zip(rows, own, told, strict=True):
        assert row.tokens.prompt != longer
        assert row.advantages.tolist() == pytest.approx((other.logprobs - mine.logprobs).tolist(), abs=1e-5)
        assert row.ref_logprobs.tolist() == pytest.approx(other.logprobs.tolist(), abs=1e-5)


def test_a_teachers_prompt_has_the_rows_columns_and_leaves_earlier_messages() -> None:
    template = "{prompt} It is {answer}; not {{answer}}."
    assert teacher_prompt(template, "1+1={x}", {"answer": "2"}) == "1+1={x} It is 2; not {2}."
    asked = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1"}]
    told = teacher_prompt(template, asked, {"answer": "2"})
    assert told == [asked[0], {"role": "user", "content": "1+1 It is 2; not {2}."}]
    with pytest.raises(DataError, match="a row of the problems has no column 'answr'; did you mean 'answer'"):
        teacher_prompt("{prompt} {answr}", "1", {"answer": "2"})
    encoder = TextEncoder(byte_tokenizer(64), 64)
    row = {"prompt": "1+1=", "answer": "2"}
    assert teacher_ids(encoder, None, row, 9) is None
    assert teacher_ids(encoder, "{prompt}{answer}", row, 9) == tuple(encoder.prompt("1+1=2"))
    with pytest.raises(DataError, match="5 tokens and an answer of 60 exceed the model's context of 64"):
        teacher_ids(encoder, "{prompt}{answer}", row, 60)


def test_self_distillation_needs_a_prompt_and_learns_from_the_model_that_was_told_the_answer() -> None:
    model = tiny(seed=0, hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1)
    budget = {"steps": 2, "learning_rate": 1e-2, "batch_size": 2, "samples": 2, "max_new_tokens": 4}
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+3=", "answer": "5"}]
    with pytest.raises(ConfigError, match=r"teacher_prompt: missing\. The model before training teaches only what its"):
        train(model, "distill", rows, teacher=model, **budget)
    with pytest.raises(ConfigError, match="teacher_prompt= has no effect without a teacher"):
        train(model, "grpo", rows, reward="answer", teacher_prompt="{prompt}", **budget)
    with pytest.raises(ConfigError, match=r"has no \{prompt\}"):
        train(model, "distill", rows, teacher=model, teacher_prompt="{answer}", **budget)
    before = model.lm.get_output_embeddings().weight.detach().clone()
    history = train(model, "distill", rows, teacher=model, teacher_prompt="{answer} {prompt}", **budget)
    # the teacher is the model before training: at the first step they differ only by the prompt
    assert history[0]["kl/ref_k1"] != 0
    assert history[0]["grad_norm"] > 0
    assert not torch.equal(model.lm.get_output_embeddings().weight, before)
