"""Give each algorithm one colour, in the report and in MLflow. Okabe and Ito's palette for colour-blind readers, then Tol's muted one."""

from __future__ import annotations

from collections.abc import Sequence

LIGHT = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#3D9BD6", "#882255", "#5B4FC9", "#7A7A1F", "#44AA99")
DARK = ("#4DA3DC", "#F08A45", "#35C79B", "#E3A3C6", "#E6B93D", "#8CCBF2", "#D3749F", "#9C92F2", "#C4C45A", "#7FD3C6")
"""The same hues, lighter for contrast on a dark ground."""
GREY = {"base": "#9AA0A6", "sft": "#4A4F55"}


def colour(name: str, algorithms: Sequence[str]) -> str | None:
    """Return the colour of a model on a light ground, by the order of `project.algorithms`; None if it is not one of them."""
    if name in GREY:
        return GREY[name]
    return LIGHT[algorithms.index(name) % len(LIGHT)] if name in algorithms else None
