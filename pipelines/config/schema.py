"""Define the sections of params.yaml, one typed model each. `pipelines.config.params` checks rules across sections."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipelines.config.checkpoint_schema import BestCheckpointParams
from pipelines.config.lora_schema import LoraParams
from pipelines.config.types import (
    Count,
    LearningRate,
    Momentum,
    Name,
    NonNegative,
    Positive,
    RewardWeight,
    RulePolicy,
    Section,
    Seed,
    Share,
    Source,
    Temperature,
)
from posttrain.settings import OptimizerSettings


class ProjectParams(Section):
    experiment: Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9_. -]{0,98}[A-Za-z0-9])?$")]
    """Also names the registered model, and is part of addresses: letters, digits and _ . - within, at most 100."""
    algorithms: Annotated[list[Name], Field(min_length=1)]
    seeds: Annotated[list[Seed], Field(min_length=1)]
    code: Annotated[str, Field(pattern=r"^[^\s${}]+$")] = "posttrain/environments"
    """Folder (or file) of your own rewards and environments, for DVC: an edit makes the stages that import it stale."""

    @model_validator(mode="after")
    def _distinct(self) -> ProjectParams:
        """Check that no value is repeated."""
        for field in ("algorithms", "seeds"):
            values = getattr(self, field)
            if len(set(values)) != len(values):
                raise ValueError(f"{field} {values} must not repeat a value")
        return self


class RuleParams(Section):
    empty_text: RulePolicy
    identical_pair: RulePolicy
    duplicate_rows: RulePolicy
    score_order: RulePolicy
    tied_scores: RulePolicy
    prompt_length: RulePolicy
    completion_length: RulePolicy
    unparseable_answer: RulePolicy
    contradicted_answer: RulePolicy = "quarantine"
    """The answer is not the value of the row's `equation`, where a source maps one."""
    negative_weight: RulePolicy = "quarantine"
    """Of a row of the sft table, where a source maps a `weight`."""
    wrong_type: RulePolicy
    chat_template: RulePolicy = "stop"
    """The model's chat template refuses a conversation, or it is not certain which of its tokens are trained."""
    unknown_tokens: RulePolicy = "quarantine"
    """More than validation.max_unknown_share of a row's tokens are the tokenizer's unknown token, so the text is lost."""
    leakage: RulePolicy


class ValidationParams(Section):
    """Limits and policies of validation."""

    max_prompt_tokens: Count
    max_completion_tokens: Count
    max_shown_rows: Count
    max_unknown_share: Share = 0.02
    """Share of a row's tokens that may be the tokenizer's unknown token."""
    rules: RuleParams


