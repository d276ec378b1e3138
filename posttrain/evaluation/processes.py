"""Share an evaluation among processes, on one host or several: each samples and measures its part, and all get all results.

Example:
    >>> ONE_PROCESS.on_rank_0(lambda: "judged once")
    'judged once'
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from accelerate import Accelerator

from posttrain.data.batches import share_of
from posttrain.data.tokens import Tokens
from posttrain.distributed import gather_all, on_main_process, round_robin
from posttrain.models.inference import TokenLogprobs, token_logprobs
from posttrain.models.policy import Policy
from posttrain.rollouts.engine import Completion, Engine, Request, SamplingSettings

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of one evaluation; `accelerator` is None for a single one, whose calls go straight to the engine and the model."""

    accelerator: Accelerator | None = None

    def sample(self, engine: Engine, requests: Sequence[Request], settings: SamplingSettings) -> list[list[Completion]]:
        """Return the completions of every request, in order. A request brings its seeds, so the split changes them only by rounding."""
        if self.accelerator is None:
            return engine.sample(requests, settings)
        share = round_robin(len(requests))
        return gather_all(self.accelerator, requests, lambda own: engine.sample(own, settings), share)

    def token_logprobs(
        self, policy: Policy, tokens: Sequence[Tokens], micro_batch_tokens: int, bf16: bool = False
    ) -> list[TokenLogprobs]:
        """Return the measurements of every response, in order; see `posttrain.models.inference.token_logprobs`."""
        if self.accelerator is None:
            return token_logprobs(policy, tokens, micro_batch_tokens, bf16=bf16)
        return gather_all(
            self.accelerator,
            tokens,
            lambda own: token_logprobs(policy, own, micro_batch_tokens, bf16=bf16),
            partial(share_of, [[each] for each in tokens]),
        )

    def on_rank_0(self, work: Callable[[], T]) -> T:
        """Return the result of `work`, which only rank 0 calls: a judge is asked once, and time-outs are not deterministic."""
        return work() if self.accelerator is None else on_main_process(self.accelerator, work)


ONE_PROCESS = Processes()
