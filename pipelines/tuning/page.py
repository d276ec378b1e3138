"""Write the result of tuning: a table of trials, the winner's curse, and the sections to put into params.yaml."""

from __future__ import annotations

import io
from collections.abc import Sequence
from math import isnan
from typing import Any

from ruamel.yaml import YAML

from pipelines.config.params import Params
from pipelines.tuning.choose import Reported


def page(params: Params, found: Sequence[Reported], selection: int, prompts: int) -> str:
    """Return the result as Markdown. `selection` of the evaluation `prompts` chose."""
    tune, seeds = params.tune, params.project.seeds
    lines = [
        "# Tuning",
        "",
        f"{tune.trials} trials of each algorithm ({tune.method}, seed {tune.seed}), trained with seed {tune.training_seed}. The first trial"
        f" is the section as given. {selection} of {prompts} evaluation prompts chose; the other columns are on the other"
        f" {prompts - selection}. New seeds: {', '.join(map(str, seeds))}.",
        "",
        "| algorithm | chosen | score that won | same run, other prompts | new seeds, other prompts | winner's curse |",
        "|---|---|---|---|---|---|",
        *(_row(one) for one in found),
        "",
        "The score that won is the best of several, so it is too high. Compare algorithms by the column of new seeds only.",
        "",
        "| algorithm | scores of the trials, in order |",
        "|---|---|",
        *(
            f"| {one.choice.best.algorithm} | {' · '.join(f'{score:.3f}' for score in one.choice.scores)} |"
            for one in found
        ),
    ]
    return "\n".join(lines) + "\n"


def _row(one: Reported) -> str:
    choice, fresh = one.choice, one.fresh
    values = ", ".join(f"`{path}` {value}" for path, value in sorted(choice.best.values.items()))
    limits = fresh.method if isnan(fresh.low) else f"{fresh.low:.3f}, {fresh.high:.3f}"
    interval = f"{fresh.value:.3f} [{limits}]"
    return (
        f"| {choice.best.algorithm} | {values or 'as given'} | {max(choice.scores):.3f} | {choice.elsewhere:.3f} | {interval} |"
        f" {one.curse:+.3f} |"
    )


def sections(params: Params, found: Sequence[Reported]) -> str:
    """Return the chosen sections of `algorithms` as YAML, each with a note on how its values were found."""
    tune = params.tune
    note = f"best of {tune.trials} trials ({tune.method}), chosen on {tune.selection:g} of the prompts"
    tree: dict[str, Any] = {one.choice.best.algorithm: {**one.choice.best.section, "tuned": note} for one in found}
    yaml, text = YAML(typ="safe", pure=True), io.StringIO()
    yaml.default_flow_style = False
    yaml.dump({"algorithms": tree}, text)
    return text.getvalue()
