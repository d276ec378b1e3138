"""In-process sampling with the trainer's own weights: continuous batching within a limit of tokens; a group's prompt is computed once.

Example:
    >>> from posttrain.models.tiny import TinyShape, tiny_model
    >>> model, tokenizer = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1), seed=0)
    >>> engine = NativeEngine(model, tokenizer.eos_token_id)
    >>> settings = SamplingSettings(max_new_tokens=4, temperature=1.0)
    >>> [[alone]] = engine.sample([Request((5, 6), seeds=((1,),))], settings)
    >>> [_, [batched]] = engine.sample([Request((9,), seeds=((0,),)), Request((5, 6), seeds=((1,),))], settings)
    >>> alone.tokens == batched.tokens
    True
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from posttrain.data.transfer import to_host, together
from posttrain.errors import RolloutError
from posttrain.models.allocator import give_back_gaps
from posttrain.models.reach import trial_length
from posttrain.models.shards import InFloat32, fewest, gathers_bf16, gathers_layers, most, whole
from posttrain.rollouts.budget import max_tokens
from posttrain.rollouts.decoder import Decoder, decoder_of
from posttrain.rollouts.drawing import completion, draw, noise
from posttrain.rollouts.engine import (
    DRAWN_ELEMENTS,
    MAX_ROWS,
    MAX_TOKENS,
    Completion,
    Request,
    SamplingSettings,
    end_ids,
)
from posttrain.rollouts.generate import GenerateEngine, confirm_generate
from posttrain.rollouts.kept import KeptStates
from posttrain.settings import context_limit

OnToken = Callable[[int, int], None]
COMPACT_BELOW = 0.75
"""Slots are released if fewer than this share of the active answers are unfinished; prompts enter if no more than this share is used."""
KEPT_SHARE = 0.25
"""Share of the stored tokens that finished answers have while a conversation goes on."""
READ_EVERY = 8
"""Tokens between two looks at which answers are finished, on a GPU: each look waits for the device. Answers are the same."""


class NativeEngine:
    """Continue prompts with any causal language model of transformers; models without a standard key-value cache use `generate`."""

    def __init__(
        self,
        lm: PreTrainedModel,
        ends: int | Iterable[int],
        max_rows: int = MAX_ROWS,
        bf16: bool = False,
        max_tokens: int | None = None,
    ) -> None:
        """Create an engine that shares the weights of `lm`.

        Args:
            max_rows: most active answers.
            max_tokens: most tokens whose keys and values are stored. By default MAX_TOKENS on a CPU, on a GPU as many as its free memory
                holds.
            bf16: compute under autocast.
        """
        self.lm, self.ends, self.bf16 = lm, end_ids(ends), bf16
        self.max_rows, self.max_tokens = max_rows, max_tokens
        self.decoder: Decoder | str | None = None
        self.confirmed = 0
        """Tokens of the row by which transformers' generate was confirmed; 0 before."""
        self._keeping = False
        self._kept: KeptStates | None = None

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep the states of finished answers for requests that continue them. The weights must not change meanwhile."""
        self._keeping = True
        try:
            yield
        finally:
            self._keeping, self._kept = False, None

    def sample(
        self, requests: Sequence[Request], settings: SamplingSettings, on_token: OnToken | None = None
    ) -> list[list[Completion]]:
        """Return the completions of each request, in order, one per seed.

        Args:
            on_token: called as `on_token(answer, id)` for every token when it is drawn; `answer` counts over all requests. It is not
                called for models that are sampled by transformers' generate.

        Raises:
            RolloutError: the model's cache does not agree with its own forward pass, or prompt and answer exceed the model's context.
        """
        if not requests and not gathers_layers(self.lm):
            return []
        if any(not request.prompt for request in requests):
            raise RolloutError("a prompt has no tokens, so the first response token has no context; remove such rows")
        longest = most(self.lm, max((len(r.prompt) for r in requests), default=0))
        limit = context_limit(self.lm.config.get_text_config().to_dict())
        if limit is not None and longest + settings.max_new_tokens > limit:
            raise RolloutError(
                f"a prompt of {longest} tokens and {settings.max_new_tokens} new ones exceed the model's context of {limit};"
                " lower max_new_tokens, or shorten the prompts (in the pipeline: validation.max_prompt_tokens)"
            )
        if self.decoder is None:
            self.decoder = decoder_of(self.lm, self.bf16)
        decoder, tokens = self.decoder, longest + settings.max_new_tokens
        if isinstance(decoder, Decoder) and decoder.reach is not None and tokens > decoder.reach:
            decoder = f"its attention is limited beyond {decoder.reach} tokens, as by a window, and prompt and answer may have {tokens}"
        if isinstance(decoder, str):
            _report_once(f"{type(self.lm).__name__} is sampled by transformers' generate, which is slower: {decoder}")
            return self._generated(requests, settings, tokens)
        keeping = self._keeping and decoder.continues()
        with decoder.decoding():
            limit = self.max_tokens
            if limit is None:
                on_cpu = self.lm.device.type == "cpu"
                limit = MAX_TOKENS if on_cpu else fewest(self.lm, max_tokens(self.lm.device, decoder.token_bytes()))
            if keeping:
                self._kept = self._kept or KeptStates(int(KEPT_SHARE * limit))
                limit -= self._kept.max_tokens
            with decoder.in_step():
                try:
                    sampling = _Sampling(decoder, self.ends, settings, self.max_rows, limit, on_token, self._kept)
                    return sampling.run(requests)
                finally:
                    give_back_gaps()
                    decoder.runner.forget()
                    if decoder.runner.refusal:
                        _report_once(f"{type(self.lm).__name__} is sampled kernel by kernel: {decoder.runner.refusal}")

    def any_running(self, count: int) -> bool:
        """Return True if this process, or one that must compute together with it, has answers left to sample."""
        return most(self.lm, count) > 0

    def _generated(
        self, requests: Sequence[Request], settings: SamplingSettings, longest: int
    ) -> list[list[Completion]]:
        """Return the completions by transformers' generate, which keeps no step with other processes."""
        bf16, tried = gathers_bf16(self.lm), trial_length(self.lm.config.get_text_config(), longest)
        with whole(self.lm):
            if tried > self.confirmed:
                with InFloat32() if bf16 else nullcontext():
                    confirm_generate(self.lm, longest)
                self.confirmed = tried
            return GenerateEngine(self.lm, self.ends, self.max_rows, self.bf16 or bf16).sample(requests, settings)


