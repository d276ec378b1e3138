"""Train a model with one call: `train(model, "grpo", prompts, reward=…)`, `train(model, "dpo", pairs)`, `train(model, "sft", rows)`.

Example:
    Imitation lowers the loss of the row that it imitates:

    >>> from posttrain.api import tiny
    >>> model = tiny(seed=0, hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1)
    >>> history = train(
    ...     model, "sft", [{"prompt": "1+1=", "completion": "2"}], steps=3, learning_rate=0.01, batch_size=1
    ... )
    >>> history[2]["loss"] < history[0]["loss"]
    True
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from posttrain.algorithms import PRESETS, Algorithm, LoggedGroups, OnPolicy, Preference, Unpaired, choose
from posttrain.algorithms.checks import check_spec
from posttrain.algorithms.on_policy_checks import needs_correction, needs_several_answers, too_stale, uneven_minibatches
from posttrain.api import Model
from posttrain.api_arguments import (
    DEFAULTS,
    check_reward,
    check_train_on,
    checked,
    refuse_given,
    require,
    require_list,
    require_methods,
)
from posttrain.api_offline import preferences, supervised, unpaired
from posttrain.api_rows import (
    check_golds,
    check_prompt,
    check_room,
    labelled_rows,
    preference_rows,
    prompt_rows,
    supervised_rows,
)
from posttrain.api_run import Run
from posttrain.api_surroundings import check_trainable, in_training, usual_torch
from posttrain.api_tokens import answers_of
from posttrain.data.teacher_prompts import SELF, require_template, teacher_ids
from posttrain.data.tokens import require_context, require_same_vocabulary, row_tools
from posttrain.errors import ConfigError, ModelError, NotFiniteError
from posttrain.models.causal import check_policy
from posttrain.models.policy import Policy
from posttrain.models.weights import broken_weights
from posttrain.rewards.calling import RewardFunction
from posttrain.rewards.functions import find_function
from posttrain.rewards.signatures import call_signature, misfit
from posttrain.rewards.sources import FunctionReward
from posttrain.rollouts.ahead import Ahead, Background
from posttrain.rollouts.engine import Engine, SamplingSettings
from posttrain.rollouts.groups import GroupSampler, GroupSettings
from posttrain.rollouts.native import NativeEngine
from posttrain.rollouts.problems import CONVERSATION, Problem
from posttrain.rollouts.process import ProcessEngine
from posttrain.rollouts.turns import TurnEngine, Turns
from posttrain.text import nearest
from posttrain.training.experience import Demonstrations, ExperienceSource
from posttrain.training.fingerprints import describe, weights_digest
from posttrain.training.history import History
from posttrain.training.onpolicy import OnPolicyObjective
from posttrain.training.own_checkpoints import identity_of

if TYPE_CHECKING:
    from posttrain.data.conversations import TrainOn
    from posttrain.training.checkpoint import Checkpoints
    from posttrain.training.loop import Recorder

Table = Sequence[Mapping[str, Any]]
Reward = RewardFunction | str | Mapping[str, RewardFunction | str]


def train(
    model: Model,
    algorithm: str | Algorithm,
    rows: Sequence[Mapping[str, Any] | str],
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
    reward: Reward | None = None,
    samples: int = DEFAULTS.samples,
    max_new_tokens: int = DEFAULTS.max_new_tokens,
    temperature: float = DEFAULTS.temperature,
    seed: int = 0,
    micro_batch_tokens: int = 16_384,
    threads: int | None = None,
    train_on: TrainOn = "completion",
    demonstrations: Table = (),
    teacher: Model | None = None,
    teacher_prompt: str | None = None,
    turns: Turns | None = None,
    staleness: int = 0,
    recorder: Recorder | None = None,
    checkpoints: Checkpoints | None = None,
) -> list[dict[str, float]]:
    """Train `model` in place and return the metrics of every step.

    Args:
        algorithm: a preset's name, a spec such as `replace(GRPO, …)`, or "sft".
        rows: prompts, or rows with `prompt` and further columns for the reward (on-policy); `prompt`, `chosen`, `rejected` and optional
            scores (preferences); `prompt`, `completion` and `label`, True or False (kto); `prompt`, `completion` or `messages`, and an
            optional `weight` of the row's tokens (sft).
        batch_size: prompts, pairs or rows per step.
        reward: a function `f(prompts, completions, **columns) -> list of numbers or None`, a built-in's name, or several by name, whose
            sum is used.
        samples: answers per prompt of an on-policy step.
        threads: CPU threads of this process; a tiny model is fastest on 1. None leaves them unchanged.
        train_on: which tokens of a conversation "sft" imitates: `completion` (all answers), `last`, `each` (every answer after its own
            prompt), `marked` or `all`. Demonstrations take `completion` or `each`.
        demonstrations: rows with `prompt`, `completion` for an algorithm with an expert stream (CHORD).
        teacher: a model with the same vocabulary to learn from (distill), which needs no reward; `model` itself for self-distillation.
        teacher_prompt: the prompt that the teacher reads, such as "{prompt} The answer is {answer}.", with columns of `rows` in braces.
        turns: an environment's `step` and a limit, for answers that are conversations; `max_new_tokens` is then the limit of one turn.
        staleness: from 1, a second process samples the answers of the next steps during the update, with weights that are this many steps
            old; the spec's `anchor` or `mismatch` must correct for it.

    Raises:
        ConfigError: an argument is missing, of a different type or out of its range, or has no effect for this algorithm.
        DataError: there are no rows, or a row lacks a column or holds something else than text.
        ModelError: the logits of the model are not the plain output of its head, or its weights are not finite.
        NotFiniteError: a loss, or a weight after the last step, is not finite.
    """
    require("train", "model", model, Model, "a model of load(...) or tiny(...)")
    cpu = {} if threads is None else {"threads": threads}
    numbers = {"steps": steps, "learning_rate": learning_rate, "batch_size": batch_size, "seed": seed}
    sampled = {"samples": samples, "max_new_tokens": max_new_tokens, "training temperature": temperature}
    checked("train", **numbers, **sampled, micro_batch_tokens=micro_batch_tokens, staleness=staleness, **cpu)
    require_methods(
        "train", "recorder", recorder, ("metrics", "timings", "truncate_after"), "a recorder, such as History()"
    )
    require_methods("train", "checkpoints", checkpoints, ("latest", "save"), "Checkpoints(folder, ...)")
    spec = _spec(algorithm)
    check_train_on(train_on, isinstance(spec, str), isinstance(spec, OnPolicy) and spec.has_expert)
    experts = (
        [] if demonstrations is None else require_list("train", "demonstrations", demonstrations, "a list of rows")
    )
    if not isinstance(spec, OnPolicy):
        objects = {"reward": reward, "teacher": teacher, "teacher_prompt": teacher_prompt, "turns": turns}
        refuse_given(demonstrations=experts or None, staleness=staleness or None, **objects, **sampled)
    if threads is not None:
        torch.set_num_threads(threads)
    if isinstance(spec, OnPolicy):
        require("train", "teacher", teacher, (Model, type(None)), "a model of load(...)")
        require("train", "teacher_prompt", teacher_prompt, (str, type(None)), "a text with {prompt} in it")
        require("train", "turns", turns, (Turns, type(None)), "Turns(step, limit=...)")
        if reason := needs_several_answers(spec, samples):
            raise ConfigError(f"{spec.name}: {reason}; samples = {samples} must be at least 2")
        if reason := uneven_minibatches(spec, int(batch_size)):
            raise ConfigError(f"train: batch_size = {batch_size}: {reason}")
        if staleness and (reason := needs_correction(spec)):
            raise ConfigError(
                f"{spec.name}: staleness = {staleness}: {reason}: pass dataclasses.replace(SPEC, anchor='rollout') as the algorithm, where"
                f" SPEC is posttrain.algorithms.PRESETS[{spec.name!r}]"
            )
        if reason := too_stale(int(staleness), int(steps)):
            raise ConfigError(f"train: staleness = {staleness}: {reason}")
        if staleness and turns is not None:
            raise ConfigError("train: conversations (turns) are sampled by the training process; set staleness = 0")
    check_trainable(model.lm)
    if broken := broken_weights(model.lm):
        raise ModelError(f"the model to train: {broken}, as after a training that diverged; load it again")
    identity = identity_of(spec, model.lm, numbers, weighed=checkpoints is not None) | {"train_on": train_on}
    run = Run(
        model, int(steps), float(learning_rate), int(batch_size), int(seed), int(micro_batch_tokens), History(recorder), checkpoints,
        identity, train_on,
    )  # fmt: skip
    with usual_torch(), in_training(model.lm):
        check_policy(model.lm, "the model to train")
        if isinstance(spec, OnPolicy):
            limit = 1 if turns is None else turns.limit
            sampling = GroupSettings(
                run.batch_size, int(samples), SamplingSettings(int(max_new_tokens), float(temperature)), limit
            )
            _on_policy(
                run, spec, prompt_rows(rows), reward, sampling, experts, teacher, teacher_prompt, turns, staleness
            )
        elif isinstance(spec, str):
            supervised(run, supervised_rows(rows))
        elif isinstance(spec, Unpaired):
            unpaired(run, spec, labelled_rows(rows))
        else:
            needs_scores = isinstance(spec, Preference) and spec.score_weighting != "none"
            preferences(run, spec, preference_rows(rows, needs_scores))
    model.lm.eval()
    if broken := broken_weights(model.lm):
        raise NotFiniteError(
            f"after {steps} steps {broken}: an update was too large. Load the model again, and lower learning_rate = {learning_rate:g}"
        )
    return [run.history.steps[step] for step in sorted(run.history.steps)]


def _spec(algorithm: Any) -> Algorithm | str:
    """Return the spec of a preset's name, "sft" or a checked spec as it is."""
    if isinstance(algorithm, str) and algorithm == "sft":
        return "sft"
    if isinstance(algorithm, str):
        if algorithm not in PRESETS:
            raise ConfigError(f"unknown algorithm {algorithm!r}{nearest(algorithm, [*PRESETS, 'sft'])}")
        return choose(algorithm)
    kinds = (OnPolicy, Preference, LoggedGroups, Unpaired)
    require("train", "algorithm", algorithm, kinds, "a preset's name such as 'grpo', a spec of choose(...), or 'sft'")
    spec: Algorithm = algorithm
    check_spec(spec, set())
    return spec


