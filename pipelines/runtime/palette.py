"""Give each algorithm one colour, in the report and in MLflow. Okabe and Ito's palette for colour-blind readers, then Tol's muted one."""

from __future__ import annotations

from collections.abc import Sequence

LIGHT = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#3D9BD6", "#882255", "#5B4FC9", "#7A7A1F", "#44AA99")
DARK = ("#4DA3DC", "#F08A45", "#35C79B", "#E3A3C6", "#E6B93D", "#8CCBF2", "#D3749F", "#9C92F2", "#C4C45A", "#7FD3C6")
"""The same hues, lighter for contrast on a dark ground."""
OWN = ("dpo", "dpo_soft", "grpo_pairs", "ppo", "grpo", "gspo", "dapo", "chord")
"""Algorithms with a fixed colour, whatever they are compared with: the first colours, in this order."""
GREY = {"base": "#9AA0A6", "sft": "#4A4F55"}


def colour(name: str, algorithms: Sequence[str]) -> str | None:
    """Return the colour of a model on a light ground; None if it is not one of `project.algorithms`."""
    if name in GREY:
        return GREY[name]
    return LIGHT[position(name, algorithms) % len(LIGHT)] if name in algorithms else None


def position(name: str, algorithms: Sequence[str]) -> int:
    """Return the place of an algorithm in the palette, len(LIGHT) or more if all colours are used.

    Algorithms of OWN keep their place. The others take, in the order of `algorithms`, the places after OWN's, then the places of
    algorithms of OWN that are not compared, then places after the palette.

    Example:
        >>> [position(name, ("grpo", "mine", "ppo")) for name in ("grpo", "mine", "ppo")]
        [4, 8, 3]
    """
    if name in OWN:
        return OWN.index(name)
    spare = range(len(OWN), len(LIGHT))
    free = [place for place, own in enumerate(OWN) if own not in algorithms]
    others = [other for other in algorithms if other not in OWN]
    after = range(len(LIGHT), len(LIGHT) + len(others))
    places: list[int] = [*spare, *free, *after]
    return places[others.index(name)]
