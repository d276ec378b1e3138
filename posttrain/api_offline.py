"""Train on rows that exist before training: imitation, preference pairs, and single answers with labels.

Example:
    With `each`, a conversation of two answers is two sequences of one row, and a batch has both. Untrained, the loss is near
    log(259) = 5.6, that of any of 259 tokens:

    >>> from posttrain.api_training import train
    >>> from posttrain.api import tiny
    >>> model = tiny(seed=0, hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1)
    >>> turns = [("user", "1+1="), ("assistant", "2"), ("user", "+1"), ("assistant", "3")]
    >>> row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    >>> (step,) = train(model, "sft", [row], steps=1, learning_rate=0.01, batch_size=1, train_on="each")
    >>> round(step["loss"], 1)
    5.6
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.algorithms import LoggedGroups, Preference, Unpaired
from posttrain.api_rows import WEIGHT, refuse_ties
from posttrain.api_run import Run
from posttrain.api_tokens import answer_tokens, answers_of
from posttrain.data.batches import EpochOrder
from posttrain.data.tokens import Tokens
from posttrain.errors import ConfigError, DataError
from posttrain.models.inference import token_logprobs
from posttrain.models.policy import Policy
from posttrain.training.preference import (
    Answer,
    LoggedGroupsObjective,
    PreferenceObjective,
    PreferencePair,
    ranked_groups,
)
from posttrain.training.supervised import Example, RowSource, SupervisedObjective
from posttrain.training.unpaired import LabelledAnswer, UnpairedObjective, UnpairedSource, mismatched

Table = Sequence[Mapping[str, Any]]


def supervised(run: Run, table: list[dict[str, Any]]) -> None:
    """Imitate the completions of the rows."""
    run.identity["rows"] = table
    answers = answers_of(run.model.encoder, table, "completion", run.train_on)
    examples = [[Example(t, float(row.get(WEIGHT, 1.0))) for t in own] for own, row in zip(answers, table, strict=True)]
    source = RowSource(examples, run.epochs(examples).order)
    objective = SupervisedObjective("all" if run.train_on == "all" else "completion")
    run.fit(run.trainer(Policy(run.model.lm), run.steps), source, objective, "loss")


def unpaired(run: Run, spec: Unpaired, table: Table) -> None:
    """Learn from single answers with labels."""
    _check_epochs(spec)
    run.identity["rows"] = [*map(dict, table)]
    policy = Policy(run.model.lm)
    trainer = run.trainer(policy, run.steps)
    tokens = answer_tokens(run.model.encoder, [dict(row) for row in table], "completion")
    others = mismatched(tokens, run.model.encoder.max_length)
    answers, partners = (_measured(run, spec, policy, side) for side in (tokens, others))
    labels = [bool(row["label"]) for row in table]
    rows = [LabelledAnswer(*row) for row in zip(answers, labels, partners, strict=True)]
    order = EpochOrder(len(rows), run.batch_size, 1, run.seed)
    source = UnpairedSource(rows, order, policy, trainer.accelerator, run.micro_batch_tokens)
    run.fit(trainer, source, UnpairedObjective(spec), "loss")


def _check_epochs(spec: Preference | LoggedGroups | Unpaired) -> None:
    if spec.epochs != 1:
        raise ConfigError(f"{spec.name}.epochs = {spec.epochs} has no effect here; `steps` is the length of training")


def preferences(run: Run, spec: Preference | LoggedGroups, table: Table) -> None:
    """Learn from pairs of answers."""
    _check_epochs(spec)
    policy = Policy(run.model.lm)
    trainer = run.trainer(policy, run.steps)
    run.identity["rows"] = rows = [dict(row) for row in table]
    if isinstance(spec, LoggedGroups) or (spec.score_weighting == "weight" and not spec.nll_coefficient):
        refuse_ties(rows, spec.name)
    chosen, rejected = (
        _measured(run, spec, policy, answer_tokens(run.model.encoder, rows, column))
        for column in ("chosen", "rejected")
    )
    for i, pair in enumerate(zip(chosen, rejected, strict=True)):
        if pair[0].tokens == pair[1].tokens:
            raise DataError(
                f"rows, row {i}: chosen and rejected have the same tokens, so there is nothing to learn from it; remove the row"
            )
    scored = "chosen_score" in rows[0]
    scores = [(float(row["chosen_score"]), float(row["rejected_score"])) for row in rows] if scored else None
    if isinstance(spec, Preference):
        gaps = [0.0] * len(rows) if scores is None else [high - low for high, low in scores]
        pairs = [PreferencePair(*pair) for pair in zip(chosen, rejected, gaps, strict=True)]
        run.fit(trainer, run.epochs(pairs), PreferenceObjective(spec), "preference/accuracy")
    else:
        groups = ranked_groups([*zip(chosen, rejected, strict=True)], scores)
        run.fit(trainer, run.epochs(groups), LoggedGroupsObjective(spec), "preference/accuracy")


def _measured(
    run: Run, spec: Preference | LoggedGroups | Unpaired, policy: Policy, tokens: Sequence[Tokens]
) -> list[Answer]:
    """Return the answers with the log-probabilities of the policy before training, which is the reference."""
    measured = token_logprobs(policy.eval(), tokens, run.micro_batch_tokens)
    return [
        Answer(t, m.logprobs if spec.needs_reference else 0 * m.logprobs) for t, m in zip(tokens, measured, strict=True)
    ]
