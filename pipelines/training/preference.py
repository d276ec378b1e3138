"""Run the preference branch of the align step: the DPO family, GRPO over logged groups, and KTO over labelled answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.config.schema import AlignParams, PreferenceBudget
from pipelines.data.tables import read_rows
from pipelines.runtime.context import RunContext
from pipelines.runtime.identity import content_digest
from pipelines.runtime.run import Run
from pipelines.training.best_checkpoint import best_weights, hooks, restore
from pipelines.training.sample_tables import GreedySamples
from pipelines.training.setup import (
    VALID,
    TrainableModel,
    adapter_facts,
    announce,
    apply_training_options,
    merged_model,
    model_card,
    read_table,
    start_folder,
    train,
    write_model,
)
from posttrain.algorithms import LoggedGroups, Preference, Unpaired
from posttrain.data.batches import EpochOrder
from posttrain.data.tokens import TextEncoder, Tokens, table_tokens
from posttrain.errors import DataError
from posttrain.models.folders import load_encoder, load_policy
from posttrain.models.policy import Policy
from posttrain.models.reference import ReferenceCache
from posttrain.training.preference import (
    Answer,
    AnswerGroup,
    LoggedGroupsObjective,
    PreferenceObjective,
    PreferencePair,
    ranked_groups,
)
from posttrain.training.sharding import place, shards
from posttrain.training.supervised import EpochSource
from posttrain.training.trainer import Trainer
from posttrain.training.unpaired import LabelledAnswer, UnpairedObjective, UnpairedSource, mismatched

if TYPE_CHECKING:
    from accelerate import Accelerator


def align(run: Run, name: str, seed: int, device: Accelerator, folder: Path) -> tuple[int, dict[str, float]]:
    """Train on logged pairs; return the number of steps and the last step's metrics."""
    context = run.context
    spec, budget, compute = context.params.algorithm(name), context.params.budget(name), context.params.align.compute
    assert isinstance(spec, Preference | LoggedGroups | Unpaired)
    assert isinstance(budget, PreferenceBudget)
    start = start_folder(context.params, name)
    encoder, made = load_encoder(start), _make(context.params.align, start, shards(device))
    policy = place(made.model, device)
    cache = reference_cache(context, start, device) if spec.needs_reference else None
    reference = Reference(policy, compute.micro_batch_tokens, compute.bf16, cache)
    data = _data(spec, encoder, reference)
    order = EpochOrder(len(data.rows), budget.batch_size, spec.epochs, seed)
    source: EpochSource[Any] = EpochSource(data.rows, order)
    if isinstance(spec, Unpaired):
        source = UnpairedSource(data.rows, order, policy, device, compute.micro_batch_tokens, compute.bf16)
    settings = budget.optimizer.settings()
    trainer: Trainer[Any] = Trainer(
        policy, settings, total_steps=order.steps, micro_batch_tokens=compute.micro_batch_tokens, accelerator=device
    )
    announce(context, f"{order.steps} optimiser steps over {len(data.rows)} {data.noun}, {spec.epochs} epochs")
    hook = GreedySamples(
        run.recorder,
        policy,
        encoder,
        data.preferred,
        context.params.align.samples_every,
        context.params.align.samples_shown,
    )
    best = best_weights(run, source, trainer, policy, encoder, order.steps)
    last = train(
        run, trainer, best or source, data.objective, order.steps, data.shown, context.params.align, hooks(hook, best)
    )
    chosen, facts = restore(context, best, trainer)
    about = (
        {
            "algorithm": f"{spec.name} (arXiv {spec.paper})",
            "seed": seed,
            "learning rate": settings.learning_rate,
        }
        | adapter_facts(context.params.align.lora, made.adapter)
        | facts
    )
    made = merged_model(trainer, made, lambda: _make(context.params.align, start))
    card = model_card(context, f"Aligned with {name}", start, about, last)
    write_model(run.outputs, made.model.lm, encoder, folder, card, made.adapter)
    return order.steps, last | chosen


def _make(params: AlignParams, start: str, deferred: bool = False) -> TrainableModel[Policy]:
    """Build the model to start from, with its training options. A new adapter changes nothing yet, so the model is its own reference."""
    policy = Policy(load_policy(start, deferred))
    return TrainableModel(policy, apply_training_options(policy.lm, params.lora, params.compute))


