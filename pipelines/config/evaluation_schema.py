"""Define the sections `evaluation` and `report` of params.yaml."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipelines.config.schema import ComputeParams, TurnsParams
from pipelines.config.second_task_schema import SecondTask
from pipelines.config.types import Count, Section, Seed, Temperature


class BenchmarkParams(Section):
    """Tasks of the package lm-eval, which every model is asked besides the held-out problems."""

    tasks: Annotated[list[str], Field(min_length=1)]
    """Tasks by name: files in data/benchmarks, or those of the package, whose data comes from the hub (HF_HUB_OFFLINE=0)."""
    limit: Count | None = None
    """Documents of each task; null: all."""
    shots: Annotated[int, Field(ge=0)] | None = None
    """Examples before each question; null: the task's own number."""
    chat: bool = False
    """True: ask in the model's chat template."""


class EvaluationParams(Section):
    """Evaluation on held-out problems."""

    seed: Seed
    max_new_tokens: Count
    samples_per_prompt: Count
    temperature: Temperature
    pass_k: Annotated[list[Count], Field(min_length=1)]
    rewards: Annotated[list[str], Field(min_length=1)]
    accuracy: str
    samples_shown: Count
    turns: TurnsParams | None = None
    """Conversations of several turns, as in align.on_policy.turns."""
    groups: str | None = None
    """Column of the evaluation table with the group of each prompt, for clustered standard errors."""
    second_task: SecondTask | None = None
    """A task that nothing trains on, to see what was forgotten."""
    benchmarks: BenchmarkParams | None = None
    """Standard benchmarks in the same report, with each model's change from base; needs the extra `benchmarks`."""
    compute: ComputeParams

    @model_validator(mode="after")
    def _each_once(self) -> EvaluationParams:
        """Refuse the same k, reward or benchmark twice."""
        if len(set(self.pass_k)) < len(self.pass_k):
            raise ValueError(f"pass_k {self.pass_k}: names the same k twice; name each once")
        tasks = self.benchmarks.tasks if self.benchmarks else []
        for field, names in (("rewards", self.rewards), ("benchmarks.tasks", tasks)):
            if len(set(names)) < len(names):
                raise ValueError(f"{field} {names}: names the same one twice; name each once")
        return self


class ReportParams(Section):
    """Statistics of the report."""

    headline: Literal["sampled", "greedy"] = "sampled"
    """Answers whose mean reward `evaluation.accuracy` ranks the models, in the report, the gate and MLflow."""
    currency: Literal["tokens_sampled", "tokens_trained", "optimiser_steps", "wall_time"] = "tokens_sampled"
    """The budget that must be equal, up to a tenth, for algorithms to be ranked together; see docs/comparison.md. wall_time is measured on
    the machine that trained, so that the report then depends on it."""
    seed: Seed
    bootstrap: Annotated[int, Field(ge=100)]
    confidence: Annotated[float, Field(gt=0.5, lt=1)]
    looks: Count | Literal["always"] = 1
    """Times that the comparison will be read while seeds are added; each look gets an equal part of 1 - confidence. always: intervals that
    are valid after any number of seeds, however often they are read. Both keep the level over all looks."""
    samples_shown: Count

    def level(self, seeds: int) -> float:
        """Return the confidence of one look at a comparison with this number of seeds.

        With `always`, n seeds get 1 / (n (n - 1)) of 1 - confidence. The parts of n = 2, 3, … add up to 1, so the intervals of all
        numbers of seeds hold at once (union bound), and the number of looks need not be fixed. One seed is no statement about training.
        """
        error = 1 - self.confidence
        if self.looks == "always":
            return self.confidence if seeds < 2 else 1 - error / (seeds * (seeds - 1))
        return self.confidence if self.looks == 1 else 1 - error / self.looks