@cache
def _report_once(message: str) -> None:
    """Print a message once per process."""
    tqdm.write(message, file=sys.stderr)


@dataclass(frozen=True)
class _Piece:
    """Answers to one prompt that enter together.

    Attributes:
        first: index of the first one among all answers of the call.
        known: first tokens of the prompt that are an earlier conversation.
    """

    prompt: tuple[int, ...]
    seeds: tuple[tuple[int, ...], ...]
    first: int
    known: int


@dataclass
class _ActiveAnswers:
    """Active answers: number [answers] is the index in the call, running [answers]; the other fields are [answers, new tokens]."""

    number: list[int]
    running: Tensor
    tokens: Tensor
    logprobs: Tensor
    noise: Tensor

    def take(self, rows: Sequence[int]) -> _ActiveAnswers:
        # indices that the host knows; a boolean mask would make a GPU wait once for each field
        (index,) = together([torch.tensor(rows, dtype=torch.long)], self.running.device)
        return _ActiveAnswers(
            [self.number[i] for i in rows], *(value.index_select(0, index) for value in self.tensors())
        )

    def joined(self, other: _ActiveAnswers) -> _ActiveAnswers:
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return _ActiveAnswers(self.number + other.number, *(torch.cat(pair) for pair in pairs))

    def tensors(self) -> tuple[Tensor, ...]:
        return self.running, self.tokens, self.logprobs, self.noise


