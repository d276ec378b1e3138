"""Train the reward model: Bradley-Terry on preference pairs, with centred scores and accuracy on held-out prompts.

    python -m pipelines.reward

Starts from the supervised model. The mean score of the training pairs is stored in config.json as `reward_mean`; users of the score
subtract it. With `reward.source`, an existing reward model is measured and saved instead of a trained one.
"""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.config.params import load_params
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
from posttrain.errors import DataError
from posttrain.evaluation.calibration import calibration_curve, calibration_error, rank_correlation

if TYPE_CHECKING:
    from posttrain.data.tokens import TextEncoder
    from posttrain.models.policy import Scorer
    from posttrain.training.supervised import RewardPair

START, FOLDER = Path("models/sft"), Path("models/reward")


def run(run: Run) -> None:
    """Train, measure and save the reward model; with reward.enabled: false only a note that there is none."""
    params = run.context.params.reward
    if not params.enabled:
        without_model(run)
        return
    if params.source is not None:
        existing_model(run, params.source)
        return
    device = accelerator(run.context, params.compute, params.seed, START)
    from posttrain.data.batches import EpochOrder
    from posttrain.models.folders import load_encoder
    from posttrain.models.inference import scores
    from posttrain.models.policy import Scorer
    from posttrain.models.scorers import PENALTY, scoring_pad, start_scorer
    from posttrain.training.sharding import shards
    from posttrain.training.supervised import EpochSource, RewardObjective, heads_bootstrapped, prompts_balanced
    from posttrain.training.trainer import Trainer

    run.recorder.ready(device_name(device.device))
    encoder = load_encoder(START)
    pairs, cut = reward_pairs(encoder, read_table("preferences"), params.margin_from_scores, params.soft_target_scale)
    if params.balance_prompts:
        pairs = prompts_balanced(pairs)
    if params.heads > 1:
        pairs = heads_bootstrapped(pairs, params.heads, params.seed)
    heldout_rows = read_table("preferences_heldout")
    heldout, heldout_cut = reward_pairs(encoder, heldout_rows)
    order = EpochOrder(len(pairs), params.batch_size, params.epochs, params.seed)

    def make(deferred: bool = False) -> TrainableModel[Scorer]:
        scorer = Scorer(start_scorer(START, params.heads, deferred))
        scorer.penalty = params.disagreement
        return TrainableModel(scorer, apply_training_options(scorer.model, params.lora, params.compute))

    made = make(deferred=shards(device))
    trainer: Trainer[RewardPair] = Trainer(
        made.model,
        params.optimizer.settings(),
        total_steps=order.steps,
        micro_batch_tokens=params.compute.micro_batch_tokens,
        accelerator=device,
    )
    announce(
        run.context,
        f"{order.steps} optimiser steps over {len(pairs)} pairs, {params.epochs} epochs; {len(heldout)} pairs held out"
        + _cut(encoder, cut, heldout_cut),
    )
    last = train(
        run,
        trainer,
        EpochSource(pairs, order),
        RewardObjective(params.center_coefficient),
        order.steps,
        ("loss", "preference/accuracy", "preference/margin"),
        params,
    )
    trained, made = made, merged_model(trainer, made, make)
    # split weights score with all processes, before only one of them saves
    scorer = (trained if trainer.sharded else made).model.eval()
    budget, bf16 = params.compute.micro_batch_tokens, params.compute.bf16
    trained_scores = scores(scorer, [t for pair in pairs for t in (pair.chosen, pair.rejected)], budget, bf16)
    mean = sum(trained_scores) / len(trained_scores)
    results = _measured(run, scorer, heldout, heldout_rows, order.steps)
    about = {"epochs": params.epochs, "batch size": params.batch_size, "learning rate": params.optimizer.learning_rate}
    card = model_card(
        run.context, "Reward model", START.as_posix(), about | adapter_facts(params.lora, made.adapter), last | results
    )
    encoder.tokenizer.pad_token = scoring_pad(encoder.tokenizer)
    made.model.model.config.get_text_config().pad_token_id = encoder.tokenizer.pad_token_id
    extra = {"reward_mean": mean, "pad_token_id": encoder.tokenizer.pad_token_id}
    if params.heads > 1:
        extra[PENALTY] = params.disagreement
    write_model(run.outputs, made.model.model, encoder, FOLDER, card, made.adapter, extra)
    run.recorder.timings(order.steps, {"memory/peak_mib": peak_memory_mib()})
    counts = {
        "pairs/cut": cut,
        "heldout/cut": heldout_cut,
        "steps": order.steps,
        "tokens/trained": last["tokens/trained"],
    }
    run.recorder.summary(results | {"reward_mean": mean} | counts)


