"""State the findings in sentences. Each is derived from a number of the comparison and reports its uncertainty."""

from __future__ import annotations

from typing import Literal

from pipelines.report import hacking
from pipelines.report.analysis import Comparison, Pair, Summary
from pipelines.report.load import SFT
from pipelines.report.protocol import CURRENCIES
from posttrain.evaluation.statistics import Interval

Outcome = Literal["unsolved", "none", "chance", "undecided", "first", "only"]
"""Results of a comparison, from no success to one winner."""

UNSOLVED = 0.05
"""If the upper limit of a model's accuracy is below this value, the task counts as unsolved, whatever the ranking is."""


def percent(value: float) -> str:
    """Return a share in percent."""
    return f"{100 * value:.1f} %"


def level(comparison: Comparison, value: float) -> str:
    """Return a level of the headline measure: a share of right answers in percent, or the mean of a graded reward."""
    return f"{value:.3f}" if comparison.graded else percent(value)


def span(comparison: Comparison, interval: Interval) -> str:
    """Return an interval of the headline measure in words."""
    confidence = f"{100 * comparison.question.resampling.confidence:.4g} %"
    if not interval.known:
        return interval.method
    if comparison.graded:
        return f"{confidence} interval {interval.low:.3f} to {interval.high:.3f}"
    return f"{confidence} interval {100 * interval.low:.1f} to {100 * interval.high:.1f} %"


def leaders(comparison: Comparison) -> list[str]:
    """Return the ranked algorithms with the highest headline measure; several if they are exactly equal."""
    first, *others = ranked(comparison)
    return [first.name, *(other.name for other in others if other.headline.value == first.headline.value)]


def p_value(p: float) -> str:
    """Return `p = 0.012`; below 0.001 only an upper bound."""
    if p >= 0.001:
        return f"p = {p:.3f}"
    return "p < 0.001" if p >= 0.0001 else "p < 0.0001"


def ranked(comparison: Comparison) -> list[Summary]:
    """Return the algorithms with equal protocols, sorted by the headline measure; ties keep the order of params.yaml."""
    return sorted(comparison.panel, key=lambda summary: -summary.headline.value)


def unranked(comparison: Comparison) -> set[str]:
    """Return the algorithms whose protocol differs, so that they are shown and not ranked."""
    return {summary.name for summary in comparison.algorithms} - {summary.name for summary in comparison.panel}


def solved(comparison: Comparison) -> bool:
    """Return True if any model's accuracy is distinguishable from failure. A graded reward has no level of failure."""
    if comparison.graded:
        return True
    levels = [summary.headline for summary in comparison.summaries]
    return max(level.high for level in levels) >= UNSOLVED and max(level.value for level in levels) > 0


def title(comparison: Comparison) -> str:
    """Return the result in one line; with one training seed it is limited to this run."""
    result = _result(comparison) + _unranked(comparison)
    if comparison.about_training or not solved(comparison):
        return result
    return f"In this run with one seed, {result[0].lower() + result[1:] if result.startswith('No ') else result}"


def _unranked(comparison: Comparison) -> str:
    """Return the end of the title on algorithms under other protocols: their names, or their number if there are more than two."""
    names = list(comparison.apart()) if solved(comparison) else []
    if not names:
        return ""
    if len(names) == 1:
        return f"; {names[0]} had a different protocol and is not ranked"
    called = _listed(names) if len(names) == 2 else f"{len(names)} of {len(comparison.algorithms)} algorithms"
    return f"; {called} had different protocols and are not ranked"


def _result(comparison: Comparison) -> str:
    """Return the result in one line."""
    kind, name, alike = outcome(comparison)
    ranked_only = _listed([summary.name for summary in comparison.panel])
    return {
        "unsolved": "No model solves this task",
        "none": f"{ranked_only} did not improve on supervised fine-tuning"
        if comparison.apart()
        else "No algorithm improved on supervised fine-tuning",
        "chance": f"{name} leads, but not by more than chance explains",
        "undecided": f"{name} beats SFT; {_listed(alike)} cannot be told apart",
        "first": f"{name} wins",
        "only": f"{name} beats supervised fine-tuning",
    }[kind]


def outcome(comparison: Comparison) -> tuple[Outcome, str, list[str]]:
    """Return the outcome, the best algorithm, and all that cannot be told apart from it, itself included."""
    first, *others = ranked(comparison)
    undecided = [other.name for other in others if not comparison.pair(first.name, other.name).significant]
    kind: Outcome
    if not solved(comparison):
        kind = "unsolved"
    elif first.headline.value <= comparison.of(SFT).headline.value:
        kind = "none"
    elif not comparison.pair(first.name, SFT).significant:
        kind = "chance"
    elif undecided:
        kind = "undecided"
    else:
        kind = "first" if others else "only"
    return kind, first.name, [first.name, *undecided]


