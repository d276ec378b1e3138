"""Run the preference branch of the align step: the DPO family, and GRPO over logged groups."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.config.schema import AlignParams, PreferenceBudget
from pipelines.runtime.context import RunContext
from pipelines.runtime.identity import content_digest
from pipelines.runtime.run import Run
from pipelines.training.sample_tables import GreedySamples
from pipelines.training.setup import (
    TrainableModel,
    adapter_facts,
    announce,
    apply_training_options,
    merged_model,
    model_card,
    read_table,
    train,
    write_model,
)
from posttrain.algorithms import LoggedGroups, Preference
from posttrain.data.batches import EpochOrder
from posttrain.data.tokens import TextEncoder, table_tokens
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
    bounded_advantages,
)
from posttrain.training.supervised import EpochSource
from posttrain.training.trainer import Trainer

if TYPE_CHECKING:
    from accelerate import Accelerator

START = "models/sft"


def align(run: Run, name: str, seed: int, device: Accelerator, folder: Path) -> tuple[int, dict[str, float]]:
    """Train on logged pairs; return the number of steps and the last step's metrics."""
    context = run.context
    spec, budget, compute = context.params.algorithm(name), context.params.budget(name), context.params.align.compute
    assert isinstance(spec, Preference | LoggedGroups)
    assert isinstance(budget, PreferenceBudget)
    encoder, made = load_encoder(START), _make(context.params.align)
    policy = made.model.to(device.device)
    table = read_table("preferences")
    cache = reference_cache(context, device) if spec.needs_reference else None
    answers = reference_answers(policy, encoder, table, compute.micro_batch_tokens, compute.bf16, cache)
    rows: list[Any] = groups(table, answers) if isinstance(spec, LoggedGroups) else pairs(table, answers, spec)
    objective: Any = LoggedGroupsObjective(spec) if isinstance(spec, LoggedGroups) else PreferenceObjective(spec)
    order = EpochOrder(len(rows), budget.batch_size, spec.epochs, seed)
    settings = budget.optimizer.settings()
    trainer: Trainer[Any] = Trainer(
        policy, settings, total_steps=order.steps, micro_batch_tokens=compute.micro_batch_tokens, accelerator=device
    )
    announce(context, f"{order.steps} optimiser steps over {len(rows)} pairs or groups, {spec.epochs} epochs")
    shown = ("loss", "preference/accuracy", "preference/margin")
    preferred = [chosen.tokens for chosen, _ in answers]
    hook = GreedySamples(
        run.recorder, policy, encoder, preferred, context.params.align.samples_every, context.params.align.samples_shown
    )
    last = train(run, trainer, EpochSource(rows, order), objective, order.steps, shown, context.params.align, hook)
    about = {
        "algorithm": f"{spec.name} (arXiv {spec.paper})",
        "seed": seed,
        "learning rate": settings.learning_rate,
    } | adapter_facts(context.params.align.lora)
    made = merged_model(trainer, made, lambda: _make(context.params.align))
    card = model_card(context, f"Aligned with {name}", START, about, last)
    write_model(run.outputs, made.model.lm, encoder, folder, card, made.adapter)
    return order.steps, last


def _make(params: AlignParams) -> TrainableModel[Policy]:
    """Build the supervised model with its training options. A new adapter changes nothing yet, so the model is its own reference."""
    policy = Policy(load_policy(START))
    return TrainableModel(policy, apply_training_options(policy.lm, params.lora, params.compute))


def reference_cache(context: RunContext, device: Accelerator) -> ReferenceCache:
    """Return the checkout's cache of reference log-probabilities.

    All algorithms and seeds with the same start model, code and settings share it.
    """
    compute = json.dumps(context.params.align.compute.model_dump(), sort_keys=True)
    key = " ".join([content_digest(Path(START)), context.code, compute, device.device.type])
    return ReferenceCache(context.state.parent.parent / "reference", key, device)


def reference_answers(
    policy: Policy,
    encoder: TextEncoder,
    table: list[dict[str, Any]],
    budget: int,
    bf16: bool,
    cache: ReferenceCache | None,
) -> list[tuple[Answer, Answer]]:
    """Return (chosen, rejected) of every row with the reference's log-probabilities; zeros without a reference."""
    chosen = table_tokens(encoder, table, "chosen")
    rejected = table_tokens(encoder, table, "rejected")
    tokens = chosen + rejected
    if cache is not None:
        reference = cache.logprobs(policy, tokens, budget, bf16)
    else:
        reference = [np.zeros(len(t.response), dtype=np.float32) for t in tokens]
    answers = [Answer(t, r) for t, r in zip(tokens, reference, strict=True)]
    return list(zip(answers[: len(table)], answers[len(table) :], strict=True))


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
    if "chosen_score" not in table[0]:
        return [AnswerGroup(pair, (0.5, -0.5)) for pair in answers]
    keyed = sorted(range(len(table)), key=lambda i: (answers[i][0].tokens.prompt, i))
    ranked = []
    for _, members in groupby(keyed, key=lambda i: answers[i][0].tokens.prompt):
        distinct: dict[tuple[int, ...], Answer] = {}
        scores: dict[tuple[int, ...], list[float]] = {}
        for i in members:
            for answer, column in zip(answers[i], ("chosen_score", "rejected_score"), strict=True):
                response = answer.tokens.response
                distinct.setdefault(response, answer)
                scores.setdefault(response, []).append(table[i][column])
        if len(distinct) < 2:
            raise DataError(
                f"preference row {answer.tokens.id}: all answers to its prompt are the same, and a group of one has no baseline;"
                " remove the row, or set validation.rules.identical_pair: quarantine"
            )
        ranked.append(AnswerGroup(tuple(distinct.values()), tuple(sum(s) / len(s) for s in scores.values())))
    return bounded_advantages(ranked)