class _Sampling:
    """One call of `sample`: prompts enter up to the limits, every answer gets a token per step, finished answers leave."""

    def __init__(
        self,
        decoder: Decoder,
        ends: tuple[int, ...],
        settings: SamplingSettings,
        max_rows: int,
        max_tokens: int,
        on_token: OnToken | None = None,
        kept: KeptStates | None = None,
    ) -> None:
        self.decoder, self.ends, self.settings, self.kept = decoder, ends, settings, kept
        self.max_rows, self.max_tokens, self.on_token = max_rows, max_tokens, on_token
        self.device = decoder.lm.device
        self.end_row = torch.tensor([ends], device=self.device)
        self.slots = decoder.slots(settings.max_new_tokens)
        self.answers = self._answers([])
        self.hidden = torch.empty(0, device=self.device)
        self.completions: dict[int, Completion] = {}
        self.read_every = 1 if self.device.type == "cpu" or on_token is not None else READ_EVERY
        self.unread = 0

    def run(self, requests: Sequence[Request]) -> list[list[Completion]]:
        waiting = self._pieces(requests)
        self.prompts = {piece.first + i: piece.prompt for piece in waiting for i in range(len(piece.seeds))}
        if self.kept is not None:
            self.kept.expect((piece.prompt, piece.known) for piece in waiting)
        while waiting or self.slots.counts:
            self._enter(waiting)
            self._draw()
            self._leave()
            while self.slots.counts and not self._may_enter(waiting):
                self._advance()
                self._leave()
            if self.slots.counts:
                self.slots.settle()
                self._step()
                self.slots.count_token()
        numbers = iter(range(len(self.completions)))
        return [[self.completions[next(numbers)] for _ in request.seeds] for request in requests]

    def _pieces(self, requests: Sequence[Request]) -> deque[_Piece]:
        """Return the waiting pieces, longest prompts first, so that active prompts have similar lengths. No piece exceeds the limits."""
        pieces, first = [], 0
        for request in requests:
            fitting = (self.max_tokens - len(request.prompt)) // self.settings.max_new_tokens
            size = max(1, min(self.max_rows, fitting))
            for start in range(0, len(request.seeds), size):
                pieces.append(_Piece(request.prompt, request.seeds[start : start + size], first + start, request.known))
            first += len(request.seeds)
        return deque(sorted(pieces, key=lambda piece: -len(piece.prompt)))

    def _step(self) -> None:
        newest = self.answers.tokens.gather(1, self.slots.row_ages[:, None])
        self.hidden = self.decoder.step(self.slots, newest)

    def _advance(self) -> None:
        """Compute the newest token of every answer and draw the next one. If the step is replayed, the program only counts tokens."""

        def step() -> None:
            self._step()
            self._draw()

        self.slots.settle()
        if self.on_token is None:
            self.decoder.runner.run(step, self._state, self.slots.arrangement)
        else:
            step()
        self.slots.count_token()

    def _state(self) -> list[Tensor]:
        return [self.slots.row_ages, self.answers.running, self.answers.tokens, self.answers.logprobs]

    def _may_enter(self, waiting: deque[_Piece]) -> bool:
        if not waiting:
            return False
        rows, tokens = sum(self.slots.counts), self.slots.tokens()
        if rows > COMPACT_BELOW * self.max_rows or tokens > COMPACT_BELOW * self.max_tokens:
            return False
        return rows == 0 or self._fits([waiting[0]])

    def _enter(self, waiting: deque[_Piece]) -> None:
        rows, entering = sum(self.slots.counts), list[_Piece]()
        if not self._may_enter(waiting):
            return
        while waiting and (self._fits([*entering, waiting[0]]) or not (rows or entering)):
            entering.append(waiting.popleft())
        if entering:
            prompts, counts = [piece.prompt for piece in entering], [len(piece.seeds) for piece in entering]
            hidden = self.decoder.enter(self.slots, prompts, counts, self.kept)
            self.hidden = torch.cat([self.hidden, hidden]) if rows else hidden
            self.answers = self.answers.joined(self._answers(entering))

    def _fits(self, entering: Sequence[_Piece]) -> bool:
        counts = [len(piece.seeds) for piece in entering]
        tokens = self.slots.tokens([len(piece.prompt) for piece in entering], counts)
        return sum(self.slots.counts) + sum(counts) <= self.max_rows and tokens <= self.max_tokens

    def _answers(self, entering: Sequence[_Piece]) -> _ActiveAnswers:
        numbers = [piece.first + i for piece in entering for i in range(len(piece.seeds))]
        shape, steps = (len(numbers), self.settings.max_new_tokens), self.settings.max_new_tokens
        seeds = [seed for piece in entering for seed in piece.seeds]
        drawn = bool(seeds) and self.settings.temperature > 0
        return _ActiveAnswers(
            numbers,
            torch.ones(len(numbers), dtype=torch.bool, device=self.device),
            torch.zeros(shape, dtype=torch.long, device=self.device),
            torch.zeros(shape, device=self.device),
            noise(seeds, steps, self.device) if drawn else torch.zeros(shape, dtype=torch.float64, device=self.device),
        )

    def _draw(self) -> None:
        """Draw the next token of every answer, also of finished ones that still have a slot: their tokens are never read."""
        answers, temperature, column = self.answers, self.settings.temperature, self.slots.row_ages[:, None]
        unfinished: list[bool] = answers.running.tolist() if self.on_token is not None else []
        # pyrefly: ignore[missing-attribute]
        at_once = max(1, DRAWN_ELEMENTS // self.decoder.head.weight.shape[0])
        for start in range(0, len(column), at_once):
            part = slice(start, start + at_once)
            uniform = answers.noise[part].gather(1, column[part]) if temperature > 0 else None
            tokens, logprobs = draw(self.decoder.logits(self.hidden[part]), temperature, uniform)
            answers.tokens[part].scatter_(1, column[part], tokens)
            answers.logprobs[part].scatter_(1, column[part], logprobs)
            answers.running[part] &= (tokens != self.end_row).all(-1)
        answers.running &= self.slots.row_ages + 1 < self.settings.max_new_tokens
        if self.on_token is not None:
            newest: list[int] = answers.tokens.gather(1, column)[:, 0].tolist()
            for number, token, open_before in zip(answers.number, newest, unfinished, strict=True):
                if open_before:
                    self.on_token(number, token)

    def _leave(self) -> None:
        """Store finished answers and release their slots if they are many, or if one has reached the length limit."""
        at_limit = max(self.slots.ages) + 1 == self.settings.max_new_tokens
        self.unread += 1
        if not at_limit and self.unread < self.read_every:
            return
        self.unread = 0
        running: list[bool] = self.answers.running.tolist()
        if not at_limit and sum(running) >= max(1.0, COMPACT_BELOW * len(running)):
            return
        rows = [i for i, runs in enumerate(running) if not runs]
        ended = self.answers.take(rows)
        tokens, logprobs = to_host([ended.tokens, ended.logprobs])
        for row, number, ids, values in zip(rows, ended.number, tokens.tolist(), logprobs.tolist(), strict=True):
            answer = self.completions[number] = completion(ids, values, self.ends)
            if self.kept is not None and answer.finished:
                self.kept.add_answer(self.slots, row, (*self.prompts[number], *answer.tokens[:-1]))
        kept = [i for i, runs in enumerate(running) if runs]
        self.answers = self.answers.take(kept)
        self.slots.keep(kept)
