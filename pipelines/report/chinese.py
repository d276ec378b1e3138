"""Say the title and the findings in Chinese. Numbers and their rules are those of `words`."""

from __future__ import annotations

from pipelines.report import samples
from pipelines.report.analysis import Comparison, Question, Summary
from pipelines.report.curves import KL
from pipelines.report.hacking import Watched
from pipelines.report.load import SFT
from pipelines.report.protocol import AS_GIVEN, PAIRS, UNKNOWN, Currency, Protocol
from pipelines.report.words import (
    entropies,
    first_by_other_measure,
    leaders,
    level,
    outcome,
    over_optimised,
    p_value,
    percent,
    ranked,
    signed,
    significantly_worse,
    solved,
)
from pipelines.runtime.kept_answers import BEST, CHANGED, FOOLED, WORST
from posttrain.evaluation.statistics import Interval

MEASURES = {"sampled": "采样准确率", "greedy": "贪心准确率"}
CURRENCIES: dict[Currency, str] = {
    "tokens_sampled": "采样 token 数",
    "tokens_trained": "训练 token 数",
    "optimiser_steps": "优化步数",
    "wall_time": "耗时",
}
WHY = dict(
    zip(
        samples.WHY, ("抽取理由：各对齐模型意见不一", "抽取理由：所有对齐模型都答错", "抽取自得分相同的题"), strict=True
    )
)
KINDS = {BEST: "奖励最高", WORST: "奖励最低", CHANGED: "变化最大", FOOLED: "分数高而真实奖励低"}
MARKS = {"right": "对", "wrong": "错", "partly": "部分正确", "unjudged": "未判"}
CURVES = {
    KL: "相对参考模型的 KL（每个回答，nat）",
    "entropy": "熵（每 token，nat）",
    "length/mean": "长度（每个回答的 token 数）",
    "length/truncated": "被截断的回答（比例）",
    "preference/accuracy": "训练偏好对上的准确率",
    "preference/margin": "训练偏好对上的间隔",
}
SIGNALS = {PAIRS: "已记录的偏好对", UNKNOWN: "未记录", AS_GIVEN: "按给定值"}


def title(comparison: Comparison) -> str:
    """Return the result in one line of Chinese."""
    apart = list(comparison.apart()) if solved(comparison) else []
    called = f"{'、'.join(apart)} " if len(apart) <= 2 else f"{len(comparison.algorithms)} 个算法中有 {len(apart)} 个"
    result = _result(comparison) + (f"；{called}的协议不同，不参与排名" if apart else "")
    if comparison.about_training or not solved(comparison):
        return result
    return f"仅就本次运行（一个种子）：{result}"


def _result(comparison: Comparison) -> str:
    kind, name, alike = outcome(comparison)
    return {
        "unsolved": "没有模型能解决此任务",
        "none": f"{_listed(comparison.panel)} 未优于监督微调",
        "chance": f"{name} 领先，但差距可能只是偶然",
        "undecided": f"{name} 优于 SFT；{'、'.join(alike)} 之间无法区分",
        "first": f"{name} 胜出",
        "only": f"{name} 优于监督微调",
    }[kind]


def findings(comparison: Comparison) -> list[str]:
    """Return the findings of `words.findings` in Chinese, in the same order."""
    first, *others = ranked(comparison)
    by_level = sorted(comparison.algorithms, key=lambda summary: -summary.headline.value)
    sentences = [_scope(comparison), _level(comparison, first), _difference(comparison, first, comparison.of(SFT))]
    sentences += [_difference(comparison, first, other) for other in others[:1]]
    sentences += _protocols_differ(comparison) + _other_measure(comparison, first)
    sentences += [_worse(comparison, other) for other in by_level if significantly_worse(comparison, other)]
    sentences += [text for summary in comparison.algorithms for text in _over_optimised(comparison, summary)]
    sentences += [_hacked(name, own) for name, own in comparison.watched.items() if own.hacked]
    return sentences + _entropy_kept(comparison)


