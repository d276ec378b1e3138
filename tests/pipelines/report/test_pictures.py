"""Pictures of the report: every title, label and legend lies within its picture."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from pipelines.report.analysis import Question, compare
from pipelines.report.forest import accuracy
from pipelines.report.load import load
from pipelines.report.page import pictures
from pipelines.report.style import DPI, Look, figure, legend_below
from pipelines.report.words import unranked
from posttrain.evaluation.statistics import Resampling
from tests.pipelines.synthetic_runs import build

QUESTION = Question("answer", ("answer", "rm"), ("rm",), (1, 4), Resampling(200, 0.95, 0))


def named(drawn: Figure) -> list[Text]:
    """Return the texts of a picture, without the labels of ticks: of those, some lie outside and are not drawn."""
    axes = [text for each in drawn.axes for text in (each.title, each.xaxis.label, each.yaxis.label)]
    return [*axes, *(text for legend in drawn.legends for text in legend.get_texts())]


def cut(drawn: Figure) -> list[str]:
    drawn.draw_without_rendering()
    shown = [(text.get_text(), text.get_window_extent()) for text in named(drawn) if text.get_text()]
    wide, high = drawn.bbox.width, drawn.bbox.height
    return [text for text, box in shown if box.x0 < 0 or box.y0 < 0 or box.x1 > wide or box.y1 > high]


def test_no_title_label_or_legend_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = load(("dpo", "grpo", "ppo"), (0,), build(tmp_path, seeds=(0,), steps=4))
    saved, found, written = Figure.savefig, list[str](), list[Figure]()

    def look(drawn: Figure, *places: Any, **options: Any) -> None:
        written.append(drawn)
        found.extend(cut(drawn))
        saved(drawn, *places, **options)

    monkeypatch.setattr(Figure, "savefig", look)
    comparison = compare(results, QUESTION)
    # the longer the names of a pair, the narrower the axes, under whose middle the label is
    pair = next(each for each in comparison.pairs if each.a == "grpo")
    named_longer = replace(pair, b="name_of_20_letters__")
    pictures(results, replace(comparison, pairs=[*comparison.pairs, named_longer]))
    assert len(written) > 10
    assert found == []


@pytest.mark.parametrize("dpi", [100, DPI])
def test_a_legend_of_many_long_names_takes_fewer_columns(dpi: int) -> None:
    def columns(names: list[str]) -> list[float]:
        drawn, (axes,) = figure(5.6, 3.3)
        drawn.set_dpi(dpi)
        for name in names:
            axes.plot([0, 1], [0, 1], label=name)
        legend_below(drawn)
        assert cut(drawn) == []
        (legend,) = drawn.legends
        return sorted({round(text.get_window_extent().x0) for text in legend.get_texts()})

    with Look("light", ()).applied():
        assert len(columns(["dpo", "grpo", "ppo", "gspo", "dapo", "chord"])) == 5
        assert len(columns(["dpo", "dpo_soft", "grpo_pairs", "ppo", "grpo", "gspo", "dapo", "chord"])) == 4
        assert (
            len(columns(["an_algorithm_with_a_name_of_40_letters__", "the_second_one_has_as_many_letters______"])) == 1
        )


def test_an_algorithm_that_is_not_ranked_has_a_hollow_mark(tmp_path: Path) -> None:
    comparison = compare(load(("dpo", "grpo", "ppo"), (0,), build(tmp_path, seeds=(0,), steps=4)), QUESTION)
    assert unranked(comparison) == {"dpo"}
    look = Look("light", ("dpo", "grpo", "ppo"))
    drawn = accuracy(comparison, look)
    marks = [line for line in drawn.axes[0].lines if line.get_marker() not in ("None", "", "|")]
    hollow = [to_hex(mark.get_markerfacecolor()) == to_hex(look.ground) for mark in marks]
    names = [summary.name for summary in comparison.summaries]
    assert dict(zip(names, hollow, strict=True)) == {
        "base": False,
        "sft": False,
        "dpo": True,
        "grpo": False,
        "ppo": False,
    }
