"""Load the page's templates, with filters that turn numbers into text."""

from __future__ import annotations

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipelines.report.words import p_value, percent
from posttrain.evaluation.statistics import Interval

_MINUS = re.compile(r"(?<![\w.-])-(?=\d)")
FOLDER = Path(__file__).parent / "templates"


def environment() -> Environment:
    """Return the template environment with autoescape on, so that sampled text is shown and never interpreted."""
    templates = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # pyrefly: ignore[bad-assignment]
    templates.filters |= {
        "percent": percent,
        "p": p_value,
        "share": share,
        "score": score,
        "difference": difference,
        "count": count,
        "bound": bound,
    }
    return templates


def share(interval: Interval) -> tuple[str, str]:
    """Return `48.2 %` and `43.4 to 53.1`, or why there is no interval."""
    if not interval.known:
        return percent(interval.value), interval.method
    return percent(interval.value), f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"


def score(interval: Interval) -> tuple[str, str]:
    """Return `1.24` and `1.10 to 1.38`, or why there is no interval."""
    value, low, high = (f"{x:.2f}".replace("-", "−") for x in (interval.value, interval.low, interval.high))
    return value, f"{low} to {high}" if interval.known else interval.method


def difference(interval: Interval, graded: bool = False) -> tuple[str, str]:
    """Return `+4.1` and `+1.2 to +7.0`, or why there is no interval."""
    value, low, high = (signed(x, graded) for x in (interval.value, interval.low, interval.high))
    return value, f"{low} to {high}" if interval.known else interval.method


def signed(value: float, graded: bool = False) -> str:
    """Return a difference in percentage points, or of graded rewards, with a true minus sign."""
    return (f"{value:+.3f}" if graded else f"{100 * value:+.1f}").replace("-", "−")


def bound(text: str) -> str:
    """Return the text with true minus signs before numbers, and non-breaking spaces in `48 %` and `p < 0.001`."""
    text = _MINUS.sub("−", text)
    return text.replace(" %", "\u00a0%").replace("p = ", "p\u00a0=\u00a0").replace("p < ", "p\u00a0<\u00a0")


def count(value: float | None) -> str:
    """Return `1,234,567`, or a dash if the value was not measured."""
    return "–" if value is None else f"{value:,.0f}"
