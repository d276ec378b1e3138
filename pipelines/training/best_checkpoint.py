"""Choose the evaluated checkpoint by the rule of `align.best_checkpoint`: the best of several steps on problems kept out of training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.config.checkpoint_schema import BestCheckpointParams
from pipelines.runtime.context import RunContext
from pipelines.runtime.run import Run
from pipelines.training.reward_sources import JudgeTokens, reward_sources
from pipelines.training.setup import problems, read_table, with_turns
from posttrain.combinations import Setup, require
from posttrain.data.batches import shuffled
from posttrain.data.tokens import TextEncoder, Tokens
from posttrain.errors import DataError, RewardError
from posttrain.models.policy import Policy
from posttrain.rewards.combination import known
from posttrain.rollouts.engine import SamplingSettings
from posttrain.rollouts.groups import Problem, judged_text, request, reward_batch, score_on_one_process
from posttrain.rollouts.native import NativeEngine
from posttrain.training.best_weights import BestWeights

if TYPE_CHECKING:
    from posttrain.training.loop import StepHook
    from posttrain.training.source import BatchSource
    from posttrain.training.trainer import Trainer

Rows = list[dict[str, Any]]


def split_problems(rows: Rows, rule: BestCheckpointParams | None) -> tuple[Rows, Rows]:
    """Return the rows to train on, and one row for each prompt that is kept out to choose the checkpoint.

    A prompt that is kept out is not trained on in any of its rows.

    Raises:
        DataError: nothing would be left to train on.
    """
    if rule is None:
        return rows, []
    keys = [json.dumps(row["prompt"], sort_keys=True) for row in rows]
    first = dict(zip(reversed(keys), reversed(rows), strict=True))
    distinct = [*dict.fromkeys(keys)]
    if rule.problems >= len(distinct):
        raise DataError(
            f"align.best_checkpoint.problems = {rule.problems}: data/valid/problems.parquet has {len(distinct)} different prompts, so"
            " none would be left to train on; lower it, or raise data.problems.rows"
        )
    chosen = {distinct[i] for i in shuffled(len(distinct), rule.seed, 0)[: rule.problems]}
    return [row for key, row in zip(keys, rows, strict=True) if key not in chosen], [first[k] for k in sorted(chosen)]


def best_weights(
    run: Run, source: BatchSource[Any], trainer: Trainer[Any], policy: Policy, encoder: TextEncoder, steps: int
) -> BestWeights[Any] | None:
    """Return the run's source that keeps the best weights, or None if the last step is evaluated.

    Raises:
        ConfigError: the weights are split over processes.
    """
    params = run.context.params.align
    rule = params.best_checkpoint
    if rule is None:
        return None
    processes = trainer.accelerator.num_processes
    require(Setup(processes, fsdp=2 * trainer.sharded, best_checkpoint=True))
    asked = problems(encoder, split_problems(read_table("problems"), rule)[1])
    score = _Score(run, asked, trainer, policy, encoder, rule)
    return BestWeights(source, score, trainer.weights, every=rule.every_steps, last=steps, name=rule.reward)


class _Score:
    """The mean reward of the present weights' greedy answers."""

    def __init__(
        self,
        run: Run,
        asked: Sequence[Problem],
        trainer: Trainer[Any],
        policy: Policy,
        encoder: TextEncoder,
        rule: BestCheckpointParams,
    ) -> None:
        params = run.context.params
        budget, compute, device = params.align.on_policy, params.align.compute, trainer.accelerator.device
        self.asked, self.encoder, self.accelerator, self.name = asked, encoder, trainer.accelerator, rule.reward
        self.engine = with_turns(NativeEngine(policy.lm, encoder.ends, bf16=compute.bf16), encoder, budget.turns)
        self.settings = SamplingSettings(budget.max_new_tokens, 0.0)
        limits = params.limits.reward_seconds
        self.rewards = reward_sources(params.rewards, [rule.reward], device, compute, limits)
        self.judged = JudgeTokens(run.recorder, self.rewards)

    def __call__(self) -> float:
        """Raises RewardError if no answer got a reward."""
        sampled = self.engine.sample([request(problem, ((0,),)) for problem in self.asked], self.settings)
        completions = [completion for (completion,) in sampled]
        tokens = [Tokens(p.ids, c.tokens, weights=c.weights) for p, c in zip(self.asked, completions, strict=True)]
        texts = [judged_text(self.encoder, completion) for completion in completions]
        answers = reward_batch(self.asked, texts, tokens, completions)
        values = score_on_one_process(self.accelerator, self.rewards, answers)[self.name]
        self.judged.record()
        rewards = [reward for value in values if (reward := known(value)) is not None]
        if not rewards:
            raise RewardError(
                f"align.best_checkpoint: the reward {self.name} scored none of {len(values)} answers, so no step can be chosen; name a"
                " different reward"
            )
        return sum(rewards) / len(rewards)


def hooks(*each: StepHook | None) -> StepHook:
    """Return a hook that calls several in their order."""

    def call(step: int) -> Mapping[str, float]:
        metrics: dict[str, float] = {}
        for hook in each:
            metrics |= hook(step) if hook is not None else {}
        return metrics

    return call


def restore(
    context: RunContext, best: BestWeights[Any] | None, trainer: Trainer[Any]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Give the trained model the best weights. Return numbers for the run's summary, and facts for the model card."""
    rule = context.params.align.best_checkpoint
    if best is None or rule is None:
        return {}, {}
    trainer.unwrapped.load_state_dict(best.weights, strict=False)
    if context.records:
        print(
            f"{context.name}: step {best.step} is kept, the best of {best.measured} measured steps: {rule.reward} {best.score:.4f} on"
            f" {rule.problems} problems kept out of training",
            flush=True,
        )
    facts = {
        "checkpoint": f"step {best.step}, the best of {best.measured} on {rule.problems} problems kept out of training"
    }
    return {"selection/step": best.step, "selection/score": best.score, "selection/measured": best.measured}, facts
