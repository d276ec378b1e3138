"""Proof that a server answers with the policy's weights: a few fixed sequences, token by token, in log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from posttrain.errors import StaleWeightsError
from posttrain.rollouts.vllm.server import Server

PROMPTS, RANDOM_TOKENS = 3, 48
MOVED = 1e-3
"""Nats on average by which a policy has moved so far that no rounding lets a server say the same as before."""


@dataclass(frozen=True)
class Tolerance:
    """Nats that server and policy may differ by: on average over the probe's tokens, and at any of them."""

    mean: float
    largest: float


FLOAT32 = Tolerance(2e-3, 2e-2)
BFLOAT16 = Tolerance(0.1, 1.0)
"""Rounding in bfloat16 gives .05 on average; other weights give 1 and more."""


def sequences(prompts: Sequence[tuple[int, ...]], vocabulary: int, context: int) -> list[tuple[int, ...]]:
    """The first few prompts, and tokens from anywhere in the vocabulary; one token of the context is left for an answer."""
    anywhere = np.random.default_rng(0).integers(0, vocabulary, RANDOM_TOKENS)
    chosen = [*prompts[:PROMPTS], tuple(int(token) for token in anywhere)]
    return [ids[: context - 1] for ids in chosen if len(ids) > 1]


@dataclass(frozen=True)
class Expected:
    """What the policy says of one sequence: of ids[1:] at temperature 1, and of any next token [vocabulary] at the sampler's."""

    ids: tuple[int, ...]
    logprobs: np.ndarray
    following: np.ndarray


@torch.no_grad()
def expected(lm: PreTrainedModel, probes: Sequence[tuple[int, ...]], temperature: float, bf16: bool) -> list[Expected]:
    training = lm.training
    lm.eval()
    made = []
    for ids in probes:
        tokens = torch.tensor([ids], device=lm.device)
        with torch.autocast(lm.device.type, torch.bfloat16, enabled=bf16):
            logits = lm(input_ids=tokens).logits[0].float()
        taken = logits[:-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
        following = (logits[-1] / (temperature or 1.0)).log_softmax(-1)
        made.append(Expected(ids, taken.cpu().numpy(), following.cpu().numpy()))
    lm.train(training)
    return made


class Probe:
    """Compares servers with the policy after every synchronisation, and remembers what each said before."""

    def __init__(self, tolerance: Tolerance, dtype: str) -> None:
        self.tolerance, self.dtype = tolerance, dtype
        self._before: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def check(self, server: Server, policy: Sequence[Expected], temperature: float, folder: Path) -> float:
        """The largest difference in nats. Raises StaleWeightsError where it is too large for rounding, ServerError where none comes."""
        answers = [server.probe(each.ids, temperature) for each in policy]
        said = np.concatenate([np.asarray(logprobs) for logprobs, _, _ in answers])
        own = np.concatenate([each.logprobs for each in policy])
        difference = np.abs(said - own)
        drawn = max(
            abs(value - float(p.following[token])) for (_, token, value), p in zip(answers, policy, strict=True)
        )
        stuck = self._stuck(server, said, own)
        if stuck or difference.mean() > self.tolerance.mean or difference.max() > self.tolerance.largest:
            raise StaleWeightsError(self._other_weights(server, policy, difference, folder, stuck))
        if drawn > self.tolerance.largest:
            raise StaleWeightsError(
                f"{server.url} has the policy's weights but reports other log-probabilities for the tokens that it samples, {drawn:.3g}"
                f" nats away at temperature {temperature:g}: start it with --logprobs-mode processed_logprobs (docs/rollouts.md)"
            )
        self._before[server.url] = said, own
        return float(max(difference.max(), drawn))

    def _stuck(self, server: Server, said: np.ndarray, own: np.ndarray) -> bool:
        """Not one of its numbers has moved while the policy's have: no rounding does that, however coarse."""
        if server.url not in self._before:
            return False
        said_before, own_before = self._before[server.url]
        return bool(np.array_equal(said, said_before) and np.abs(own - own_before).mean() > MOVED)

    def _other_weights(
        self, server: Server, policy: Sequence[Expected], difference: np.ndarray, folder: Path, stuck: bool
    ) -> str:
        worst = int(difference.argmax())
        token = [token for each in policy for token in each.ids[1:]][worst]
        if stuck:
            cause = "It answers to the last digit as before this update, so the load has changed nothing: restart it"
        elif server.url in self._before:
            cause = (
                "It had the right ones before, so a part of it was not replaced. A model with tied embeddings keeps its old output head"
                f" when the server was started on a folder that ties them: start it on {folder}, where the head is a weight of its own"
            )
        else:
            cause = (
                "The likely causes: it serves a model of another architecture or tokenizer; it ties the embeddings and kept its old output"
                f" head; it computes in another precision. Start it with --model {folder} --dtype {self.dtype}"
            )
        return (
            f"{server.url} answers with other weights than the policy's, although it has said that it loaded them: the log-probability of"
            f" token {token} differs by {difference[worst]:.3g} nats ({difference.mean():.3g} on average over {len(difference)} tokens;"
            f" {self.tolerance.largest:g} and {self.tolerance.mean:g} are allowed). {cause} (docs/rollouts.md)."
        )
