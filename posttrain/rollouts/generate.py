"""Sample with transformers' `generate`, for models that store other states than keys and values of every token.

Example:
    >>> from posttrain.models.tiny import TinyShape, tiny_model
    >>> model, tokenizer = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1), seed=0)
    >>> engine = GenerateEngine(model, tokenizer.eos_token_id)
    >>> [[answer]] = engine.sample([Request((5, 6), seeds=((0,),))], SamplingSettings(max_new_tokens=3, temperature=1.0))
    >>> 1 <= len(answer.tokens) <= 3, len(answer.tokens) == len(answer.logprobs)
    (True, True)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel

from posttrain.errors import RolloutError
from posttrain.models.reach import probe_ids, trial_length
from posttrain.models.refusals import ends
from posttrain.rollouts.drawing import completion, draw, noise
from posttrain.rollouts.engine import MAX_ROWS, Completion, Request, SamplingSettings, end_ids
from posttrain.settings import context_limit
from posttrain.text import reason_of

PROBED = 8
"""Tokens that are sampled to confirm a model."""
TOLERANCE = 1e-3
"""Greatest difference of a log-probability, in nats, between sampling and a plain forward pass."""


class GenerateEngine:
    """Draws the same tokens for a seed as the native engine. Prompts of equal length share a batch, so nothing is padded."""

    def __init__(
        self, lm: PreTrainedModel, ends: int | Iterable[int], max_rows: int = MAX_ROWS, bf16: bool = False
    ) -> None:
        self.lm, self.ends, self.max_rows, self.bf16 = lm, end_ids(ends), max_rows, bf16

    def sample(self, requests: Sequence[Request], settings: SamplingSettings) -> list[list[Completion]]:
        """Return the completions of each request, in order, one per seed."""
        answers: list[list[Completion]] = [[] for _ in requests]
        by_length: dict[int, list[tuple[int, tuple[int, ...]]]] = defaultdict(list)
        for i, request in enumerate(requests):
            by_length[len(request.prompt)] += [(i, seed) for seed in request.seeds]
        training, defaults = self.lm.training, self.lm.generation_config
        self.lm.eval()
        # greedy over logits that allow only the drawn token; `generate` takes every unset option from the model's own settings
        self.lm.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=[end for end in self.ends if end >= 0] or None,
            pad_token_id=0,
        )
        try:
            for rows in by_length.values():
                for start in range(0, len(rows), self.max_rows):
                    part = rows[start : start + self.max_rows]
                    prompts, seeds = [requests[i].prompt for i, _ in part], [seed for _, seed in part]
                    for (i, _), drawn in zip(part, self._generate(prompts, seeds, settings), strict=True):
                        answers[i].append(drawn)
        finally:
            self.lm.generation_config = defaults
            self.lm.train(training)
        return answers

    def _generate(self, prompts: Sequence[Any], seeds: Sequence[Any], settings: SamplingSettings) -> list[Completion]:
        ids = torch.tensor(prompts, device=self.lm.device)
        drawing = _Drawing(seeds, settings, ids)
        with torch.no_grad(), torch.autocast(self.lm.device.type, torch.bfloat16, enabled=self.bf16):
            self.lm.generate(ids, attention_mask=torch.ones_like(ids), logits_processor=[drawing])  # type: ignore[operator]
        tokens, logprobs = (torch.cat(columns, 1).tolist() for columns in (drawing.tokens, drawing.logprobs))
        return [completion(row, numbers, self.ends) for row, numbers in zip(tokens, logprobs, strict=True)]


class _Drawing(LogitsProcessor):
    """Draw the token, keep its log-probability, and return logits that leave `generate` no other choice."""

    def __init__(self, seeds: Sequence[Sequence[int]], settings: SamplingSettings, prompts: Tensor) -> None:
        self.temperature = settings.temperature
        self.noise = noise(seeds, settings.max_new_tokens, prompts.device) if settings.temperature > 0 else None
        self.tokens: list[Tensor] = []
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = None if self.noise is None else self.noise[:, len(self.tokens), None]
        tokens, logprobs = draw(scores, self.temperature, uniform)
        self.tokens.append(tokens)
        self.logprobs.append(logprobs)
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens, 0.0)


def confirm_generate(lm: PreTrainedModel, longest: int = 0) -> None:
    """Raise RolloutError unless `generate` draws from the distributions of a plain forward pass, also past the model's windows.

    Args:
        longest: tokens of the longest row that is sampled; longer windows than are usually tried count up to it.
    """
    text = lm.config.get_text_config()
    context = context_limit(text.to_dict()) or 2**31
    prompt = probe_ids(min(trial_length(text, longest), max(1, context - PROBED)), text.vocab_size)
    new_tokens = min(PROBED, context - len(prompt))
    try:
        # two answers: some states are wrong only in a batch of several rows (RWKV)
        asked = [Request(prompt, ((0,), (1,)))]
        [answers] = GenerateEngine(lm, ()).sample(asked, SamplingSettings(new_tokens, 1.0))
    except Exception as error:  # an unusual cache may raise anything; the error names the reason
        if ends(error):
            raise
        raise RolloutError(
            f"{type(lm).__name__} cannot be sampled by transformers' generate ({reason_of(error)}); use it for SFT,"
            " a reward model or preferences, or choose another architecture, such as Qwen3 or Llama"
        ) from error
    training = lm.training
    lm.eval()
    with torch.no_grad():
        worst = max(_difference(lm, prompt, answer) for answer in answers)
    lm.train(training)
    if not worst <= TOLERANCE:
        raise RolloutError(
            f"{type(lm).__name__} samples from other distributions with its cache than without (by up to {worst:.2g} nats), so the"
            " policy would be trained on other probabilities than it sampled from; choose another architecture, such as Qwen3 or Llama"
        )


def _difference(lm: PreTrainedModel, prompt: Sequence[int], answer: Completion) -> float:
    """Return the greatest difference of the answer's log-probabilities from those of a plain forward pass."""
    row = torch.tensor([[*prompt, *answer.tokens]], device=lm.device)
    plain = lm(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    expected = plain.gather(-1, row[0, len(prompt) :, None])[:, 0]
    return float((expected - torch.tensor(answer.logprobs, device=lm.device)).abs().max())