def reference_cache(context: RunContext, start: str, device: Accelerator) -> ReferenceCache:
    """Return the checkout's cache of reference log-probabilities.

    All algorithms and seeds with the same start model, code and settings share it.
    """
    compute = json.dumps(context.params.align.compute.model_dump(), sort_keys=True)
    key = " ".join([content_digest(Path(start)), context.code, compute, device.device.type])
    return ReferenceCache(context.state.parent.parent / "reference", key, device)


@dataclass(frozen=True)
class Reference:
    """The reference policy: the model before training, whose log-probabilities are cached; zeros without a cache."""

    policy: Policy
    micro_batch_tokens: int
    bf16: bool
    cache: ReferenceCache | None

    def answers(self, *sides: Sequence[Tokens]) -> list[tuple[Answer, ...]]:
        """Return a tuple for each row, with one answer of each side."""
        tokens = [t for side in sides for t in side]
        if self.cache is not None:
            logprobs = self.cache.logprobs(self.policy, tokens, self.micro_batch_tokens, self.bf16)
        else:
            logprobs = [np.zeros(len(t.response), dtype=np.float32) for t in tokens]
        answers = [Answer(t, r) for t, r in zip(tokens, logprobs, strict=True)]
        rows = len(sides[0])
        return list(zip(*(answers[i * rows : (i + 1) * rows] for i in range(len(sides))), strict=True))


@dataclass(frozen=True)
class _Data:
    """Rows with their objective, the metrics that the progress bar shows, and answers whose prompts are sampled."""

    rows: list[Any]
    objective: Any
    noun: str
    shown: tuple[str, ...]
    preferred: list[Tokens]


def _data(spec: Preference | LoggedGroups | Unpaired, encoder: TextEncoder, reference: Reference) -> _Data:
    if isinstance(spec, Unpaired):
        table = read_rows(VALID / "labelled.parquet") or unpaired(read_table("preferences"))
        tokens = table_tokens(encoder, table, "completion")
        labelled = [
            LabelledAnswer(answer, row["label"], partner)
            for row, (answer, partner) in zip(
                table, reference.answers(tokens, mismatched(tokens, encoder.max_length)), strict=True
            )
        ]
        preferred = [row.answer.tokens for row in labelled if row.desirable]
        shown = ("loss", "unpaired/desirable_reward", "unpaired/undesirable_reward")
        return _Data(labelled, UnpairedObjective(spec), "labelled answers", shown, preferred)
    table = read_table("preferences")
    answers: Any = reference.answers(*(table_tokens(encoder, table, side) for side in ("chosen", "rejected")))
    rows: list[Any] = groups(table, answers) if isinstance(spec, LoggedGroups) else pairs(table, answers, spec)
    objective: Any = LoggedGroupsObjective(spec) if isinstance(spec, LoggedGroups) else PreferenceObjective(spec)
    shown = ("loss", "preference/accuracy", "preference/margin")
    return _Data(rows, objective, "pairs or groups", shown, [chosen.tokens for chosen, _ in answers])


def unpaired(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return every chosen answer with label True and every rejected one with label False, each once."""
    rows: dict[str, dict[str, Any]] = {}
    for row in table:
        for column, label in (("chosen", True), ("rejected", False)):
            made: dict[str, Any] = {name: row[name] for name in ("prompt", "tools") if name in row}
            made |= {"completion": row[column], "label": label}
            rows.setdefault(json.dumps(made, sort_keys=True), made | {"id": f"{row['id']} {column}"})
    return list(rows.values())


def pairs(table: list[dict[str, Any]], answers: list[tuple[Answer, Answer]], spec: Preference) -> list[PreferencePair]:
    """Return the preference pairs. Raises DataError if a score weighting is set but the table has no scores."""
    weighting = spec.score_weighting != "none"
    if weighting and "chosen_score" not in table[0]:
        raise DataError(
            f"score_weighting {spec.score_weighting!r} needs the columns chosen_score and rejected_score, but the preferences table"
            " has none; add them in data.preferences.columns, or set score_weighting: none"
        )
    gaps = [row["chosen_score"] - row["rejected_score"] if weighting else 0.0 for row in table]
    return [PreferencePair(chosen, rejected, gap) for (chosen, rejected), gap in zip(answers, gaps, strict=True)]


def groups(table: list[dict[str, Any]], answers: list[tuple[Answer, Answer]]) -> list[AnswerGroup]:
    """Return each pair as a group; with scores, all pairs of a prompt form one ranked list of their distinct answers.

    An answer with several scores gets their mean. Raises DataError if a list has only one answer.
    """
    scored = "chosen_score" in table[0]
    return ranked_groups(answers, [(row["chosen_score"], row["rejected_score"]) for row in table] if scored else None)
