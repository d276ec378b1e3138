"""Keep the numbers comparable while the evaluation grows: the gain on the prompts by which the champion was judged, and on those since."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipelines.promotion.decision import Prompt, SampledAnswers, paired_differences
from posttrain.evaluation.crossed import Crossed, crossed_mean
from posttrain.evaluation.statistics import Floats, Interval, Resampling, bootstrap

EARLIER, SINCE = (
    "On the {} prompts by which the champion was judged",
    "On the {} prompts that joined the evaluation since",
)


def mark(prompts: Sequence[Prompt]) -> str:
    """Return the number of rows of an evaluation with a digest of its prompts and gold answers, e.g. `400:0a1b2c3d4e5f`.

    Ids count the rows in the order in which they joined.
    """
    digest = hashlib.sha256(json.dumps(sorted(prompts)).encode()).hexdigest()
    return f"{1 + max(prompt[0] for prompt in prompts)}:{digest[:12]}"


def by_age(
    challenger: SampledAnswers, reference: SampledAnswers, earlier: str, resampling: Resampling
) -> tuple[str, ...]:
    """Return a sentence about the prompts of the evaluation with the mark `earlier`, and one about those that joined it since.

    Returns none if no prompt has joined, or if the evaluation does not begin with those prompts.
    """
    rows = int(earlier.partition(":")[0])
    first = [prompt for prompt in challenger.prompts if prompt[0] < rows]
    if not first or len(first) == len(challenger.prompts) or mark(first) != earlier:
        return ()
    differences = paired_differences(challenger.reward, reference.reward)
    old = np.array([prompt[0] < rows for prompt in challenger.prompts])
    groups = None if challenger.groups is None else np.asarray(challenger.groups)
    return tuple(
        _sentence(place, differences[part], None if groups is None else groups[part], resampling)
        for place, part in ((EARLIER, old), (SINCE, ~old))
    )


def _sentence(place: str, differences: Floats, groups: Any, resampling: Resampling) -> str:
    """Return the gain on some prompts, with an interval if there are several prompts or, if they come in groups, several groups."""
    value, interval = float(differences.mean()), ""
    if len(differences if groups is None else {*groups}) > 1:
        found: Interval | Crossed = bootstrap(differences, resampling)
        if groups is not None:
            found = crossed_mean(differences[:, None], resampling.confidence, groups)
        interval = f" ({found.method})"
        if found.low < found.high:
            interval = f" ({100 * resampling.confidence:.4g} % interval {found.low:+.4g} to {found.high:+.4g})"
    return f"{place.format(len(differences))}: true reward {value:+.4g}{interval}."
