"""Render report/index.html: one file without network access, scripts or other files."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from matplotlib.figure import Figure

from pipelines.report import chinese, currencies, curves, forest
from pipelines.report.analysis import Comparison, Question
from pipelines.report.benchmarks import benchmark_rows
from pipelines.report.checkpoints import chosen_steps, rule
from pipelines.report.load import BASE, SFT, Results
from pipelines.report.protocol import CURRENCIES
from pipelines.report.rollouts import training_answers
from pipelines.report.samples import examples
from pipelines.report.setup import setup_of
from pipelines.report.style import DPI, SCHEMES, Look, Scheme, png
from pipelines.report.templating import environment
from pipelines.report.words import findings, ranked, solved, title, unranked


@dataclass(frozen=True)
class Picture:
    """One plot in both colour schemes, with title and description."""

    name: str
    title: str
    text: str
    bytes: Mapping[Scheme, bytes]
    size: tuple[int, int]
    title_zh: str = ""
    text_zh: str = ""

    def uri(self, scheme: Scheme) -> str:
        """Return the image as a data URI."""
        return "data:image/png;base64," + base64.b64encode(self.bytes[scheme]).decode("ascii")


def pictures(results: Results, comparison: Comparison) -> dict[str, Picture]:
    """Draw every plot of the report in both colour schemes."""
    question = comparison.question
    algorithms = tuple(results.algorithms)
    drawn = {
        "accuracy": draw(
            "accuracy", "Accuracy", "Accuracy of every model with its interval.", algorithms,
            lambda look: forest.accuracy(comparison, look),
        ),
        "differences": draw(
            "differences", "Paired differences", "Differences in accuracy with intervals.", algorithms,
            lambda look: forest.differences(comparison, look),
        ),
        "against_tokens": draw(
            "against_tokens", "Result against tokens", "The headline measure of every algorithm against its tokens.", algorithms,
            lambda look: forest.against_tokens(comparison, look),
        ),
    }  # fmt: skip
    if forest.other_rewards(comparison):
        drawn["rewards"] = draw(
            "rewards", "Reward by source", "Mean reward of every other source and model with intervals.", algorithms,
            lambda look: forest.rewards(comparison, look),
        )  # fmt: skip
    if len(question.pass_k) > 1 and any(value for s in comparison.summaries for value in s.pass_at.values()):
        drawn["pass_at_k"] = draw(
            "pass_at_k", "pass@k", "pass@k of every model against k.", algorithms,
            lambda look: forest.pass_at_k(comparison, look),
        )  # fmt: skip
    if comparison.about_training:
        drawn["profiles"] = draw(
            "profiles", "Performance profiles", "Share of each algorithm's runs whose headline exceeds a level.", algorithms,
            lambda look: forest.profiles(comparison, look),
        )  # fmt: skip
    if curves.on_policy(results, question):
        drawn["over_optimisation"] = draw(
            "over_optimisation", "Reward against KL", "True reward and reward-model score against KL along training.",
            algorithms, lambda look: curves.over_optimisation(results, question, look),
        )  # fmt: skip
        drawn["against_budgets"] = draw(
            "against_budgets", "True reward against budgets", "True reward along training against each budget.",
            algorithms, lambda look: currencies.against_budgets(results, question, look),
        )  # fmt: skip
    for metric, name in curves.metrics_shown(question).items():
        if curves.logged_by(results, metric):
            drawn[metric] = _learning_picture(results, metric, name, question)
    return drawn


def _learning_picture(results: Results, metric: str, name: str, question: Question) -> Picture:
    """Draw the curves of one metric."""
    logged = curves.logged_by(results, metric)
    silent = [algorithm for algorithm in results.algorithms if algorithm not in logged]
    text = f"Journal metric {metric}." + (f" Not logged by {', '.join(silent)}." if silent else "")
    file = "curve_" + metric.replace("/", "_")
    picture = draw(file, name, text, tuple(results.algorithms), lambda look: curves.learning(results, metric, look))
    said = f"日志指标 {metric}。" + (f"{'、'.join(silent)} 未记录。" if silent else "")
    return replace(picture, title_zh=chinese.curve_title(metric, question), text_zh=said)


def draw(name: str, heading: str, text: str, algorithms: tuple[str, ...], draw: Callable[[Look], Figure]) -> Picture:
    """Draw one plot in both colour schemes."""
    rendered, size = {}, (0, 0)
    for scheme in SCHEMES:
        look = Look(scheme, algorithms)
        with look.applied():
            figure = draw(look)
            rendered[scheme] = png(figure)
            width, height = figure.get_size_inches() * DPI
        size = (round(float(width)), round(float(height)))
    return Picture(name, heading, text, rendered, size)


def page(results: Results, comparison: Comparison, drawn: Mapping[str, Picture], samples_shown: int, seed: int) -> str:
    """Return the whole page as text."""
    question = comparison.question
    looks = {scheme: Look(scheme, tuple(results.algorithms)) for scheme in SCHEMES}
    template = environment().get_template("index.html.j2")
    learning = [drawn[metric] for metric in curves.metrics_shown(question) if metric in drawn]
    missing = [
        (name, s.name, value.missing)
        for s in comparison.summaries
        for name, value in s.rewards.items()
        if value is not None and value.missing
    ]
    fewer = [
        (k, s.name, value.missing)
        for s in comparison.summaries
        for k, value in sorted(s.pass_at.items())
        if value is not None and value.missing
    ]
    return template.render(
        title=title(comparison), findings=findings(comparison), solved=solved(comparison), ranked=ranked(comparison),
        comparison=comparison, question=question, results=results, pictures=drawn, learning=learning,
        running=curves.WINDOW, on_policy=curves.on_policy(results, question), missing=missing, fewer=fewer, base=BASE, sft=SFT,
        colours={name: {scheme: looks[scheme].colour(name) for scheme in SCHEMES} for name in results.groups},
        unranked=unranked(comparison), apart=comparison.apart(), currency=CURRENCIES[question.currency], setup=setup_of(results),
        chinese_title=chinese.title(comparison), chinese_findings=chinese.findings(comparison),
        measure_zh=chinese.MEASURES[question.headline], currency_zh=chinese.CURRENCIES[question.currency],
        marks_zh=chinese.MARKS, why_zh=chinese.WHY, signals_zh=chinese.SIGNALS,
        costs={cost.name: cost for cost in comparison.costs}, greedy_measure=question.headline == "greedy",
        benchmarks=benchmark_rows(results, question.resampling),
        examples=examples(results, question, samples_shown, seed),
        checkpoint_rule=rule(results), chosen_steps=chosen_steps(results, question.accuracy),
        training_answers=training_answers(results, question), kinds_zh=chinese.KINDS,
    )  # fmt: skip
