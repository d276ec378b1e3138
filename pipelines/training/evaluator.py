"""Answers of one model to the held-out problems, as the steps `evaluate` and `gate` ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.config.evaluation_schema import BenchmarkParams
from pipelines.data.tables import group_labels, plain
from pipelines.runtime.context import RunContext
from pipelines.runtime.recorder import RunRecorder
from pipelines.training.setup import accelerator, announce, device_name, problems, read_table, with_turns
from posttrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pipelines.config.second_task_schema import SecondTask
    from posttrain.data.tokens import TextEncoder
    from posttrain.evaluation.answers import EvaluatedAnswer
    from posttrain.evaluation.benchmarks import BenchmarkScore
    from posttrain.evaluation.processes import Processes
    from posttrain.models.policy import Policy

REFERENCE = Path("models/sft")
TASKS = Path("data/benchmarks")
"""Folder of the project's task files of lm-eval."""


class Evaluator:
    """A model folder before the held-out problems, with the settings of params.yaml's `evaluation`."""

    def __init__(self, context: RunContext, recorder: RunRecorder, folder: Path) -> None:
        params = context.params.evaluation
        connected = accelerator(context, params.compute, params.seed, folder)
        self.device = connected.device
        from posttrain.evaluation.processes import Processes
        from posttrain.models.folders import load_encoder, load_policy
        from posttrain.models.policy import Policy

        self.processes = Processes(connected)
        recorder.ready(device_name(self.device))
        self.context, self.recorder, self.folder, self.params = context, recorder, folder, params
        self.encoder = load_encoder(folder)
        self.policy = Policy(load_policy(folder)).to(self.device).eval().requires_grad_(False)

    def answers(self) -> list[EvaluatedAnswer]:
        from pipelines.training.reward_sources import JudgeTokens, judges_used, reward_sources
        from posttrain.evaluation.answers import EvaluationSettings, evaluate
        from posttrain.models.folders import load_policy
        from posttrain.models.policy import Policy
        from posttrain.rollouts.native import NativeEngine

        params, compute = self.params, self.params.compute
        reference = None
        if self.folder != REFERENCE:
            reference = Policy(load_policy(REFERENCE)).to(self.device).eval().requires_grad_(False)
        settings = EvaluationSettings(
            params.max_new_tokens,
            params.samples_per_prompt,
            params.temperature,
            params.seed,
            compute.micro_batch_tokens,
            compute.bf16,
        )
        asked = problems(self.encoder, read_table("evaluation"))
        if params.groups is not None:  # before an answer is sampled
            group_labels(params.groups, [problem.columns for problem in asked])
        announce(self.context, f"{len(asked)} problems, 1 greedy and {settings.samples} sampled answers each")
        engine = with_turns(
            NativeEngine(self.policy.lm, self.encoder.ends, bf16=compute.bf16), self.encoder, params.turns
        )
        limits = self.context.params.limits.reward_seconds
        sources = reward_sources(self.context.params.rewards, params.rewards, self.device, compute, limits)
        judged = JudgeTokens(self.recorder, sources)
        try:
            answers = evaluate(self.policy, reference, engine, self.encoder, asked, sources, settings, self.processes)
        finally:
            judged.record()  # a failed evaluation has paid, too
        for line in judges_used(sources):
            announce(self.context, line)
        return answers

    def benchmarks(self, settings: BenchmarkParams) -> list[BenchmarkScore]:
        """Scores of the tasks of lm-eval that params.yaml names."""
        from posttrain.evaluation.benchmarks import BenchmarkSettings, benchmark
        from posttrain.rollouts.native import NativeEngine

        compute = self.params.compute
        wanted = BenchmarkSettings(
            settings.tasks,
            TASKS,
            settings.limit,
            settings.shots,
            settings.chat,
            compute.micro_batch_tokens,
            compute.bf16,
        )
        announce(self.context, f"benchmarks of lm-eval: {', '.join(settings.tasks)}")
        engine = NativeEngine(self.policy.lm, self.encoder.ends, bf16=compute.bf16)
        return benchmark(self.policy, engine, self.encoder, wanted)

    def preference_accuracy(self) -> float:
        """Share of held-out pairs whose chosen answer the policy finds the more probable one."""
        from posttrain.data.tokens import table_tokens
        from posttrain.evaluation.answers import preferred_share

        rows, compute = read_table("preferences_heldout"), self.params.compute
        chosen, rejected = (table_tokens(self.encoder, rows, name) for name in ("chosen", "rejected"))
        pairs = list(zip(chosen, rejected, strict=True))
        return preferred_share(self.policy, pairs, compute.micro_batch_tokens, compute.bf16, self.processes)

    def check_second_task(self) -> None:
        """Raise ConfigError if `evaluation.second_task` cannot be asked, before an answer is sampled."""
        if self.params.second_task is not None:
            second_task_prompts(self.encoder, self.params.second_task, self._second_settings())

    def second_task(self) -> dict[str, float]:
        """Return the measures of `evaluation.second_task`; empty if there is none."""
        task = self.params.second_task
        if task is None:
            return {}
        return second_task_measures(self.policy, self.encoder, task, self._second_settings(), self.processes)

    def _second_settings(self) -> SecondTaskSettings:
        return SecondTaskSettings(self.params.seed, self.params.max_new_tokens, self.params.compute.bf16)