def _on_policy(
    run: Run,
    spec: OnPolicy,
    table: Table,
    reward: Reward | None,
    sampling: GroupSettings,
    demonstrations: Table,
    teacher: Model | None,
    teacher_prompt: str | None,
    turns: Turns | None,
    staleness: int,
) -> None:
    if spec.needs_teacher != (teacher is not None):
        raise ConfigError(f"{spec.name}: pass teacher= if and only if its advantage is 'teacher'")
    if teacher is None and teacher_prompt is not None:
        raise ConfigError(f"{spec.name}: teacher_prompt= has no effect without a teacher. Remove it.")
    require_template(teacher_prompt, SELF if teacher is run.model else None, "teacher_prompt")
    if reward is None and teacher is None:
        raise ConfigError(
            f"{spec.name} learns from rewards: pass reward=, a function or a built-in's name such as 'answer'"
        )
    if spec.has_critic and spec.critic == "separate":
        raise ConfigError(
            f"{spec.name}: train has no separate critic; use choose({spec.name!r}, {{'critic': 'shared'}})"
        )
    if spec.has_expert != bool(demonstrations):
        raise ConfigError(
            f"{spec.name}: pass demonstrations= if and only if the algorithm has an expert stream (mu_peak > 0)"
        )
    model = run.model
    run.identity.update(rows=[*map(dict, table)], sampling=repr(sampling), demonstrations=[*map(dict, demonstrations)])
    functions = {n: find_function(f) if isinstance(f, str) else f for n, f in check_reward(reward).items()}
    if run.checkpoints is not None:
        run.identity.update(
            reward={name: describe(function) for name, function in functions.items()},
            teacher=None if teacher is None else weights_digest(teacher.lm),
            teacher_prompt=teacher_prompt,
            turns=None if turns is None else [describe(turns.step), turns.on_error, turns.seconds],
            staleness=int(staleness),
        )
    columns = [*(name for name in table[0] if name != "prompt"), *([CONVERSATION] if turns is not None else [])]
    for name, function in functions.items():
        if reason := misfit(call_signature(function), columns):
            raise ConfigError(f"train: reward {name!r} cannot be called with these rows: {reason}")
        check_golds(name, function, [row.get("answer") for row in table])
    sources = [FunctionReward(name, function) for name, function in functions.items()]
    most = sampling.sampling.max_new_tokens * sampling.turns
    problems = [_problem(model, row, i, teacher_prompt, most) for i, row in enumerate(table)]
    check_room(model.lm.config, [problem.ids for problem in problems], sampling.sampling.max_new_tokens)
    if teacher is not None:
        longest = max(len(problem.teacher_ids or problem.ids) for problem in problems)
        require_same_vocabulary(teacher.encoder, model.encoder, "teacher=")
        require_context(teacher.encoder, model.encoder, longest + most, "teacher=")
    own = spec.needs_reference and (teacher is None or teacher is model)
    held = copy.deepcopy(model.lm) if own else None if teacher is None else teacher.lm
    reference = None if held is None else Policy(held)
    policy = Policy(model.lm, shared_value_head=spec.has_critic)
    trainer = run.trainer(policy, run.steps * spec.epochs * spec.minibatches)
    device = trainer.accelerator.device
    shown = supervised_rows(demonstrations, "demonstrations", weighs=False) if spec.has_expert else []
    experts = [t for own in answers_of(model.encoder, shown, "completion", run.train_on) for t in own]
    objective = OnPolicyObjective(spec, most, sampling.sampling.temperature, staleness=staleness)
    engine: Engine = NativeEngine(model.lm, model.encoder.ends)
    ahead = None
    if staleness:
        engine = Background(ProcessEngine(model.lm, model.encoder.ends, staleness))
        ahead = Ahead(engine, staleness, run.steps)
    sampler = GroupSampler(
        problems,
        engine if turns is None else TurnEngine(engine, model.encoder, turns),
        model.encoder,
        sources,
        dict.fromkeys(functions, 1.0),
        spec,
        sampling,
        run.seed,
        trainer.accelerator,
        ahead,
    )
    source = ExperienceSource(
        spec,
        policy,
        policy if reference is None else reference.to(device).eval(),
        sampler,
        objective,
        micro_batch_tokens=run.micro_batch_tokens,
        experts=Demonstrations(experts, run.batch_size, run.seed) if experts else None,
        measure_kl_every=0 if reference is None else 1,
        updates=run.steps * spec.epochs * spec.minibatches,
    )
    try:
        run.fit(trainer, source, objective, "kl/ref_k1" if spec.needs_teacher else "reward/total/mean")
    finally:
        if ahead is not None:
            ahead.engine.close()
    sampler.require_rewarded()


def _problem(model: Model, row: Mapping[str, Any], number: int, template: str | None, longest: int) -> Problem:
    columns = {name: value for name, value in row.items() if name != "prompt"}
    ids = check_prompt(model.encoder, row["prompt"], f"rows, row {number}: prompt", row_tools(dict(row)))
    return Problem(row["prompt"], ids, columns, number, teacher_ids(model.encoder, template, row, longest))