def curve_title(metric: str, question: Question) -> str:
    """Return the title of a training curve."""
    source = metric.removeprefix("reward/").removesuffix("/mean")
    return CURVES.get(metric) or ("真实奖励：" if source == question.accuracy else "奖励：") + source


def _scope(comparison: Comparison) -> str:
    """Return a sentence on the population that intervals and tests cover."""
    if comparison.about_training:
        seeds = max(len(summary.seeds) for summary in comparison.algorithms)
        return f"每个算法 {seeds} 个训练种子：区间和检验涵盖其他种子与其他题目，自由度由种子数决定。"
    return (
        "每个算法只有一个训练种子：结果只针对本次运行的模型，再运行一次顺序可能不同。区间和检验涵盖其他题目。"
        "请增加种子以比较算法：make demo SEEDS=5。"
    )


def _level(comparison: Comparison, first: Summary) -> str:
    """Return a sentence on the level of the best algorithm."""
    if not solved(comparison):
        best = max(comparison.summaries, key=lambda summary: summary.headline.value)
        return (
            f"在 {comparison.prompts} 道留出题上，准确率处处接近零：最好的模型也只有 {percent(best.headline.value)}"
            f"（{_span(best.headline, comparison)}）。模型不能解决此任务，算法之间的差别说明不了什么。"
        )
    among = "参与排名的算法中，" if comparison.apart() else ""
    over = f"，{len(first.seeds)} 个种子的平均" if len(first.seeds) > 1 else ""
    return (
        f"{among}{'、'.join(leaders(comparison))} 的{MEASURES[comparison.question.headline]}最高：{level(comparison, first.headline.value)}"
        f"（{_span(first.headline, comparison)}，{comparison.prompts} 道留出题{over}）。"
    )


def _difference(comparison: Comparison, a: Summary, b: Summary) -> str:
    """Return a sentence on the difference of two models."""
    pair = comparison.pair(a.name, b.name)
    sign = 1 if pair.a == a.name else -1
    spread = pair.test.difference
    low, high = sorted((sign * spread.low, sign * spread.high))
    unit = "" if comparison.graded else " 个百分点"
    if not spread.known and spread.value == 0:
        return f"{a.name} 与 {_called(b)} 之间看不出差别（{_without(spread)}）。"
    verdict = "显著" if pair.significant else "不显著，这些数据不能说明哪个更好"
    interval = f"区间 {signed(comparison, low)} 至 {signed(comparison, high)}" if spread.known else _without(spread)
    return (
        f"{a.name} 相对 {_called(b)}（{level(comparison, b.headline.value)}）：{signed(comparison, sign * spread.value)}{unit}"
        f"（{interval}），{verdict}（Holm 校正 {p_value(pair.adjusted)}）。"
    )


def _protocols_differ(comparison: Comparison) -> list[str]:
    """Return a sentence that names the algorithms under other protocols, if there are any."""
    apart = list(comparison.apart())
    if not apart:
        return []
    currency, norm = comparison.question.currency, comparison.protocols[comparison.panel[0].name]
    each = "；".join(f"{name}（{'、'.join(_cells(comparison.protocols[name], norm, currency))}）" for name in apart)
    return [
        f"只有起始模型、训练奖励、题目和调参方式相同且{CURRENCIES[currency]}相等的算法才一起排名。"
        f"未与 {_listed(comparison.panel)} 一起排名：{each}。"
    ]


def _cells(own: Protocol, norm: Protocol, currency: Currency) -> list[str]:
    """Return the cells of a protocol that differ, in words; the budget only if nothing else does."""
    found = (
        []
        if own.signal == norm.signal
        else [f"训练信号：{SIGNALS.get(own.signal, own.signal.replace('reward', '奖励'))}"]
    )
    if (own.start, own.digest) != (norm.start, norm.digest):
        found.append(f"起始于 {own.start}" if own.start != norm.start else "起始模型不同")
    if own.signal == norm.signal and own.prompts != norm.prompts:
        found.append("训练题目不同")
    if own.tuned != norm.tuned:
        found.append(f"调参：{SIGNALS.get(own.tuned, own.tuned)}")
    return found or [f"{CURRENCIES[currency]}不同"]


