"""Say the title and the main findings in Chinese. Numbers and their rules are those of `words`."""

from __future__ import annotations

from pipelines.report.analysis import Comparison, Summary
from pipelines.report.load import SFT
from pipelines.report.words import outcome, p_value, percent, ranked, solved
from posttrain.evaluation.statistics import Interval

MEASURES = {"sampled": "采样准确率", "greedy": "贪心准确率"}


def title(comparison: Comparison) -> str:
    """Return the result in one line of Chinese."""
    apart = list(comparison.apart()) if solved(comparison) else []
    result = _result(comparison) + (f";{'、'.join(apart)} 的协议不同,不参与排名" if apart else "")
    if comparison.about_training or not solved(comparison):
        return result
    return f"仅就本次运行:{result};只有一个训练种子,不能说明更多"


def _result(comparison: Comparison) -> str:
    kind, name, alike = outcome(comparison)
    return {
        "unsolved": "没有模型能解决此任务",
        "none": f"{'、'.join(summary.name for summary in comparison.panel)} 未优于监督微调",
        "chance": f"{name} 领先,但差距可能只是偶然",
        "undecided": f"{name} 优于 SFT;{'、'.join(alike)} 之间无法区分",
        "first": f"{name} 胜出",
        "only": f"{name} 优于监督微调",
    }[kind]


def findings(comparison: Comparison) -> list[str]:
    """Return the scope, the level, and the differences to SFT and to the next algorithm, in Chinese."""
    first, *others = ranked(comparison)
    seeds = max(len(summary.seeds) for summary in comparison.algorithms)
    scope = (
        f"每个算法 {seeds} 个训练种子:区间和检验涵盖其他种子与其他题目。"
        if comparison.about_training
        else "每个算法只有一个训练种子:区间和检验只涵盖其他题目,不能对训练下结论。请在 project.seeds 中增加种子(建议 5 个以上)。"
    )
    if not solved(comparison):
        return [scope, f"在 {comparison.prompts} 道留出题上,准确率处处接近零;算法之间的差别说明不了什么。"]
    measure = MEASURES[comparison.question.headline]
    level = (
        f"{first.name} 的{measure}最高:{percent(first.headline.value)}"
        f"({_span(first.headline, comparison)},{comparison.prompts} 道留出题)。"
    )
    return [scope, level, *(_difference(comparison, first, other) for other in [comparison.of(SFT), *others[:1]])]


def _difference(comparison: Comparison, a: Summary, b: Summary) -> str:
    """Return a sentence on the difference of two models."""
    pair = comparison.pair(a.name, b.name)
    sign = 1 if pair.a == a.name else -1
    spread = pair.test.difference
    low, high = sorted((100 * sign * spread.low, 100 * sign * spread.high))
    if low == high == 0:
        return f"{a.name} 与 {b.name} 之间看不出差别。"
    verdict = "显著" if pair.significant else "不显著"
    return (
        f"{a.name} 相对 {b.name}:{100 * sign * spread.value:+.1f} 个百分点(区间 {low:+.1f} 至 {high:+.1f}),{verdict}"
        f"(Holm 校正 {p_value(pair.adjusted)})。"
    )


def _span(interval: Interval, comparison: Comparison) -> str:
    """Return an interval in words."""
    confidence = 100 * comparison.question.resampling.confidence
    return f"{confidence:.4g} % 区间 {100 * interval.low:.1f} 至 {100 * interval.high:.1f} %"
