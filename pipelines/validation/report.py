"""Render the validation report: one HTML page without scripts, clock or network. All text from the data is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pipelines.runtime.markup import html_page, html_table
from pipelines.validation.check import ValidationOutcome, Verdict
from pipelines.validation.masks import Part
from pipelines.validation.messages import by_rule, examples

Sample = tuple[str, Sequence[Part]]
"""A row's label and the parts of its text."""
_STYLE = ".passed{color:#1a7f37}.failed{color:#9a6700}.stop,.errored{color:#cf222e;font-weight:600}"


def page(
    outcome: ValidationOutcome,
    shown: int,
    changes: Mapping[str, Mapping[str, int]] | None = None,
    samples: Sequence[Sample] = (),
) -> str:
    """Return the whole page. changes: what ingest and the chat template left out, by table; samples: rows with their trained tokens."""
    verdict = "Refused" if outcome.stops else "Accepted"
    parts = _tables(outcome) + _changes(changes or {}) + _rules(outcome, shown) + _samples(samples)
    return html_page(f"Validation: {verdict}", f"<h1>Validation: {verdict}</h1>{parts}", _STYLE)


def _changes(changes: Mapping[str, Mapping[str, int]]) -> str:
    rows = [_cells([table, name, count]) for table, counts in changes.items() for name, count in counts.items()]
    if not rows:
        return ""
    head = '<tr><th>table<th>change<th class="n">count</tr>'
    return f"<h2>Left out or changed</h2>{html_table(head, ''.join(rows))}"


def _samples(samples: Sequence[Sample]) -> str:
    if not samples:
        return ""
    texts = "".join(
        f"<p>{escape(label)}<br><code>{''.join(_part(text, trained) for text, _, trained in parts)}</code></p>"
        for label, parts in samples
    )
    return f"<h2>Trained tokens</h2><p>Only <mark>marked</mark> text carries loss.</p>{texts}"


def _part(text: str, trained: bool) -> str:
    shown = escape(text).replace("\n", "\u23ce<br>")
    return f"<mark>{shown}</mark>" if trained else shown


def _tables(outcome: ValidationOutcome) -> str:
    rows = [
        _cells([table, len(kept) + len(outcome.quarantined[table]), len(kept), len(outcome.quarantined[table])])
        for table, kept in sorted(outcome.kept.items())
    ]
    head = '<tr><th>table<th class="n">rows read<th class="n">valid<th class="n">quarantined</tr>'
    return f"<h2>Tables</h2>{html_table(head, ''.join(rows))}"


def _rules(outcome: ValidationOutcome, shown: int) -> str:
    """Return the table of rules."""
    rows = [_rule(*name, verdicts, shown) for name, verdicts in by_rule(outcome.verdicts).items()]
    head = '<tr><th>table<th>rule<th>if broken<th>status<th class="n">rows that break it<th>details and first rows</tr>'
    return f"<h2>Rules</h2>{html_table(head, ''.join(rows))}"


def _rule(table: str, rule: str, verdicts: list[Verdict], shown: int) -> str:
    """Return one row of the table of rules."""
    states = {verdict.finding.status for verdict in verdicts}
    status = next(s for s in ("errored", "failed", "passed") if s in states)
    css = "stop" if any(verdict.stops for verdict in verdicts) else status
    count = len({row["id"] for verdict in verdicts for row in verdict.rows})
    lines = [line for verdict in verdicts for line in [*_details(verdict), *examples(verdict, shown)]]
    first = "<br>".join(f"<code>{escape(line)}</code>" for line in lines)
    cells = _cells([table, rule, verdicts[0].policy], close=False)
    return f'{cells}<td class="{css}">{status}<td class="n">{count}<td>{first}</tr>'


def _details(verdict: Verdict) -> list[str]:
    """Return the finding's detail if it is of interest."""
    relevant = verdict.finding.status == "errored" or verdict.finding.rule in ("row_count", "unknown_tokens")
    return [verdict.finding.detail] if relevant and verdict.finding.detail else []


def _cells(values: list[Any], close: bool = True) -> str:
    """Return cells of a table row."""
    cells = "".join(f'<td class="n">{v}' if isinstance(v, int) else f"<td>{escape(str(v))}" for v in values)
    return f"<tr>{cells}" + ("</tr>" if close else "")
