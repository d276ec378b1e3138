"""Groups of answers to prompts: drawn in seeded order, sampled, scored, and refilled until enough of them carry a signal.

Example:
    >>> problem = Problem("1+1=", (5, 6), {"answer": "2"}, row=7)
    >>> batch = reward_batch([problem], ["2"], [Tokens((5, 6), (7,))])
    >>> batch.columns, batch.ids
    ({'answer': ['2']}, [7])
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from posttrain.algorithms.specs import OnPolicy
from posttrain.data.batches import shuffled
from posttrain.data.tokens import TextEncoder, Tokens
from posttrain.distributed import gather_all, round_robin, row_share
from posttrain.errors import CheckpointError, RewardError, RolloutError
from posttrain.objectives.shaping import overlong_penalty
from posttrain.rewards.combination import combined, known
from posttrain.rewards.sources import RewardSource
from posttrain.rollouts.ahead import Ahead, Round, age, begun, continued, restored, unfinished
from posttrain.rollouts.engine import Completion, Engine, Request, SamplingSettings
from posttrain.rollouts.problems import Problem, judged_text, request, reward_batch, score_on_one_process


@dataclass(frozen=True)
class ScoredAnswer:
    """One sampled answer.

    Attributes:
        reward: shaped total; NaN if missing.
        sources: reward of each source.
    """

    tokens: Tokens
    completion: Completion
    text: str
    group: int
    problem: Problem
    reward: float
    sources: dict[str, float | None]
    task_reward: float | None = None
    """The total before shaping by length; None if it is `reward`."""
    version: int = 0
    """Steps that the weights had taken that sampled it."""

    @property
    def task(self) -> float:
        """Return the reward of the task, without shaping."""
        return self.reward if self.task_reward is None else self.task_reward


PATIENCE = 10
"""Steps after which a run ends in which no answer has got a reward."""


@dataclass(frozen=True)
class GroupSettings:
    """Prompts per step, samples per prompt, sampling settings of a turn, and the most turns of an answer."""

    prompts: int
    samples: int
    sampling: SamplingSettings
    turns: int = 1


class GroupSampler:
    """Draw problems in shuffled epochs, then sample and score answers. The position in the order is the whole state.

    With `ahead`, the first round of each step is sampled before the step, and its answers are part of the state. Further rounds of
    dynamic sampling use the present weights.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        engine: Engine,
        encoder: TextEncoder,
        rewards: Sequence[RewardSource],
        weights: Mapping[str, float],
        spec: OnPolicy,
        settings: GroupSettings,
        seed: int,
        accelerator: Accelerator,
        ahead: Ahead | None = None,
    ) -> None:
        self.problems, self.engine, self.encoder, self.rewards, self.weights = (
            problems,
            engine,
            encoder,
            rewards,
            weights,
        )
        self.spec, self.settings, self.seed, self.accelerator = spec, settings, seed, accelerator
        self.ahead = ahead
        self.position = 0
        self.tokens_sampled = 0
        self.steps = self.begun = 0
        self.rounds: deque[Round] = deque()
        self.rewarded = 0
        """Answers that have got a reward so far."""

    def sample(self) -> tuple[list[ScoredAnswer], dict[str, float]]:
        """Return the answers of one step, grouped by prompt, and the cost of sampling them.

        Raises:
            RolloutError: dynamic sampling finds too few informative groups within its limit.
        """
        wanted, spec = self.settings.prompts, self.spec
        kept: list[list[ScoredAnswer]] = []
        drawn = rounds = zero_variance = 0
        step, self.steps = self.steps, self.steps + 1
        first, versions = self._first_round(step), dict[int, int]()
        for reward in self.rewards:
            reward.failures.clear()
            reward.used()
        while len(kept) < wanted:
            taken = first or self._begin(wanted if spec.filter == "refill" else wanted - drawn)
            groups, first = self._finished(taken), None
            versions |= dict.fromkeys(taken.positions, taken.version)
            drawn, rounds = drawn + len(groups), rounds + 1
            informative = [group for group in groups if _carries_signal(group)]
            zero_variance += len(groups) - len(informative)
            kept += groups if spec.filter == "none" else informative
            if spec.filter != "refill":
                break
            if rounds >= spec.refill_limit and len(kept) < wanted:
                self._at_limit(len(kept), wanted, rounds)
                break
        if self.ahead is not None and spec.filter == "refill":
            self._begin_next(step)
        if not self.rewarded:
            self._unrewarded()
        if not kept:
            raise RolloutError("no group of this step carries a signal: all answers to each prompt have equal rewards")
        metrics = {
            "sampling/acceptance": (drawn - zero_variance) / drawn,
            "sampling/rounds": float(rounds),
            "groups/trained": float(min(len(kept), wanted)),
            "groups/zero_variance": zero_variance / drawn,
            "tokens/sampled": float(self.tokens_sampled),
        }
        for reward in self.rewards:
            for kind in ("failed", "timed_out"):
                metrics[f"reward/{reward.name}/{kind}"] = reward.failures[kind] / (drawn * self.settings.samples)
            metrics |= {f"reward/{reward.name}/{name}": value for name, value in reward.used().items()}
        if self.ahead is not None:
            steps = [step - versions[group[0].group] for group in kept[:wanted]]
            metrics |= {"staleness/mean": sum(steps) / len(steps), "staleness/max": float(max(steps))}
            if self.ahead.interrupt:
                metrics["staleness/tokens"] = age(step, [a.completion for group in kept[:wanted] for a in group])
        return [answer for group in kept[:wanted] for answer in group], metrics

    def _at_limit(self, found: int, wanted: int, rounds: int) -> None:
        if not self.spec.refill_partial or found == 0:
            raise RolloutError(
                f"dynamic sampling found {found} of {wanted} groups with unequal rewards in {rounds} rounds: the problems are too"
                " easy or too hard for this policy. Change the problems, raise options.refill_limit, or set"
                " options.refill_partial: true"
            )
        tqdm.write(
            f"dynamic sampling: continuing with {found} of {wanted} groups after {rounds} rounds", file=sys.stderr
        )

    def _first_round(self, step: int) -> Round | None:
        """Return the round that was begun for this step, and begin a later one with the present weights if no filter waits for rewards."""
        if self.ahead is None:
            return None
        self._begin_until(step + self.ahead.staleness)
        first = self.rounds.popleft()
        first.answers()
        if self.spec.filter != "refill":
            self._begin_next(step)
        return first

    def _begin_next(self, step: int) -> None:
        """With the present weights, go on with the answers of later steps, and begin those of a further one."""
        assert self.ahead is not None
        for number, later in enumerate(self.rounds):
            # those of the next step must end now
            if later.left and later.version < step:
                self._go_on(later, later.left if number == 0 else min(self.ahead.interrupt, later.left))
        self._begin_until(step + self.ahead.staleness + 1)

    def _begin_until(self, step: int) -> None:
        """Begin the first rounds of all steps before `step`."""
        assert self.ahead is not None
        while self.begun < min(step, self.ahead.steps):
            self.rounds.append(self._begin(self.settings.prompts, self.begun))
            self.begun += 1

    def _begin(self, prompts: int, due: int = 0) -> Round:
        """Return a round of the next problems; with `ahead` it is sampled in the background with the present weights.

        Args:
            due: the step of the answers; if there are other weights before it, they may be begun only.
        """
        positions = list(range(self.position, self.position + prompts))
        self.position += prompts
        version, sampling = max(0, self.steps - 1), self.settings.sampling
        if self.ahead is None:
            requests = self._requests(positions)
            return Round(positions, version, lambda: self._on_all_ranks(requests, self._sampled))
        cut = self.ahead.interrupt if due - version > 1 else 0
        made = self._round(positions, version, sampling.max_new_tokens - cut if cut else 0)
        first = replace(sampling, max_new_tokens=cut) if cut else sampling
        future = self.ahead.engine.submit(self._own_requests(positions), first)
        made.own = (lambda: begun(future.result(), version)) if self.ahead.interrupt else future.result
        return made

    def _requests(self, positions: Sequence[int]) -> list[Request]:
        return [
            request(self._problem(position), tuple((self.seed, position, j) for j in range(self.settings.samples)))
            for position in positions
        ]

    def _own_requests(self, positions: Sequence[int]) -> list[Request]:
        requests = self._requests(positions)
        return [requests[i] for i in round_robin(len(requests))(*row_share(self.accelerator))]

    def _round(self, positions: list[int], version: int, left: int) -> Round:
        """Return a round whose answers are gathered from those that each process has."""
        requests = self._requests(positions)
        made = Round(positions, version, list, left=left)
        made.wait = lambda: self._on_all_ranks(requests, lambda own: made.own())
        return made

    def _go_on(self, later: Round, tokens: int) -> None:
        """Sample up to so many further tokens of the round's unfinished answers with the present weights."""
        assert self.ahead is not None
        version, requests, before = self.steps - 1, self._own_requests(later.positions), later.own
        future = self.ahead.engine.submit(
            lambda: unfinished(requests, before()), replace(self.settings.sampling, max_new_tokens=tokens)
        )
        later.own = lambda: continued(before(), future.result(), version)
        later.done, later.left = None, later.left - tokens

    def _restored(self, state: Mapping[str, Any]) -> Round:
        """Return the round of a checkpoint, with which any process can go on."""
        found = restored(state)
        every = found.answers()
        made = self._round(found.positions, found.version, found.left)
        own = round_robin(len(every))(*row_share(self.accelerator))
        made.own, made.done = (lambda: [every[i] for i in own]), every
        return made

    def _sampled(self, own: Sequence[Request]) -> list[list[Completion]]:
        return self.engine.sample(own, self.settings.sampling)

    def _on_all_ranks(
        self, requests: Sequence[Request], work: Callable[[Sequence[Request]], list[list[Completion]]]
    ) -> list[list[Completion]]:
        """Apply `work` to this process's share; all processes receive all answers, in order."""
        return gather_all(self.accelerator, requests, work, round_robin(len(requests)))

    def _finished(self, taken: Round) -> list[list[ScoredAnswer]]:
        """Wait for a round, and score its answers."""
        completions = taken.answers()
        self.tokens_sampled += sum(c.sampled for group in completions for c in group)
        problems = [self._problem(position) for position in taken.positions]
        return self._scored(problems, taken, completions)

    def _problem(self, position: int) -> Problem:
        epoch, within = divmod(position, len(self.problems))
        return self.problems[shuffled(len(self.problems), self.seed, epoch)[within]]

    def _scored(
        self, problems: Sequence[Problem], taken: Round, completions: Sequence[Sequence[Completion]]
    ) -> list[list[ScoredAnswer]]:
        drawn = zip(problems, taken.positions, completions, strict=True)
        flat = [(problem, group, c) for problem, group, answers in drawn for c in answers]
        tokens = [Tokens(problem.ids, c.tokens, _id(problem), c.weights) for problem, _, c in flat]
        texts = [judged_text(self.encoder, completion) for _, _, completion in flat]
        completed = [completion for _, _, completion in flat]
        answers_read = reward_batch([problem for problem, _, _ in flat], texts, tokens, completed)
        sources = score_on_one_process(self.accelerator, self.rewards, answers_read)
        totals = combined(sources, self.weights, [group for _, group, _ in flat], self.spec.reward_combination)
        answers = [
            ScoredAnswer(
                tokens[i],
                c,
                texts[i],
                g,
                p,
                totals[i] + self._shaping(c),
                {name: known(values[i]) for name, values in sources.items()},
                totals[i],
                taken.version,
            )
            for i, (p, g, c) in enumerate(flat)
        ]
        size = self.settings.samples
        self.rewarded += sum(not math.isnan(total) for total in totals)
        return [answers[i : i + size] for i in range(0, len(answers), size)]

    def _shaping(self, completion: Completion) -> float:
        shaped = 0.0 if completion.finished else -self.spec.missing_eos_penalty
        if self.spec.overlong_share:
            length = torch.tensor([completion.sampled])
            limit = self.settings.sampling.max_new_tokens * self.settings.turns
            shaped += float(overlong_penalty(length, limit, self.spec.overlong_share * limit))
        return shaped

    def _unrewarded(self) -> None:
        """Report a first step without any reward, and end the run after `PATIENCE` of them."""
        if self.steps >= PATIENCE:
            self.require_rewarded()
        elif self.steps == 1 and any(self.weights.values()):
            tqdm.write(
                f"no answer of the first step got a reward from {', '.join(sorted(self.weights))}; the run stops if {PATIENCE} steps"
                " pass without one",
                file=sys.stderr,
            )

    def require_rewarded(self) -> None:
        """Raise RewardError if no answer has got a reward: nothing was learnt from any of them."""
        if any(self.weights.values()) and self.tokens_sampled and not self.rewarded:
            raise RewardError(
                f"no answer of this run got a reward: {', '.join(sorted(self.weights))} returned None or NaN for each, or failed on it, so"
                " nothing was learnt. Return a number for the answers that a reward applies to"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the state; rounds that are being sampled are in it as they are, see `posttrain.training.source.settled`."""
        state: dict[str, Any] = {
            "position": self.position,
            "tokens_sampled": self.tokens_sampled,
            "rewarded": self.rewarded,
            "steps": self.steps,
        }
        if self.ahead is not None:
            state |= {"begun": self.begun, "rounds": list(self.rounds)}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if ("rounds" in state) != (self.ahead is not None):
            raise CheckpointError(
                "the checkpoint was written with a different staleness: one of the two samples ahead. Set it as it was, or remove the"
                " run's checkpoints to start again"
            )
        self.position, self.tokens_sampled = state["position"], state["tokens_sampled"]
        self.rewarded, self.steps = state["rewarded"], state["steps"]
        if self.ahead is not None:
            self.begun = state["begun"]
            self.rounds = deque(self._restored(each) for each in state["rounds"])


def _id(problem: Problem) -> str:
    return "" if problem.row is None else f"problem {problem.row}"


def _carries_signal(group: Sequence[ScoredAnswer]) -> bool:
    known = [answer.task for answer in group if not math.isnan(answer.task)]
    return bool(known) and max(known) > min(known)