def findings(comparison: Comparison) -> list[str]:
    """Return the findings, most important first."""
    first, *others = ranked(comparison)
    by_level = sorted(comparison.algorithms, key=lambda summary: -summary.headline.value)
    sentences = [_scope(comparison), _level(comparison, first), _against_sft(comparison, first)]
    sentences += [_against(comparison, first, other) for other in others[:1]]
    sentences += [text] if (text := protocols_differ(comparison)) else []
    sentences += [text] if (text := other_measure(comparison, first)) else []
    sentences += [_worse(comparison, other) for other in by_level if significantly_worse(comparison, other)]
    sentences += [text for summary in comparison.algorithms if (text := _over_optimised(comparison, summary))]
    sentences += hacking.sentences(comparison.watched)
    sentences += [text] if (text := entropy_kept(comparison)) else []
    return sentences


def _level(comparison: Comparison, first: Summary) -> str:
    """Return a sentence on the level of the best algorithm."""
    if not solved(comparison):
        best = max(comparison.summaries, key=lambda summary: summary.headline.value)
        who = "no model" if best.headline.value == 0 else f"the best model, {best.name},"
        return (
            f"Accuracy is near zero everywhere: {who} solves"
            f" {'any' if best.headline.value == 0 else percent(best.headline.value)} of"
            f" {comparison.prompts} held-out problems ({span(comparison, best.headline)}). The model does not solve the task;"
            " differences between the algorithms say little here."
        )
    among = "ranked algorithms" if comparison.apart() else "algorithms"
    over = f", mean of {len(first.seeds)} seeds" if len(first.seeds) > 1 else ""
    equal = leaders(comparison)
    who = f"{_listed(equal)} share" if len(equal) > 1 else f"{first.name} has"
    return (
        f"{who} the highest {comparison.question.measure} of the {among}: {_solves(comparison, first.headline, len(equal) > 1)}"
        f" ({span(comparison, first.headline)}{over})."
    )


def _solves(comparison: Comparison, found: Interval, several: bool) -> str:
    """Return what a level of the headline measure means."""
    greedy, problems = comparison.question.headline == "greedy", f"{comparison.prompts} held-out problems"
    if comparison.graded:
        answers = f"{'their' if several else 'its'} {comparison.question.headline} answers"
        return f"the mean reward {comparison.question.accuracy} of {answers} to {problems} is {found.value:.3f}"
    if greedy:
        return f"{'each' if several else 'it'} solves {percent(found.value)} of {problems}"
    return f"{percent(found.value)} of {'their' if several else 'its'} sampled answers to {problems} are right"


def protocols_differ(comparison: Comparison) -> str | None:
    """Return a sentence that names the algorithms under other protocols, each with its differing cells; None if all are equal."""
    apart = comparison.apart()
    if not apart:
        return None
    each = "; ".join(f"{name} ({', '.join(cells)})" for name, cells in apart.items())
    currency = CURRENCIES[comparison.question.currency]
    return (
        f"Only algorithms with the same start, training reward, prompts and tuning, and equal {currency} are ranked together. Not ranked"
        f" with {_listed([summary.name for summary in comparison.panel])}: {each}."
    )


def other_measure(comparison: Comparison, first: Summary) -> str | None:
    """Return a sentence if the measure that is not the headline would rank a different algorithm first."""
    found = first_by_other_measure(comparison, first)
    if found is None:
        return None
    best, other, own = found
    measure = "greedy" if comparison.question.headline == "sampled" else "sampled"
    return (
        f"By {measure} accuracy {best} would rank first: {level(comparison, other)} against"
        f" {level(comparison, own)} of {first.name}. The title follows report.headline: {comparison.question.headline}."
    )


def first_by_other_measure(comparison: Comparison, first: Summary) -> tuple[str, float, float] | None:
    """Return the algorithm that leads by the other measure, its level and that of `first`; None if `first` leads there too."""
    sampled = comparison.question.headline == "sampled"
    known = {s.name: (s.greedy if sampled else s.sampled).value for s in comparison.panel}
    if not solved(comparison):
        return None
    best = max(known, key=lambda name: known[name])
    return None if known[best] <= known[first.name] else (best, known[best], known[first.name])


def _against_sft(comparison: Comparison, first: Summary) -> str:
    """Compare the best algorithm with SFT."""
    return _difference(comparison, first.name, SFT, f"SFT ({level(comparison, comparison.of(SFT).headline.value)})")


def _against(comparison: Comparison, first: Summary, second: Summary) -> str:
    """Compare the best algorithm with the next one."""
    called = f"the next algorithm, {second.name} ({level(comparison, second.headline.value)}),"
    return _difference(comparison, first.name, second.name, called)