class SecondTaskSettings(NamedTuple):
    """Settings of the answers to a second task: those of the evaluation."""

    seed: int
    max_new_tokens: int
    bf16: bool = False


def second_task_prompts(
    encoder: TextEncoder, task: SecondTask, settings: SecondTaskSettings
) -> tuple[list[dict[str, Any]], list[tuple[int, ...]]]:
    """Return the rows of a second task and the tokens of their prompts.

    Raises:
        ConfigError: the task has several turns, the options do not fit it, or a prompt leaves no room for an answer.
    """
    from posttrain.data.tokens import row_tools
    from posttrain.environments.base import single_turn_rows

    rows = single_turn_rows(task.source, task.rows, settings.seed, task.options, "evaluation.second_task")
    prompts = [tuple(encoder.prompt(row["prompt"], row_tools(row))) for row in rows]
    longest = max(map(len, prompts))
    if longest + settings.max_new_tokens > encoder.max_length:
        raise ConfigError(
            f"evaluation.second_task: a prompt of {task.source} has {longest} tokens, and evaluation.max_new_tokens ="
            f" {settings.max_new_tokens} more exceed the model's context of {encoder.max_length}; choose options with shorter prompts, or"
            " lower max_new_tokens"
        )
    return rows, prompts


def second_task_measures(
    policy: Policy,
    encoder: TextEncoder,
    task: SecondTask,
    settings: SecondTaskSettings,
    processes: Processes | None = None,
) -> dict[str, float]:
    """Return the mean reward of the greedy answers to a second task, and the share of answers that its judge cannot score, if any.

    Raises:
        ConfigError: see `second_task_prompts`.
        DataError: the judge scored no answer.
    """
    from posttrain.environments.base import environment
    from posttrain.evaluation.processes import ONE_PROCESS
    from posttrain.rewards.sources import FunctionReward, RewardBatch
    from posttrain.rollouts.engine import Request, SamplingSettings
    from posttrain.rollouts.native import NativeEngine

    rows, prompts = second_task_prompts(encoder, task, settings)
    judge = FunctionReward("evaluation.second_task", environment(task.source).reward)
    requests = [Request(prompt, ((0,),)) for prompt in prompts]
    engine = NativeEngine(policy.lm, encoder.ends, bf16=settings.bf16)
    sharing = processes or ONE_PROCESS
    answers = sharing.sample(engine, requests, SamplingSettings(settings.max_new_tokens, 0.0))
    texts = [encoder.text(completion.tokens) for (completion,) in answers]
    names = dict.fromkeys(name for row in rows for name in row if name != "prompt")
    columns = {name: [row.get(name) for row in rows] for name in names}
    batch = RewardBatch([row["prompt"] for row in rows], texts, [], columns)
    judged = sharing.on_rank_0(lambda: judge.score(batch))
    known = [reward for reward in judged if reward is not None]
    if not known:
        raise DataError(f"evaluation.second_task: the judge of {task.source} scored none of {len(judged)} answers")
    missing = {} if len(known) == len(judged) else {"second_task/missing": 1 - len(known) / len(judged)}
    return {"second_task/accuracy": sum(known) / len(known)} | missing


def write_predictions(path: Path, answers: Sequence[EvaluatedAnswer], groups: str | None = None) -> None:
    """Write one row for each answer; `groups` names the column of the evaluation table with the group of a prompt.

    Raises:
        DataError: a prompt has no value there, or a number is written in two ways.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from posttrain.rollouts.turns import transcript

    columns: dict[str, Any] = {
        "prompt_id": pa.array([a.prompt_id for a in answers], pa.int64()),
        "sample": pa.array([a.sample for a in answers], pa.int64()),
        "prompt": [plain(a.problem.prompt) for a in answers],
        "answer": [str(a.problem.columns.get("answer", "")) for a in answers],
        "completion": [a.text for a in answers],
        **({"conversation": [transcript(a.messages) for a in answers]} if answers[0].messages else {}),
        "tokens": pa.array([a.tokens for a in answers], pa.int64()),
        "truncated": pa.array([a.truncated for a in answers], pa.bool_()),
        "entropy": pa.array([a.entropy for a in answers], pa.float64()),
        "kl": pa.array([a.kl for a in answers], pa.float64()),
    }
    if groups is not None:
        asked = {a.prompt_id: a.problem.columns for a in answers}
        labels = dict(zip(asked, group_labels(groups, [*asked.values()]), strict=True))
        columns["group"] = [labels[a.prompt_id] for a in answers]
    for source in sorted(answers[0].rewards):
        columns[f"reward_{source}"] = pa.array([a.rewards[source] for a in answers], pa.float64())
    pq.write_table(pa.table(columns), path)