def _other_measure(comparison: Comparison, first: Summary) -> list[str]:
    """Return a sentence if the measure that is not the headline would rank a different algorithm first."""
    found = first_by_other_measure(comparison, first)
    if found is None:
        return []
    best, higher, own = found
    other = "greedy" if comparison.question.headline == "sampled" else "sampled"
    return [
        f"若按{MEASURES[other]}，{best} 会排第一：{level(comparison, higher)}，而 {first.name} 为 {level(comparison, own)}。"
        f"标题遵循 report.headline：{comparison.question.headline}。"
    ]


def _worse(comparison: Comparison, summary: Summary) -> str:
    """Return a sentence on an algorithm that is worse than SFT."""
    pair = comparison.pair(summary.name, SFT)
    loss = -pair.test.difference.value
    worse = f"{loss:.3f}" if comparison.graded else f"{100 * loss:.1f} 个百分点"
    return f"{summary.name} 使模型比 SFT 差 {worse}（Holm 校正 {p_value(pair.adjusted)}）。"


def _over_optimised(comparison: Comparison, summary: Summary) -> list[str]:
    """Return a sentence on an algorithm that over-optimised a reward model."""
    found = over_optimised(comparison, summary)
    if found is None:
        return []
    (old, new), before = found, comparison.of(SFT).headline.value
    return [
        f"{summary.name} 过度优化了奖励模型：奖励模型分数从 {old.value:.2f}（SFT）升至 {new.value:.2f}，"
        f"而准确率从 {level(comparison, before)} 降至 {level(comparison, summary.headline.value)}。"
    ]


def _hacked(name: str, own: Watched) -> str:
    """Return a sentence on an algorithm with a diverged run."""
    first = min(own.hacked, key=lambda one: (one.began, one.seed))
    which = f"（种子 {first.seed}）" if own.runs > 1 else ""
    return (
        f"{name} 在 {own.runs} 次运行中有 {len(own.hacked)} 次钻了奖励模型 {first.source} 的空子：从第 {first.began} 步起{which}"
        f"真实奖励从 {first.level:.2f} 降至 {first.truth:.2f}，而分数保持不降；在第 {first.noticed} 步被发现。"
    )


def _entropy_kept(comparison: Comparison) -> list[str]:
    """Return a sentence on DAPO's entropy against GRPO's."""
    found = entropies(comparison)
    if found is None:
        return []
    dapo, grpo = found
    numbers = f"采样答案每 token {dapo.value:.3f} 对 {grpo.value:.3f} nat"
    if dapo.low > grpo.high:
        return [f"dapo 结束时的熵高于 grpo：{numbers}。"]
    if dapo.high < grpo.low:
        return [f"dapo 结束时的熵并不高于 grpo，反而更低：{numbers}。"]
    return [f"dapo 结束时的熵并不明显高于 grpo：{numbers}，两个区间重叠。"]


def _called(summary: Summary) -> str:
    """Return the name of a model in a sentence."""
    return "SFT" if summary.name == SFT else summary.name


def _listed(summaries: list[Summary]) -> str:
    """Return the names of models as a list."""
    return "、".join(summary.name for summary in summaries)


def _span(interval: Interval, comparison: Comparison) -> str:
    """Return an interval in words."""
    confidence = 100 * comparison.question.resampling.confidence
    if not interval.known:
        return _without(interval)
    if comparison.graded:
        return f"{confidence:.4g} % 区间 {interval.low:.3f} 至 {interval.high:.3f}"
    return f"{confidence:.4g} % 区间 {100 * interval.low:.1f} 至 {100 * interval.high:.1f} %"


def _without(interval: Interval) -> str:
    """Return why there is no interval."""
    return f"{interval.n} 个相等的值，没有区间"
