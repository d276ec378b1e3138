"""Sampling in process, with the trainer's own weights: prompts are computed once for all their samples, finished rows leave the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from posttrain.errors import RolloutError
from posttrain.rollouts.engine import MAX_ROWS, Completion, Request, SamplingSettings, uniforms

COMPACT_BELOW = 0.75
"""Rows are gathered into a smaller batch once fewer than this share of them still run."""


class NativeEngine:
    """Continues prompts with any causal language model of transformers that keeps a standard key-value cache."""

    def __init__(self, lm: PreTrainedModel, eos_id: int, max_rows: int = MAX_ROWS, bf16: bool = False) -> None:
        self.lm, self.eos_id, self.max_rows, self.bf16 = lm, eos_id, max_rows, bf16

    @torch.no_grad()
    def sample(self, requests: Sequence[Request], settings: SamplingSettings) -> list[list[Completion]]:
        """Completions of each request, in order, one per seed. Raises RolloutError where prompt and answer exceed the context."""
        if not requests:
            return []
        if any(not request.prompt for request in requests):
            raise RolloutError(
                "a prompt has no tokens, so there is nothing to predict the first token from; remove such rows"
            )
        limit = self.lm.config.max_position_embeddings
        longest = max(len(r.prompt) for r in requests)
        if longest + settings.max_new_tokens > limit:
            raise RolloutError(
                f"a prompt of {longest} tokens and {settings.max_new_tokens} new ones exceed the model's context of {limit};"
                " lower max_new_tokens or validation.max_prompt_tokens"
            )
        window = getattr(self.lm.config, "sliding_window", None)
        windowed = "sliding_attention" in (getattr(self.lm.config, "layer_types", None) or ["sliding_attention"])
        if window and windowed and longest + settings.max_new_tokens > window:
            raise RolloutError(
                f"this model attends over a window of {window} tokens, and {longest} + {settings.max_new_tokens} tokens exceed it;"
                " the native engine keeps the whole context: shorten prompts or answers, or choose a model without a window"
            )
        answers: list[list[Completion]] = []
        training = self.lm.training
        self.lm.eval()
        for part in self._parts(requests):
            with torch.autocast(self.lm.device.type, torch.bfloat16, enabled=self.bf16):
                answers += _Decoding(self.lm, self.eos_id, part, settings).run()
        self.lm.train(training)
        return answers

    def _parts(self, requests: Sequence[Request]) -> list[list[Request]]:
        parts: list[list[Request]] = [[]]
        rows = 0
        for request in requests:
            if parts[-1] and rows + len(request.seeds) > self.max_rows:
                parts.append([])
                rows = 0
            parts[-1].append(request)
            rows += len(request.seeds)
        return parts


class _Decoding:
    """One batch: prefill each prompt once, repeat its cache for its samples, then one token a step for the rows still running."""

    def __init__(
        self, lm: PreTrainedModel, eos_id: int, requests: Sequence[Request], settings: SamplingSettings
    ) -> None:
        self.lm, self.eos_id, self.requests, self.settings = lm, eos_id, requests, settings
        self.device = lm.device
        seeds = [seed for request in requests for seed in request.seeds]
        self.width = max(len(r.prompt) for r in requests)
        self.rows = torch.arange(len(seeds), device=self.device)
        steps = settings.max_new_tokens
        self.tokens = torch.zeros(len(seeds), steps, dtype=torch.long, device=self.device)
        self.logprobs = torch.zeros(len(seeds), steps, dtype=torch.float32, device=self.device)
        self.lengths = torch.zeros(len(seeds), dtype=torch.long, device=self.device)
        self.finished = torch.zeros(len(seeds), dtype=torch.bool, device=self.device)
        self.noise: Tensor | None = None
        if settings.temperature > 0:
            noise = np.stack([uniforms(seed, steps) for seed in seeds])
            self.noise = torch.from_numpy(noise).to(self.device)

    def run(self) -> list[list[Completion]]:
        hidden = self._prefill()
        for step in range(self.settings.max_new_tokens):
            running = self._take(self._logits(hidden), step)
            if step + 1 == self.settings.max_new_tokens or not bool(running.any()):
                break
            if float(running.float().mean()) < COMPACT_BELOW:
                self._keep(running.nonzero()[:, 0])
            hidden = self._forward_one(step)
        return self._completions()

    def _prefill(self) -> Tensor:
        """Hidden state of the last prompt token, [rows, hidden]. Prompts are padded on the left, so all rows share a cache slot."""
        ids = torch.zeros(len(self.requests), self.width, dtype=torch.long)
        real = torch.zeros(len(self.requests), self.width, dtype=torch.bool)
        for i, request in enumerate(self.requests):
            ids[i, self.width - len(request.prompt) :] = torch.tensor(request.prompt)
            real[i, self.width - len(request.prompt) :] = True
        ids, real = ids.to(self.device), real.to(self.device)
        repeats = torch.tensor([len(r.seeds) for r in self.requests], device=self.device)
        capacity = self.width + self.settings.max_new_tokens
        self.layers = [_Layer(capacity) for _ in range(self.lm.config.num_hidden_layers)]
        self.cache = Cache(layers=list(self.layers))
        positions = (real.long().cumsum(-1) - 1).clamp(min=0)
        output = self.lm.base_model(
            input_ids=ids,
            attention_mask=real.long(),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        for layer in self.layers:
            layer.expand(repeats)
        self.mask = torch.ones(int(repeats.sum()), capacity, dtype=torch.bool, device=self.device)
        self.mask[:, : self.width] = real.repeat_interleave(repeats, 0)
        self.prompt_lengths = real.sum(-1).repeat_interleave(repeats)
        last: Tensor = output.last_hidden_state[:, -1]
        return last.repeat_interleave(repeats, 0)

    def _forward_one(self, step: int) -> Tensor:
        ids = self.tokens[self.rows, step][:, None]
        seen = self.mask[:, None, None, : self.width + step + 1]
        positions = (self.prompt_lengths + step)[:, None]
        output = self.lm.base_model(
            input_ids=ids, attention_mask=seen, position_ids=positions, past_key_values=self.cache, use_cache=True
        )
        hidden: Tensor = output.last_hidden_state[:, -1]
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.lm.get_output_embeddings()(hidden).float()
        return logits

    def _take(self, logits: Tensor, step: int) -> Tensor:
        """Choose a token for every row in the batch; returns which rows [batch] go on."""
        temperature = self.settings.temperature
        logprobs = (logits / temperature if temperature > 0 else logits).log_softmax(-1)
        chosen = logprobs.argmax(-1) if self.noise is None else _inverse_cdf(logprobs, self.noise[self.rows, step])
        running = ~self.finished[self.rows]
        rows, taken = self.rows[running], chosen[running]
        self.tokens[rows, step] = taken
        self.logprobs[rows, step] = logprobs[running].gather(-1, taken[:, None])[:, 0]
        self.lengths[rows] = step + 1
        self.finished[rows] = taken == self.eos_id
        return ~self.finished[self.rows]

    def _keep(self, index: Tensor) -> None:
        self.rows, self.mask, self.prompt_lengths = self.rows[index], self.mask[index], self.prompt_lengths[index]
        self.cache.batch_select_indices(index)

    def _completions(self) -> list[list[Completion]]:
        tokens, logprobs = self.tokens.tolist(), self.logprobs.tolist()
        lengths, finished = self.lengths.tolist(), self.finished.tolist()
        rows = iter(range(len(tokens)))
        return [
            [
                Completion(tuple(tokens[i][: lengths[i]]), tuple(logprobs[i][: lengths[i]]), finished[i])
                for i in (next(rows) for _ in request.seeds)
            ]
            for request in self.requests
        ]


def _inverse_cdf(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """The token [batch] at which the cumulated probability reaches `uniform` in (0, 1]."""
    cumulated = logprobs.double().exp().cumsum(-1)
    return torch.searchsorted(cumulated, (uniform * cumulated[:, -1])[:, None])[:, 0]


class _Layer(DynamicLayer):
    """A layer's keys and values in one buffer of full length: a step writes in place instead of copying all that came before."""

    keys: Tensor
    values: Tensor

    def __init__(self, capacity: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.capacity, self.used = capacity, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = self._buffer(key_states), self._buffer(value_states)
        end = self.used + key_states.shape[-2]
        self.keys[:, :, self.used : end], self.values[:, :, self.used : end] = key_states, value_states
        self.used = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def expand(self, repeats: Tensor) -> None:
        """Repeat each prompt's rows for its samples, at full capacity."""
        self.keys, self.values = self.keys.repeat_interleave(repeats, 0), self.values.repeat_interleave(repeats, 0)

    def get_seq_length(self) -> int:
        return self.used

    def batch_select_indices(self, indices: Tensor) -> None:
        self.keys, self.values = self.keys[indices], self.values[indices]

    def _buffer(self, states: Tensor) -> Tensor:
        batch, heads, _, size = states.shape
        return torch.zeros(batch, heads, self.capacity, size, dtype=states.dtype, device=states.device)
