"""Write report/comparison.md: the comparison as one table, for a pull request or a document."""

from __future__ import annotations

from pipelines.report.analysis import Comparison, Cost, Summary
from pipelines.report.load import SFT
from pipelines.report.words import findings, p_value, title
from posttrain.evaluation.statistics import Interval

HEADER = (
    "model", "seeds", "{measure}", "difference to SFT", "win rate", "preference accuracy", "KL to SFT, nats", "entropy, nats / token",
    "length, tokens", "optimiser steps", "tokens sampled", "tokens trained",
)  # fmt: skip


def comparison_md(comparison: Comparison) -> str:
    """Return title, findings and the table; costs are the mean over the seeds of one run."""
    costs = {cost.name: cost for cost in comparison.costs}
    rows = [_row(comparison, summary, costs.get(summary.name)) for summary in comparison.summaries]
    measure = comparison.question.measure
    confidence = 100 * comparison.question.resampling.confidence
    lines = [
        f"# {title(comparison)}\n",
        *(f"- {sentence}" for sentence in findings(comparison)),
        f"\n{comparison.prompts} held-out prompts; models are ranked by {measure}; {confidence:.4g} % intervals in brackets;"
        f" p is Holm-corrected over all {len(comparison.pairs)} pairs.\n",
        _line([name.format(measure=measure) for name in HEADER]),
        _line(["---"] * len(HEADER)),
        *map(_line, rows),
    ]
    return "\n".join(lines) + "\n"


def _row(comparison: Comparison, summary: Summary, cost: Cost | None) -> list[str]:
    """Return one row of the table."""
    return [
        summary.name,
        str(len(summary.seeds) or "—"),
        _interval(summary.headline, 3),
        _difference(comparison, summary),
        _interval(summary.win_rate, 3),
        "—" if summary.preference is None else f"{summary.preference:.3f}",
        _interval(summary.kl, 2),
        _interval(summary.entropy, 3),
        _interval(summary.length, 1),
        *(
            ["—"] * 3
            if cost is None
            else [_count(c) for c in (cost.optimiser_steps, cost.tokens_sampled, cost.tokens_trained)]
        ),
    ]


def _difference(comparison: Comparison, summary: Summary) -> str:
    """Return the difference to SFT with interval and p."""
    if not summary.seeds:
        return "—"
    pair = comparison.pair(summary.name, SFT)
    sign = 1 if pair.a == summary.name else -1
    spread = pair.test.difference
    if not spread.known:
        return f"{sign * spread.value:+.3f} [{spread.method}], {p_value(pair.adjusted)}"
    low, high = sorted((sign * spread.low, sign * spread.high))
    return f"{sign * spread.value:+.3f} [{low:+.3f}, {high:+.3f}], {p_value(pair.adjusted)}"


def _interval(interval: Interval | None, digits: int) -> str:
    """Return a value with its interval, or a dash."""
    if interval is None:
        return "—"
    if not interval.known:
        return f"{interval.value:.{digits}f} [{interval.method}]"
    return f"{interval.value:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def _count(value: float | None) -> str:
    """Return a count, or a dash."""
    return "—" if value is None else f"{value:,.0f}"


def _line(cells: list[str] | tuple[str, ...]) -> str:
    """Return one line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"
