"""Supervised fine-tuning: minimise the mean negative log-likelihood of response tokens (one denominator for the whole step).

    python -m pipelines.sft

Every response token of a batch has the same weight, or its row's `weight` if the table has that column. The last batch of an epoch may
be smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.data.tables import WEIGHT, Row, supervised_rows
from pipelines.runtime.run import Run
from pipelines.runtime.step import main
from pipelines.training.setup import (
    TrainableModel,
    accelerator,
    adapter_facts,
    announce,
    apply_training_options,
    device_name,
    merged_model,
    model_card,
    peak_memory_mib,
    read_table,
    train,
    write_model,
)

if TYPE_CHECKING:
    from posttrain.data.tokens import TextEncoder

START, FOLDER = Path("models/base"), Path("models/sft")


def run(run: Run) -> None:
    """Train on the supervised table and save the model."""
    params = run.context.params.sft
    device = accelerator(run.context, params.compute, params.seed, START)
    from pipelines.training.sample_tables import GreedySamples
    from posttrain.data.batches import EpochOrder
    from posttrain.data.tokens import table_answers
    from posttrain.models.folders import load_encoder, load_policy
    from posttrain.models.policy import Policy
    from posttrain.training.sharding import shards
    from posttrain.training.supervised import Example, RowSource, SupervisedObjective
    from posttrain.training.trainer import Trainer

    run.recorder.ready(device_name(device.device))
    encoder = load_encoder(START)
    table = supervised_rows(read_table("sft"))
    answers = table_answers(encoder, table, "completion", params.train_on)
    rows = [[Example(t, row.get(WEIGHT, 1.0)) for t in own] for own, row in zip(answers, table, strict=True)]
    tokens = [t for own in answers for t in own]
    order = EpochOrder(len(rows), params.batch_size, params.epochs, params.seed)

    def make(deferred: bool = False) -> TrainableModel[Policy]:
        policy = Policy(load_policy(START, deferred))
        return TrainableModel(policy, apply_training_options(policy.lm, params.lora, params.compute))

    made = make(deferred=shards(device))
    trainer: Trainer[Example] = Trainer(
        made.model,
        params.optimizer.settings(),
        total_steps=order.steps,
        micro_batch_tokens=params.compute.micro_batch_tokens,
        accelerator=device,
    )
    weighted = f", weighted by the column {WEIGHT}" if WEIGHT in table[0] else ""
    parted = f", {len(tokens)} answers each after its own prompt" if params.train_on == "each" else ""
    announce(
        run.context, f"{order.steps} optimiser steps over {len(rows)} rows{parted}{weighted}, {params.epochs} epochs"
    )
    last = train(
        run,
        trainer,
        RowSource(rows, order),
        SupervisedObjective("all" if params.train_on == "all" else "completion"),
        order.steps,
        ("loss", "entropy", "grad_norm"),
        params,
        GreedySamples(run.recorder, made.model, encoder, tokens, params.samples_every, params.samples_shown),
    )
    about: dict[str, Any] = {
        "epochs": params.epochs,
        "batch size": params.batch_size,
        "learning rate": params.optimizer.learning_rate,
    }
    made = merged_model(trainer, made, make)
    about |= adapter_facts(params.lora, made.adapter)
    card = model_card(run.context, "Supervised fine-tuned model", START.as_posix(), about, last)
    _drop_untrained_template(encoder, table)
    write_model(run.outputs, made.model.lm, encoder, FOLDER, card, made.adapter)
    run.recorder.timings(order.steps, {"memory/peak_mib": peak_memory_mib()})
    run.recorder.summary({"loss": last["loss"], "steps": order.steps, "tokens/trained": last["tokens/trained"]})


def _drop_untrained_template(encoder: TextEncoder, table: Sequence[Row]) -> None:
    """Remove the built-in model's chat template if no row is a conversation: tools would then talk to it in a form it never saw."""
    from posttrain.models.tiny import CHAT_TEMPLATE

    chat = any(isinstance(row.get("prompt", row.get("messages")), list) for row in table)
    if not chat and encoder.tokenizer.chat_template == CHAT_TEMPLATE:
        encoder.tokenizer.chat_template = None


if __name__ == "__main__":
    main(run, "sft", params=("sft",), inputs=("data/valid/sft.parquet", "models/base"), trains=True)