class TinyParams(Section):
    """Shape of the tiny model."""

    hidden_size: Count
    intermediate_size: Count
    layers: Count
    heads: Count
    kv_heads: Count
    max_length: Count
    experts: Annotated[int, Field(ge=0)] = 0
    experts_per_token: Count = 2

    @model_validator(mode="after")
    def _divisible(self) -> TinyParams:
        """Check that the sizes fit together."""
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise ValueError(f"hidden_size {self.hidden_size} must be an even multiple of heads {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        if not self.experts and self.experts_per_token != type(self).model_fields["experts_per_token"].default:
            raise ValueError(
                f"experts_per_token {self.experts_per_token} has no effect without experts; set experts, or remove it"
            )
        if self.experts and self.experts_per_token > self.experts:
            raise ValueError(f"experts_per_token {self.experts_per_token} must not exceed experts {self.experts}")
        return self


class ModelParams(Section):
    """The base model."""

    source: Source
    seed: Seed
    tiny: TinyParams


class OptimizerParams(Section):
    """Settings of the optimiser and its schedule; the defaults are those of the library."""

    learning_rate: LearningRate
    schedule: Literal["constant", "linear", "cosine"]
    warmup_steps: Annotated[int, Field(ge=0)] = OptimizerSettings.warmup_steps
    weight_decay: NonNegative = OptimizerSettings.weight_decay
    beta1: Momentum = OptimizerSettings.beta1
    beta2: Momentum = OptimizerSettings.beta2
    epsilon: Positive = OptimizerSettings.epsilon
    max_grad_norm: Positive = OptimizerSettings.max_grad_norm
    moment_bits: Literal[8, 32] = OptimizerSettings.moment_bits
    """Bits of a number of AdamW's two moments. 8: block-wise quantised (2110.02861), by torchao; a quarter of the memory."""
    offload: bool = OptimizerSettings.offload
    """Keep the moments, and a second copy of the trained weights, in main memory; the CPU computes the step. For GPUs."""

    @model_validator(mode="after")
    def _offloaded_moments_are_whole(self) -> OptimizerParams:
        if self.offload and self.moment_bits != 32:
            raise ValueError(
                f"offload: true keeps moments of 32 bits in main memory, so moment_bits {self.moment_bits} has no effect; remove one"
            )
        return self

    def settings(self) -> OptimizerSettings:
        """Return the library's type with these values."""
        return OptimizerSettings(**{f.name: getattr(self, f.name) for f in fields(OptimizerSettings)})


class ComputeParams(Section):
    """Precision, batch size in tokens, and threads."""

    micro_batch_tokens: Count
    bf16: bool
    threads: Count | Literal["auto"]
    """Threads of a CPU process. `auto` uses all cores or one, by the model's size; the number of threads changes rounding."""
    deterministic: bool = False
    """Use only GPU kernels that give the same bits in every run; PyTorch raises an error for an operation without one."""


class TrainingComputeParams(ComputeParams):
    """Settings of computation during training."""

    gradient_checkpointing: bool = False
    """Keep only each layer's input and recompute the layer in the backward pass: less memory, a third more time."""
    compile: bool = False
    """Use torch.compile for the decoder layers; worthwhile for long runs, because compiling takes some minutes."""


class CheckpointParams(Section):
    """Interval and number of checkpoints."""

    every_steps: Count
    every_minutes: Positive
    keep: Count


class FaultParams(Section):
    """Reaction to NaN and infinity."""

    skip_at_most: Annotated[int, Field(ge=0)] = 0
    """Number of updates with NaN or infinity that a run may skip; 0 stops at the first. Each is saved for replay."""


class SftParams(Section):
    """Supervised fine-tuning."""

    seed: Seed
    epochs: Count
    batch_size: Count
    train_on: Literal["completion", "last", "each", "marked", "all"]
    samples_every: Count
    samples_shown: Count
    optimizer: OptimizerParams
    lora: LoraParams | None = None
    compute: TrainingComputeParams
    checkpoint: CheckpointParams
    faults: FaultParams


class RewardParams(Section):
    """Training of the reward model."""

    enabled: bool = True
    """False: no algorithm, critic or evaluation uses a reward model, so the stage trains none and ends at once."""
    source: Source | None = None
    """An existing reward model, used as it is: a folder or a hub id. None: one is trained, from the supervised model."""
    seed: Seed
    epochs: Count
    batch_size: Count
    margin_from_scores: bool
    """True if a pair's margin is the difference of its scores."""
    soft_target_scale: Positive | None = None
    """eta: a pair's target is sigma(eta * difference of its scores). None: the target is 1."""
    balance_prompts: bool = True
    """True: pairs are weighed so that every prompt counts once, however many pairs it has. False: every pair counts once."""
    heads: Count = 1
    """Heads of an ensemble on one trunk, each trained on a random half of the prompts; the score is their mean."""
    disagreement: NonNegative = 0.0
    """Penalty of an ensemble's score: this number times the standard deviation of its heads (2310.02743)."""
    center_coefficient: NonNegative
    optimizer: OptimizerParams
    lora: LoraParams | None = None
    compute: TrainingComputeParams
    checkpoint: CheckpointParams
    faults: FaultParams

    @model_validator(mode="after")
    def _heads_disagree(self) -> RewardParams:
        """Refuse a penalty on the disagreement of one head."""
        if self.disagreement and self.heads == 1:
            raise ValueError(
                f"disagreement = {self.disagreement:g}: one head never disagrees with itself, so it would have no effect; set heads to 2 or"
                " more, or disagreement: 0"
            )
        return self

    @model_validator(mode="after")
    def _source_is_not_trained(self) -> RewardParams:
        """Refuse options without effect on an existing reward model."""
        given = {
            "margin_from_scores": self.margin_from_scores,
            "soft_target_scale": self.soft_target_scale,
            "lora": self.lora,
            "heads": self.heads > 1,
        }
        without_effect = [name for name, value in given.items() if value]
        if self.source is not None and (without_effect or not self.enabled):
            raise ValueError(
                f"source = {self.source!r} is an existing reward model, which is not trained:"
                f" {', '.join(without_effect) or 'enabled: false'} would have no effect; remove it, or set source: null"
            )
        return self

    @model_validator(mode="after")
    def _scores_count_once(self) -> RewardParams:
        """Refuse two options that add the same term."""
        if self.margin_from_scores and self.soft_target_scale is not None:
            raise ValueError(
                "margin_from_scores and soft_target_scale both add the difference of the scores to the loss, which would count it twice;"
                " set margin_from_scores: false, or soft_target_scale: null"
            )
        return self


DEFAULT_TIMEOUT_SECONDS = 60.0


class RewardFunctionParams(Section):
    """One reward function."""

    function: str
    """A built-in (reward_model, judge, answer, math, mentions, length, regex, format) or an import path package.module:function."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    on_failure: Literal["stop", "skip"] = "stop"
    """Reaction to an exception or a time-out: stop the run, or give these answers no reward (never 0)."""

    @model_validator(mode="before")
    @classmethod
    def _limits_are_elsewhere(cls, given: Any) -> Any:
        """Refuse a time limit here: DVC tracks all of `rewards`, so a change of it would make stages stale."""
        if isinstance(given, dict) and "timeout_seconds" in given:
            raise ValueError(
                f"timeout_seconds is now limits.reward_seconds, where a change makes no stage stale. Remove it here and write"
                f" limits: {{reward_seconds: {{NAME: {given['timeout_seconds']}}}}} with the reward's name"
            )
        return given


TRUNCATIONS = {"top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}


StartModel = Literal["sft", "base"]


class RolloutParams(Section):
    """The sampling engine. The environment selects its servers (docs/rollouts.md)."""

    engine: Literal["native", "vllm"] = "native"
    keep: Literal["none", "extremes", "all"] | Annotated[float, Field(gt=0, lt=1)] = "none"
    """Answers that each step stores in a table next to the run: none, a few extremes, a random share such as 0.1, or all.
    `posttrain replay` needs all."""
    staleness: Annotated[int, Field(ge=0)] = 0
    """Most steps between the weights that sample an answer and those that it trains. 0: the trainer waits for its answers. From 1, a
    second process or the servers sample the next steps' answers during the update; `anchor: rollout` or a `mismatch` corrects for it."""
    interrupt: Annotated[int, Field(ge=0)] = 0
    """With a staleness from 2: most tokens of an answer that one step's weights sample before the next step's go on with it. Those of the
    last step before it trains sample all the rest. 0: the weights that begin an answer end it."""


class TurnsParams(Section):
    """Conversations of several turns with an environment that has a `step`."""

    environment: str
    """A built-in environment with turns (calculator, guess), or an import path package.module:ENVIRONMENT."""
    limit: Count = 4
    """Most turns of the model. A conversation that is not over then is judged as it is."""
    on_error: Literal["stop", "end", "tell"] = "stop"
    """Reaction to an exception or a time-out of `step`: stop the run, end the conversation, or show the model the error and go on."""
    timeout_seconds: Positive = 10.0
    """Time limit of one `step`."""


class OnPolicyBudget(Section):
    """Sampling and training of an on-policy algorithm."""

    steps: Count
    prompts_per_step: Count
    samples_per_prompt: Count
    temperature: Temperature
    max_new_tokens: Count
    measure_kl_every: Annotated[int, Field(ge=0)] = 1
    """Interval in steps between forward passes of the reference, if the loss does not need them; 0 disables them."""
    on_divergence: Literal["report", "stop"] = "report"
    """stop: end with an error once the true reward falls while the reward model's score stays up (posttrain/evaluation/divergence.py)."""
    rollouts: RolloutParams = RolloutParams()
    turns: TurnsParams | None = None
    """Conversations of several turns; `max_new_tokens` is then the limit of one turn. null: one answer to each prompt."""
    optimizer: OptimizerParams
    critic_learning_rate: LearningRate

    @model_validator(mode="before")
    @classmethod
    def _untruncated(cls, given: Any) -> Any:
        """Refuse options that truncate the sampling distribution."""
        for name in sorted(TRUNCATIONS & set(given if isinstance(given, dict) else ())):
            raise ValueError(
                f"{name}: truncated sampling biases the importance ratio, since the trainer's probabilities cover the tokens that"
                " the sampler never draws; remove it, and use temperature"
            )
        return given


class PreferenceBudget(Section):
    """Training of a preference algorithm."""

    batch_size: Count
    optimizer: OptimizerParams


class AlignParams(Section):
    """Alignment: defaults of all algorithms."""

    start: StartModel = "sft"
    """Model to start from, which is also the reference policy: sft, or base without supervised fine-tuning."""
    on_policy: OnPolicyBudget
    preference: PreferenceBudget
    samples_every: Count
    samples_shown: Count
    best_checkpoint: BestCheckpointParams | None = None
    """Evaluate the best of several steps; null: the last step."""
    lora: LoraParams | None = None
    compute: TrainingComputeParams
    checkpoint: CheckpointParams
    faults: FaultParams


class AlgorithmParams(Section):
    """One algorithm: a preset with options."""

    preset: str
    start: StartModel | None = None
    """Override of align.start."""
    options: dict[str, Any] = Field(default_factory=dict)
    rewards: dict[str, RewardWeight] | None = None
    """Weight of each reward; weight 0 measures a reward without training on it."""
    teacher: str | None = None
    """Folder or hub id of the model to distil from, with the same vocabulary, or self: the model before training; only for presets whose
    advantage is 'teacher'."""
    teacher_prompt: str | None = None
    """The prompt that the teacher reads, with {prompt} and columns of the problems in braces; null: the student's."""
    budget: dict[str, Any] = Field(default_factory=dict)
    """Overrides of align.on_policy or align.preference, by the preset's kind."""
    tuned: str | None = None
    """How the values were found, for the report's protocol, e.g. "best of 4 trials"; `make tune` writes it."""