def _difference(comparison: Comparison, a: str, b: str, called: str) -> str:
    """Return a sentence on the difference of two models."""
    pair, confidence = comparison.pair(a, b), comparison.question.resampling.confidence
    sign = 1 if pair.a == a else -1
    spread = pair.test.difference
    points = sign * spread.value
    low, high = sorted((sign * spread.low, sign * spread.high))
    start = f"Against {called} {a} is"
    if not spread.known and points == 0:
        other = called.removeprefix("the next algorithm, ").rstrip(",")
        return f"No difference is seen between {a} and {other} ({spread.method})."
    interval = (
        f"{100 * confidence:.4g} % interval of the difference {signed(comparison, low)} to {signed(comparison, high)}"
        if spread.known
        else spread.method
    )
    ahead = f"{_gap(comparison, abs(points))} {'ahead' if points > 0 else 'behind'}" if points else "level"
    return f"{start} {ahead} ({interval}); {verdict(pair)}."


def _gap(comparison: Comparison, difference: float) -> str:
    """Return a difference of two levels: in percentage points, or of graded rewards."""
    return f"{difference:.3f}" if comparison.graded else f"{100 * difference:.1f} points"


def signed(comparison: Comparison, difference: float) -> str:
    """Return a bound of a difference with its sign, in the unit of `_gap`."""
    return f"{difference:+.3f}" if comparison.graded else f"{100 * difference:+.1f}"


def verdict(pair: Pair) -> str:
    """Return the result of a test in words, with its method and corrected p."""
    how = f"{pair.test.method}, Holm-corrected {p_value(pair.adjusted)}"
    if pair.significant:
        return f"the difference is significant ({how})"
    return f"the difference is not significant ({how}), so these data do not say which is better"


def significantly_worse(comparison: Comparison, summary: Summary) -> bool:
    """Return True if the algorithm is significantly worse than SFT."""
    pair = comparison.pair(summary.name, SFT)
    return pair.significant and pair.test.difference.value < 0


def _worse(comparison: Comparison, summary: Summary) -> str:
    """Return a sentence on an algorithm that is worse than SFT."""
    pair = comparison.pair(summary.name, SFT)
    return (
        f"{summary.name} made the model worse than SFT, by {_gap(comparison, -pair.test.difference.value)}"
        f" (Holm-corrected {p_value(pair.adjusted)})."
    )


def _over_optimised(comparison: Comparison, summary: Summary) -> str | None:
    """Return a sentence on an algorithm that over-optimised a reward model."""
    found = over_optimised(comparison, summary)
    if found is None:
        return None
    before, (old, new) = comparison.of(SFT), found
    return (
        f"{summary.name} over-optimised the reward model: its score rose from {old.value:.2f} (SFT) to {new.value:.2f}"
        f" while accuracy fell from {level(comparison, before.headline.value)} to {level(comparison, summary.headline.value)}."
    )


def over_optimised(comparison: Comparison, summary: Summary) -> tuple[Interval, Interval] | None:
    """Return a reward model's score of SFT and of the algorithm if it rose clearly while accuracy fell significantly (Goodhart's law)."""
    if not significantly_worse(comparison, summary):
        return None
    before = comparison.of(SFT)
    for source in comparison.question.reward_models:
        old, new = before.rewards.get(source), summary.rewards.get(source)
        if old and new and new.low > old.high:
            return old, new
    return None


def entropies(comparison: Comparison) -> tuple[Interval, Interval] | None:
    """Return the entropy of DAPO's and of GRPO's answers: DAPO's higher upper clip should keep entropy high."""
    measured = {summary.name: summary.entropy for summary in comparison.algorithms}
    dapo, grpo = measured.get("dapo"), measured.get("grpo")
    return None if dapo is None or grpo is None or not (dapo.known and grpo.known) else (dapo, grpo)


def entropy_kept(comparison: Comparison) -> str | None:
    """Return a sentence on DAPO's entropy against GRPO's."""
    found = entropies(comparison)
    if found is None:
        return None
    dapo, grpo = found
    numbers = f"{dapo.value:.3f} against {grpo.value:.3f} nats per token of its sampled answers"
    if dapo.low > grpo.high:
        return f"dapo ends with more entropy than grpo: {numbers}."
    if dapo.high < grpo.low:
        return f"dapo does not end with more entropy than grpo, but with less: {numbers}."
    return f"dapo's entropy at the end is not clearly above grpo's: {numbers}, and the intervals overlap."


def _scope(comparison: Comparison) -> str:
    """Return a sentence on the population that intervals and tests cover."""
    seeds = max(len(summary.seeds) for summary in comparison.algorithms)
    if not comparison.about_training:
        return (
            "One training seed per algorithm: the result holds for the models of this run, and a second run may give a different order."
            " Intervals and tests cover other prompts. To compare the algorithms, add seeds: make demo SEEDS=5."
        )
    return (
        f"{seeds} training seeds per algorithm: intervals and tests cover other seeds and other prompts, with degrees of freedom"
        " from the seeds."
    )


def _listed(names: list[str]) -> str:
    """Return names as a list in words."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