def without_model(run: Run) -> None:
    """Write the outputs of a stage that trains nothing: DVC expects them, and the report reads that there were no steps."""
    run.recorder.ready()
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "README.md").write_text(
        "There is no reward model: reward.enabled is false in params.yaml.\n", encoding="utf-8"
    )
    announce(run.context, "no reward model is trained, because reward.enabled is false")
    run.recorder.metrics(0, {"loss": math.nan})
    run.recorder.summary({"steps": 0, "tokens/trained": 0})


def existing_model(run: Run, source: str) -> None:
    """Check, measure and save a finished reward model.

    One that this stage has trained, for the same tokens, reads the policy's tokens. Any other reads texts through its own tokenizer.
    """
    params = run.context.params.reward
    device = accelerator(run.context, params.compute, params.seed, START)
    from posttrain.data.whole_texts import READS_TEXT, reads_same_tokens
    from posttrain.models.folders import load_encoder
    from posttrain.models.inference import scores
    from posttrain.models.policy import Scorer
    from posttrain.models.scorers import load_scorer, scoring_pad

    run.recorder.ready(device_name(device.device))
    encoder = load_encoder(source)
    scorer = Scorer(load_scorer(source)).to(device.device).eval()
    same = hasattr(scorer.model.config, "reward_mean") and reads_same_tokens(encoder, load_encoder(START))
    heldout_rows = read_table("preferences_heldout")
    text_config = scorer.model.config.get_text_config()
    read = reward_pairs if same else partial(text_pairs, pad=text_config.pad_token_id)
    (pairs, cut), (heldout, heldout_cut) = (read(encoder, rows) for rows in (read_table("preferences"), heldout_rows))
    budget, bf16 = params.compute.micro_batch_tokens, params.compute.bf16
    trained = scores(scorer, [t for pair in pairs for t in (pair.chosen, pair.rejected)], budget, bf16)
    mean = sum(trained) / len(trained)
    results = _measured(run, scorer, heldout, heldout_rows, 0)
    ranked = f"{results['heldout/accuracy']:.1%} of {len(heldout)} held-out pairs"
    reads = "" if same else "; it reads the texts of prompt and answer through its own tokenizer"
    cuts = _cut(encoder, cut, heldout_cut)
    announce(run.context, f"{source} is used as it is; it prefers the chosen answer in {ranked}{reads}{cuts}")
    card = model_card(run.context, "Reward model", source, {"source": Path(source).name}, results)
    extra = {"reward_mean": mean, READS_TEXT: not same}
    if same or text_config.pad_token_id is None:
        encoder.tokenizer.pad_token = scoring_pad(encoder.tokenizer)
        text_config.pad_token_id = encoder.tokenizer.pad_token_id
    else:  # its scores were trained at the last token that is not this one
        encoder.tokenizer.pad_token = encoder.tokenizer.convert_ids_to_tokens(text_config.pad_token_id)
    extra["pad_token_id"] = text_config.pad_token_id
    write_model(run.outputs, scorer.model, encoder, FOLDER, card, None, extra)
    run.recorder.metrics(0, {"loss": math.nan})
    counts = {"pairs/cut": cut, "heldout/cut": heldout_cut, "steps": 0, "tokens/trained": 0}
    run.recorder.summary(results | {"reward_mean": mean} | counts)


def _cut(encoder: TextEncoder, pairs: int, heldout: int) -> str:
    """Return the end of a line on the pairs that lost the start of their prompt; empty if none did."""
    if not pairs + heldout:
        return ""
    return f"; the prompts of {pairs} pairs and {heldout} held-out ones lost their start to fit the context of {encoder.max_length} tokens"


def text_pairs(encoder: TextEncoder, rows: list[dict[str, Any]], pad: int | None) -> tuple[list[RewardPair], int]:
    """Return the pairs as texts in the tokens of a reward model that was trained elsewhere, and how many were cut."""
    from posttrain.data.whole_texts import read_texts
    from posttrain.training.supervised import RewardPair

    prompts, tools = [row["prompt"] for row in rows], {"tools": [row.get("tools") for row in rows]}
    sides = [read_texts(encoder, prompts, [row[side] for row in rows], tools, pad) for side in ("chosen", "rejected")]
    (chosen, cut), (rejected, more) = sides
    pairs = [RewardPair(one, other, 0.0, 1.0) for one, other in zip(chosen, rejected, strict=True)]
    return pairs, max(cut, more)


