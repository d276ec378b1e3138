"""Render the decision as an HTML page: the result, its reasons, and every measured value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from pipelines.labelling.win_rates import WinRate
from pipelines.promotion.decision import Decision
from pipelines.promotion.drift import Drift, ScoreDrift
from pipelines.runtime.markup import html_page, html_table, markdown_text

_STYLE = ".passed{color:#1a7f37}.failed{color:#cf222e;font-weight:600}"


def verdict(decision: Decision) -> str:
    """Return the result in one sentence."""
    if decision.promote:
        return f"{decision.challenger} may replace {decision.reference}"
    return f"{decision.challenger} was refused; {decision.reference} stays"


def page(
    chosen: Decision, decisions: Sequence[Decision], drifts: Sequence[Drift] = (), people: Sequence[WinRate] = ()
) -> str:
    """Return the whole page. `decisions` are all candidates in the order in which the gate checked them."""
    title = "Promote" if chosen.promote else "Refuse"
    reasons = "".join(f"<li>{escape(words)}</li>" for words in chosen.refusals)
    why = f"<p>Because:</p><ul>{reasons}</ul>" if reasons else "<p>Every check was passed.</p>"
    body = (
        f"<h1>{title} <small>{escape(verdict(chosen))}</small></h1>{why}<p>{escape(power(chosen))}</p>"
        + "".join(f"<p>{escape(words)}</p>" for words in chosen.by_age)
        + "".join(_table(decision) for decision in decisions)
        + _people(people)
        + _drift(drifts)
    )
    return html_page(f"Gate: {title}", body, _STYLE)


def power(decision: Decision) -> str:
    """Say how large a gain had to be to be found, and how often an equal model would be promoted."""
    if math.isnan(decision.detectable):
        return "Power: unknown, since no two prompts differ in their gain."
    return (
        f"Power: with these {decision.difference.n} prompts a true gain of {decision.detectable:.3g} is found with a chance of 80 %. A"
        f" candidate that equals {decision.reference} is promoted with a chance of at most {100 * decision.level:.3g} %."
    )


def _table(decision: Decision) -> str:
    """Return one decision as an HTML table."""
    rows = "".join(
        f'<tr><td>{escape(check.name)}<td class="{_passed(check.passed)}">{_passed(check.passed)}'
        f'<td class="n">{check.value:.4g}<td class="n">{check.limit:.4g}<td>{escape(check.words)}</tr>'
        for check in decision.checks
    )
    head = '<tr><th>check<th>verdict<th class="n">measured<th class="n">limit<th>in words</tr>'
    return f"<h2>{escape(decision.challenger)} against {escape(decision.reference)}</h2>{html_table(head, rows)}"


def _people(rates: Sequence[WinRate]) -> str:
    """Return one paragraph for each candidate that people compared with the champion; empty if there is none."""
    said = "".join(f"<p>{escape(rate.words)}</p>" for rate in rates)
    return f"<h2>What people preferred</h2>{said}" if said else ""


def _drift(drifts: Sequence[Drift]) -> str:
    """Return a table of the prompts that arrive, compared with the training prompts; empty if none were compared."""
    if not drifts:
        return ""
    rows = "".join(
        f'<tr><td>{escape(drift.name)}<td class="n">{drift.measured.texts}<td class="n">{drift.measured.length_psi:.3f}'
        f'<td class="n">{drift.measured.chance:.3f}<td class="n">{100 * drift.measured.new_words:.1f} %{_scores(drift.scores)}'
        f"<td>{escape(drift.words)}</tr>"
        for drift in drifts
    )
    numbers = (
        "number",
        "stability index of lengths",
        "by chance up to",
        "new words",
        "stability index of scores",
        "by chance up to",
    )
    head = "<tr><th>prompts" + "".join(f'<th class="n">{name}' for name in numbers) + "<th>in words</tr>"
    words = "They change no verdict. If prompts drift, the held-out prompts may no longer represent what users ask."
    return f"<h2>Prompts that arrive, against the training prompts</h2><p>{words}</p>{html_table(head, rows)}"


def _scores(scores: ScoreDrift | None) -> str:
    """Return two cells: the index of the reward model's scores, and its size by chance."""
    values = ("–", "–") if scores is None else (f"{scores.psi:.3f}", f"{scores.chance:.3f}")
    return "".join(f'<td class="n">{value}' for value in values)


def markdown(decision: dict[str, object], note: str) -> str:
    """Return decision.json as a short Markdown text for Prefect."""
    candidates = decision["candidates"]
    assert isinstance(candidates, list)
    lines = [f"**{markdown_text(note)}**", ""]
    for candidate in candidates:
        title = markdown_text(f"{candidate['name']} against {decision['reference']}")
        lines += [f"### {title}", "", "| check | verdict | in words |"]
        lines.append("| --- | --- | --- |")
        lines += [
            f"| {markdown_text(check['name'])} | {_passed(check['passed'])} | {markdown_text(check['words'])} |"
            for check in candidate["checks"]
        ]
        lines.append("")
    return "\n".join(lines)


def _passed(passed: bool) -> str:
    """Return the word for a check's result."""
    return "passed" if passed else "failed"
