"""Write docs/claims.md: every study with its question, verdict, intervals and arms."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.studies.results import Decided, Entry, Result
from pipelines.studies.study import Study
from pipelines.studies.verdict import POWER

HEAD = """# Claims of the field, each an experiment

Written by `posttrain study --write` from `examples/studies/*.yaml` and the results next to them; do not edit it.

A study has one question, one factor, arms and training seeds. Its claims were written before its runs. A claim states that a contrast of
arms is more than a number. The rule:

| verdict | the interval of the contrast |
|---|---|
| supported | lies above the number |
| contradicted | lies below it: the effect is smaller than claimed, or reversed |
| undecided | contains it, or all values are equal, so that there is none |

Intervals are over seeds and prompts (`posttrain/evaluation/crossed.py`), or over seeds if the outcome is one number per run. Their level is
1 - 5 % / (looks x claims of the study), and looks is 1 unless the study says otherwise. A study is supported if all of its claims are, and
contradicted if one is. All verdicts are about a tiny model on additions of two numbers: they show what this implementation does at this
size.

A study that is repeated on new seeds, or with another design, shows its earlier series. Its file and the number of new seeds are committed
before the new runs, and only these decide. From `looks: 2` on, all series of the study share the 5 %.
`dynamic_sampling` and `label_noise` were repeated before this rule existed, at the full level.
"""


def page(studies: Sequence[Entry]) -> str:
    """Return the page as Markdown."""
    lines = [HEAD, "| study | question | source | verdict |", "|---|---|---|---|"]
    for name, study, result, earlier in studies:
        source = f"[{study.source}](https://arxiv.org/abs/{study.source})"
        lines.append(f"| [{name}](#{name}) | {study.question} | {source} | {short(study, result, earlier)} |")
    for entry in studies:
        lines += ["", *section(*entry)]
    return "\n".join(lines) + "\n"


def short(study: Study, result: Result | None, earlier: Sequence[Result] = ()) -> str:
    """Return the verdict in a few words."""
    if result is None:
        return f"{earlier[-1].verdict} (a new series is planned)" if earlier else "not run"
    return result.verdict if result.digest == study.digest else f"{result.verdict} (the study has changed since)"


def section(name: str, study: Study, result: Result | None, earlier: Sequence[Result] = ()) -> list[str]:
    """Return the lines of one study."""
    lines = [f"## {name}", "", f"{study.question} Factor: {study.factor}."]
    if study.remark:
        lines += ["", study.remark]
    if result is None:
        planned = "This series has not run yet" if earlier else "Not run yet"
        return [*lines, "", f"{planned}: `make study NAME={name}`.", *series(earlier)]
    lines += [
        "",
        f"    make study NAME={name}    # {result.seeds} seeds, {result.prompts} prompts, {result.seconds:.0f} s of work",
        "",
        f"**{short(study, result).capitalize()}.**",
        "",
        "| claim | outcome | estimate | interval | claimed | verdict |",
        "|---|---|---|---|---|---|",
        *(row(claim) for claim in result.claims),
    ]
    lines += [
        f"\nTo decide *{c.claim}* with {POWER:.0%} power at the present estimate: {c.takes}."
        for c in result.claims
        if c.takes
    ]
    return [*lines, "", *arms(result), *series(earlier)]


def series(earlier: Sequence[Result]) -> list[str]:
    """Return the table of earlier series, whose runs do not count in the verdict."""
    if not earlier:
        return []
    lines = ["", "Earlier series, on other seeds or with another design; they do not count in the verdict:", ""]
    lines += ["| seeds | prompts | claim | estimate | interval | claimed | verdict |", "|---" * 7 + "|"]
    for result in earlier:
        lines += [
            f"| {result.seeds} | {result.prompts} | {c.claim} | {number(c.value)} | {number(c.low)} to {number(c.high)} |"
            f" > {number(c.at_least)} | {c.verdict} |"
            for c in result.claims
        ]
    return lines


def row(claim: Decided) -> str:
    """Return one claim as a row."""
    interval = f"{number(claim.low)} to {number(claim.high)}"
    return (
        f"| {claim.claim} | `{claim.outcome}` | {number(claim.value)} | {interval} | > {number(claim.at_least)} |"
        f" {claim.verdict} |"
    )


def arms(result: Result) -> list[str]:
    """Return the table of the arms' means."""
    outcomes = sorted({outcome for values in result.arms.values() for outcome in values})
    lines = [f"| arm | {' | '.join(f'`{outcome}`' for outcome in outcomes)} |", "|---" * (len(outcomes) + 1) + "|"]
    for arm, values in result.arms.items():
        cells = [number(values[outcome]) if outcome in values else "" for outcome in outcomes]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return lines


def number(value: float) -> str:
    """Return a number with three digits after the point, or without any if it is large."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"