def _measured(
    run: Run, scorer: Scorer, heldout: list[RewardPair], rows: list[dict[str, Any]], step: int
) -> dict[str, float]:
    """Record the calibration on held-out pairs and return the results."""
    compute = run.context.params.reward.compute
    gaps, spreads = score_gaps(scorer, heldout, compute.micro_batch_tokens, compute.bf16)
    run.recorder.table("calibration", step, [asdict(b) for b in calibration_curve(gaps)])
    graded = [row["chosen_score"] - row["rejected_score"] for row in rows if "chosen_score" in row]
    disagreement = {"heldout/disagreement": sum(spreads) / len(spreads)} if scorer.heads > 1 else {}
    return heldout_results(gaps, graded) | disagreement


def inputs(args: Namespace) -> list[str]:
    """Return the tables, the supervised model, and a local folder of an existing reward model."""
    source = load_params(args.params).reward.source
    own = [source] if source is not None and Path(source).is_dir() else []
    return ["data/valid/preferences.parquet", "data/valid/preferences_heldout.parquet", "models/sft", *own]


def reward_pairs(
    encoder: TextEncoder,
    rows: list[dict[str, Any]],
    margin_from_scores: bool = False,
    soft_target_scale: float | None = None,
) -> tuple[list[RewardPair], int]:
    """Pairs cut to the context, and how many were: over-long ones lose the start of the prompt, never the end of a response."""
    from posttrain.data.tokens import row_tools
    from posttrain.training.supervised import RewardPair

    graded = margin_from_scores or soft_target_scale is not None
    if graded and "chosen_score" not in rows[0]:
        option, off = ("margin_from_scores", "false") if margin_from_scores else ("soft_target_scale", "null")
        raise DataError(
            f"reward.{option} needs the columns chosen_score and rejected_score, but the preferences table has none;"
            f" add them in data.preferences.columns, or set {option}: {off}"
        )
    pairs, cut = [], 0
    for row in rows:
        answers = [
            encoder.tokens(row["prompt"], row[side], str(row["id"]), row_tools(row)) for side in ("chosen", "rejected")
        ]
        room = encoder.max_length - max(len(answer.response) for answer in answers)
        if room < 1:
            raise DataError(
                f"preference row {row.get('id')}: a response of {encoder.max_length - room} tokens leaves no space for its prompt in the"
                f" model's context of {encoder.max_length}; lower validation.max_completion_tokens"
            )
        cut += any(len(answer.prompt) > room for answer in answers)
        chosen, rejected = (replace(answer, prompt=answer.prompt[-room:]) for answer in answers)
        gap = row["chosen_score"] - row["rejected_score"] if graded else 0.0
        target = 1.0 if soft_target_scale is None else _sigmoid(soft_target_scale * gap)
        pairs.append(RewardPair(chosen, rejected, gap if margin_from_scores else 0.0, target))
    return pairs, cut


def _sigmoid(x: float) -> float:
    # tanh does not overflow, whatever the scale of the scores is.
    """Return 1 / (1 + exp(-x)) without overflow."""
    return 0.5 + 0.5 * math.tanh(x / 2)


def score_gaps(scorer: Scorer, pairs: list[RewardPair], budget: int, bf16: bool) -> tuple[list[float], list[float]]:
    """Return score of chosen minus score of rejected for every pair, and the disagreement of an ensemble's heads on every answer."""
    from posttrain.models.inference import scores_and_spreads

    chosen = scores_and_spreads(scorer, [pair.chosen for pair in pairs], budget, bf16)
    rejected = scores_and_spreads(scorer, [pair.rejected for pair in pairs], budget, bf16)
    gaps = [c - r for (c, _), (r, _) in zip(chosen, rejected, strict=True)]
    return gaps, [spread for _, spread in chosen + rejected]


def heldout_results(gaps: list[float], graded: list[float]) -> dict[str, float]:
    """Return accuracy (ties count half), Bradley-Terry loss and calibration on pairs with unseen prompts.

    With `graded`, the pairs' differences of scores, also the rank correlation of both differences; not if they are all equal.
    """
    right = sum(1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in gaps)
    loss = sum(math.log1p(math.exp(-abs(gap))) + max(-gap, 0.0) for gap in gaps)
    results = {
        "heldout/accuracy": right / len(gaps),
        "heldout/loss": loss / len(gaps),
        "heldout/pairs": float(len(gaps)),
        "heldout/calibration_error": calibration_error(calibration_curve(gaps)),
    }
    correlation = rank_correlation(gaps, graded) if graded else math.nan
    return results if math.isnan(correlation) else results | {"heldout/score_correlation": correlation}


if __name__ == "__main__":
    main(run, "reward", params=("reward",), inputs=inputs, trains=True)
