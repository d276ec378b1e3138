"""Load and check params.yaml as one typed model. Imports no torch; every error names field, rule, value and the nearest valid name."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, model_validator

from pipelines.config.ahead_check import check_ahead
from pipelines.config.checkpoint_check import check_best_checkpoint
from pipelines.config.context import context_of
from pipelines.config.data_schema import DataParams
from pipelines.config.evaluation_schema import EvaluationParams, ReportParams
from pipelines.config.explain import validated
from pipelines.config.gate_schema import GateParams
from pipelines.config.judge_schema import JudgeParams
from pipelines.config.limits_schema import LimitsParams
from pipelines.config.numbers import refuse_huge
from pipelines.config.reward_arguments import check_arguments
from pipelines.config.reward_uses import algorithm_uses, evaluation_uses
from pipelines.config.schema import (
    AlgorithmParams,
    AlignParams,
    ModelParams,
    OnPolicyBudget,
    PreferenceBudget,
    ProjectParams,
    RewardFunctionParams,
    RewardParams,
    SftParams,
    StartModel,
    ValidationParams,
)
from pipelines.config.tracking_schema import TrackingParams
from pipelines.config.tune_check import check_space
from pipelines.config.tune_schema import TuneParams
from pipelines.config.types import Name, Section
from pipelines.config.yaml_files import read_yaml
from posttrain.algorithms import Algorithm, OnPolicy, choose
from posttrain.algorithms.chord import scheduled
from posttrain.algorithms.on_policy_checks import needs_several_answers
from posttrain.data.teacher_prompts import require_template
from posttrain.errors import ConfigError
from posttrain.rewards import BUILT_IN_NAMES
from posttrain.text import nearest

REWARD_FUNCTIONS = ("reward_model", "judge", *BUILT_IN_NAMES)
RESERVED_NAMES = ("reward", "total", "prompt", "completion")


class Params(Section):
    """All parameters of params.yaml."""

    project: ProjectParams
    data: DataParams
    validation: ValidationParams
    model: ModelParams
    sft: SftParams
    reward: RewardParams
    rewards: dict[Name, RewardFunctionParams]
    align: AlignParams
    algorithms: dict[Name, AlgorithmParams]
    evaluation: EvaluationParams
    report: ReportParams
    gate: GateParams
    tune: TuneParams = TuneParams()
    judge: JudgeParams = JudgeParams()
    tracking: TrackingParams = TrackingParams()
    limits: LimitsParams = LimitsParams()

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        """Check the rules that involve several sections."""
        self._check_patterns()
        self._check_reward_sources()
        self._check_context("evaluation.max_new_tokens", self.evaluation.max_new_tokens)
        self._check_sections()
        self._check_reward_model()
        self._check_experts()
        for field in ("rewards", "accuracy"):
            names = getattr(self.evaluation, field)
            for source in [names] if isinstance(names, str) else names:
                if source not in self.rewards:
                    raise ValueError(f"evaluation.{field}: no reward {source!r}{nearest(source, self.rewards)}")
        if self.evaluation.accuracy not in self.evaluation.rewards:
            raise ValueError("evaluation.accuracy must be one of evaluation.rewards")
        if max(self.evaluation.pass_k) > self.evaluation.samples_per_prompt:
            raise ValueError(
                f"evaluation.pass_k {self.evaluation.pass_k}: k must not exceed samples_per_prompt {self.evaluation.samples_per_prompt}"
            )
        if self.tracking.traces > self.evaluation.samples_shown:
            raise ValueError(
                f"tracking.traces = {self.tracking.traces} exceeds evaluation.samples_shown = {self.evaluation.samples_shown}: only shown"
                " samples become traces; lower the one or raise the other"
            )
        self._check_benchmarks()
        budgets = {name: self.budget(name) for name in self.project.algorithms}
        check_best_checkpoint(self.align.best_checkpoint, self.rewards, budgets)
        check_space(self)
        return self

    def _check_sections(self) -> None:
        """Check all sections of `algorithms`. Raises ConfigError with the first error of each wrong one."""
        for name in self.project.algorithms:
            if name not in self.algorithms:
                raise ValueError(f"project.algorithms: no section algorithms.{name}{nearest(name, self.algorithms)}")
        errors = []
        for name in self.algorithms:
            try:
                self._check_section(name)
            except ConfigError as error:
                errors.append(str(error))
        if errors:
            raise ConfigError("\n".join(errors))

    def _check_section(self, name: str) -> None:
        """Check one section of `algorithms`, also one that project.algorithms does not list."""
        try:
            self.algorithm(name)
            budget = self.budget(name)
            if isinstance(budget, OnPolicyBudget):
                self._check_budget(name, budget)
            self._check_rewards(name)
        except ConfigError as error:
            if name in self.project.algorithms:
                raise
            raise ConfigError(
                f"{str(error).rstrip('.')}. project.algorithms does not list {name}, but every section is checked."
                f" Correct it, or remove it: algorithms.{name}=null"
            ) from None

    def algorithm(self, name: str) -> Algorithm:
        """Return the algorithm's spec that section `algorithms.name` describes."""
        section = self.algorithms[name]
        try:
            return choose(section.preset, section.options)
        except ConfigError as error:
            raise ConfigError(f"algorithms.{name}: {error}") from None

    def budget(self, name: str) -> OnPolicyBudget | PreferenceBudget:
        """Return `align.on_policy` or `align.preference` with the section's overrides."""
        on_policy = isinstance(self.algorithm(name), OnPolicy)
        defaults: Section = self.align.on_policy if on_policy else self.align.preference
        values = merged(defaults.model_dump(), self.algorithms[name].budget)
        location = ("algorithms", name, "budget")
        if not on_policy:
            return validated(PreferenceBudget, values, location)
        return validated(OnPolicyBudget, values, location)

    def watched_rewards(self, name: str) -> tuple[str, str] | None:
        """Return a true reward and the reward model that an algorithm trains on, or None if it does not measure both."""
        weights = self.algorithms[name].rewards or {}
        models = [r for r, weight in weights.items() if weight and self.rewards[r].function == "reward_model"]
        true = [r for r in weights if self.rewards[r].function != "reward_model"]
        return (true[0], models[0]) if true and models else None

    def reward_model_in(self, name: str) -> list[str]:
        """Return the places where an algorithm uses the reward model; empty if it reads none."""
        return algorithm_uses(name, self.algorithms[name], self.algorithm(name), self.rewards)

    def reward_model_in_evaluation(self) -> list[str]:
        """Return the parameters by which the evaluation uses the reward model."""
        return evaluation_uses(self.evaluation.rewards, self.rewards)

    def start(self, name: str) -> StartModel:
        """Return the model that an algorithm starts from."""
        return self.algorithms[name].start or self.align.start

    def _check_benchmarks(self) -> None:
        """Check that the evaluation runs every benchmark of the gate."""
        run = self.evaluation.benchmarks.tasks if self.evaluation.benchmarks else []
        for i, limit in enumerate(self.gate.benchmarks):
            if limit.task not in run:
                raise ValueError(
                    f"gate.benchmarks.{i}: {limit.task!r} is not in evaluation.benchmarks.tasks, so no model has its score; name"
                    f" it there, or remove it here{nearest(limit.task, run)}"
                )

    def _check_budget(self, name: str, budget: OnPolicyBudget) -> None:
        """Check one algorithm's sampling settings against its spec."""
        spec = self.algorithm(name)
        assert isinstance(spec, OnPolicy)
        if reason := needs_several_answers(spec, budget.samples_per_prompt):
            raise ConfigError(
                f"algorithms.{name}: {reason}; samples_per_prompt = {budget.samples_per_prompt} must be at least 2"
            )
        if "critic_learning_rate" in self.algorithms[name].budget and not spec.has_critic:
            raise ConfigError(
                f"algorithms.{name}.budget.critic_learning_rate: has no effect here; it is used only if advantage is 'gae'. Remove it."
            )
        if self.algorithms[name].budget.get("on_divergence") == "stop" and self.watched_rewards(name) is None:
            raise ConfigError(
                f"algorithms.{name}.budget.on_divergence: has no effect here; it compares a reward model that is trained on with a true"
                " reward. Give both in rewards, e.g. {rm: 1.0, answer: 0.0}, or remove it."
            )
        check_ahead(name, spec, budget)
        if budget.turns != self.evaluation.turns:
            raise ConfigError(
                f"algorithms.{name}: trains with turns = {budget.turns}, and evaluation.turns = {self.evaluation.turns}, so the model would"
                " be judged on other conversations than it is trained on; write the same in align.on_policy.turns and evaluation.turns"
            )
        updates = budget.steps * spec.epochs * spec.minibatches
        try:
            scheduled(spec, updates)
        except ConfigError as error:
            raise ConfigError(f"algorithms.{name}: {error}") from None
        if budget.optimizer.warmup_steps >= updates:
            raise ConfigError(
                f"algorithms.{name}: optimizer.warmup_steps = {budget.optimizer.warmup_steps} is as long as the run of {updates} optimiser"
                " steps, so the learning rate would never be reached; lower it"
            )
        self._check_context(f"algorithms.{name}: max_new_tokens", budget.max_new_tokens)
        if budget.prompts_per_step % spec.minibatches:
            fitting = -(-budget.prompts_per_step // spec.minibatches) * spec.minibatches
            raise ConfigError(
                f"algorithms.{name}: prompts_per_step = {budget.prompts_per_step} must be a multiple of minibatches = {spec.minibatches};"
                f" set algorithms.{name}.budget.prompts_per_step={fitting}"
            )

    def _check_context(self, field: str, new_tokens: int) -> None:
        """Raise ConfigError if prompt and new tokens exceed the model's context, as far as it is known without loading it."""
        source, prompt = self.model.source, self.validation.max_prompt_tokens
        name, context = "model.tiny.max_length", context_of(source) if source != "tiny" else self.model.tiny.max_length
        if source != "tiny":
            name = f"the context of {source}"
        if context is not None and prompt + new_tokens > context:
            raise ConfigError(
                f"{field} = {new_tokens} with validation.max_prompt_tokens = {prompt} exceeds {name} = {context}"
            )

    def _check_experts(self) -> None:
        """Raise ConfigError if no algorithm of the comparison trains on demonstrations."""
        specs = [self.algorithm(name) for name in self.project.algorithms if name in self.algorithms]
        if self.data.experts is not None and not any(isinstance(s, OnPolicy) and s.has_expert for s in specs):
            raise ConfigError(
                "data.experts: has no effect, because no algorithm of project.algorithms trains on demonstrations; add one with the preset"
                " chord or chord_phi, or remove it"
            )

    def _check_reward_model(self) -> None:
        """Raise ConfigError if something uses the reward model although `reward.enabled` is false."""
        if self.reward.enabled:
            return
        used = self.reward_model_in_evaluation()
        for name in self.project.algorithms:
            used += self.reward_model_in(name) if name in self.algorithms else []
        if used:
            raise ConfigError(
                f"reward.enabled is false, but {', '.join(used)} {'use' if len(used) > 1 else 'uses'} the reward model; remove"
                f" {'them' if len(used) > 1 else 'it'} (a reward by the value null), or set reward.enabled: true"
            )

    def _check_patterns(self) -> None:
        """Raise ConfigError if a regular expression of a reward or of `data` cannot be compiled."""
        patterns = {
            f"rewards.{name}.arguments.pattern": section.arguments.get("pattern")
            for name, section in self.rewards.items()
            if section.function in ("regex", "format")
        }
        for kind in ("sft", "preferences", "problems", "evaluation", "labelled", "experts"):
            source = getattr(self.data, kind)
            extract = (source and source.extract) or {}
            patterns |= {f"data.{kind}.extract.{name}": pattern for name, pattern in extract.items()}
        for place, pattern in patterns.items():
            if not isinstance(pattern, str):
                raise ConfigError(f"{place} = {pattern!r}: must be a regular expression as text")
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise ConfigError(f"{place} = {pattern!r}: not a regular expression: {error}") from None

    def _check_reward_sources(self) -> None:
        """Check the section `rewards`."""
        for name, section in self.rewards.items():
            if name in RESERVED_NAMES:
                raise ConfigError(
                    f"rewards.{name}: this name is reserved for a column of the tables; choose a different name"
                )
            if ":" not in section.function and section.function not in REWARD_FUNCTIONS:
                raise ConfigError(
                    f"rewards.{name}.function = {section.function!r}: no such function{nearest(section.function, REWARD_FUNCTIONS)},"
                    " or an import path package.module:function"
                )
            try:
                check_arguments(section.function, section.arguments)
            except ConfigError as error:
                raise ConfigError(f"rewards.{name}.arguments.{error}") from None
            for field in ("arguments", "on_failure"):
                if section.function == "reward_model" and field in section.model_fields_set:
                    raise ConfigError(f"rewards.{name}.{field}: has no effect on the reward model. Remove it.")
        for name in self.limits.reward_seconds:
            if name not in self.rewards:
                raise ConfigError(f"limits.reward_seconds.{name}: no reward {name!r}{nearest(name, self.rewards)}")
            if self.rewards[name].function == "reward_model":
                raise ConfigError(f"limits.reward_seconds.{name}: has no effect on the reward model. Remove it.")

    def _check_rewards(self, name: str) -> None:
        """Check one algorithm's reward weights."""
        section, on_policy = self.algorithms[name], isinstance(self.algorithm(name), OnPolicy)
        if not on_policy and section.rewards is not None:
            raise ConfigError(
                f"algorithms.{name}.rewards: has no effect, because {section.preset} learns from logged pairs. Remove it."
            )
        spec = self.algorithm(name)
        taught, weighed = isinstance(spec, OnPolicy) and spec.needs_teacher, any((section.rewards or {}).values())
        if taught != (section.teacher is not None):
            need = "missing; the preset learns from a teacher, e.g. teacher: models/large"
            raise ConfigError(
                f"algorithms.{name}.teacher: {need if taught else f'has no effect on the preset {section.preset}. Remove it.'}"
            )
        if section.teacher_prompt is not None and not taught:
            raise ConfigError(
                f"algorithms.{name}.teacher_prompt: has no effect on the preset {section.preset}. Remove it."
            )
        require_template(section.teacher_prompt, section.teacher, f"algorithms.{name}.teacher_prompt")
        if taught and weighed:
            raise ConfigError(
                f"algorithms.{name}.rewards: the preset {section.preset} learns from its teacher only; give rewards the weight 0 to measure"
                " them"
            )
        if on_policy and not taught and not weighed:
            raise ConfigError(
                f"algorithms.{name}.rewards: must give at least one reward a weight other than 0, e.g. {{answer: 1.0}}"
            )
        self._check_combination(name)
        for source in section.rewards or {}:
            if source not in self.rewards:
                raise ConfigError(f"algorithms.{name}.rewards: no reward {source!r}{nearest(source, self.rewards)}")

    def _check_combination(self, name: str) -> None:
        """Check that a group-normalised combination has several rewards."""
        spec, budget = self.algorithm(name), self.budget(name)
        if not isinstance(spec, OnPolicy) or spec.reward_combination == "sum":
            return
        assert isinstance(budget, OnPolicyBudget)
        weighed = sorted(source for source, weight in (self.algorithms[name].rewards or {}).items() if weight)
        if len(weighed) < 2:
            raise ConfigError(
                f"algorithms.{name}: reward_combination 'group_normalised' combines several rewards, but here only"
                f" {weighed[0]!r} has a weight. Give a second reward a weight, or use advantage 'group_z'."
            )
        if budget.samples_per_prompt < 2:
            raise ConfigError(
                f"algorithms.{name}: reward_combination 'group_normalised' compares several answers to one prompt;"
                f" samples_per_prompt = {budget.samples_per_prompt} must be at least 2"
            )


def load_params(path: str | Path = "params.yaml") -> Params:
    """Load and check a params file. Raises ConfigError with one line per error."""
    return parse_params(read_yaml(path), str(path))


def parse_params(tree: Any, origin: str = "params.yaml") -> Params:
    """Check a params tree that is already parsed."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{origin}: must be a mapping of sections ({', '.join(Params.model_fields)})")
    try:
        refuse_huge(tree)
        return validated(Params, tree, ())
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `over`, merged recursively."""
    tree = dict(base)
    for key, value in over.items():
        tree[key] = merged(tree[key], value) if isinstance(value, dict) and isinstance(tree.get(key), dict) else value
    return tree


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested parameters as {"sft.optimizer.learning_rate": 2e-3}; lists stay values."""
    if isinstance(tree, BaseModel):
        tree = tree.model_dump()
    elif is_dataclass(tree) and not isinstance(tree, type):
        tree = {f.name: getattr(tree, f.name) for f in fields(tree)}
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
