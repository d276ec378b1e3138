"""Define one style for all plots: a fixed colour and marker per model, in a light and a dark scheme."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend

from pipelines.report.load import BASE, SFT
from pipelines.runtime import palette

matplotlib.use("Agg")

Scheme = Literal["light", "dark"]
SCHEMES: tuple[Scheme, ...] = ("light", "dark")
_MARKERS = "osD^vP*Xhp"
_GREY: dict[Scheme, dict[str, str]] = {
    "light": palette.GREY,
    "dark": {BASE: "#7D838A", SFT: "#C9CED4"},
}
_INK: dict[Scheme, tuple[str, str, str]] = {
    "light": ("#FFFFFF", "#24292F", "#E4E7EA"),
    "dark": ("#171A1E", "#DDE2E7", "#31363C"),
}
DPI = 144
COLUMNS = 5
"""Most columns of a legend."""


@dataclass(frozen=True)
class Look:
    """The colours and markers of one rendering."""

    scheme: Scheme
    algorithms: tuple[str, ...]

    def colour(self, name: str) -> str:
        """Return the model's colour."""
        if name in _GREY[self.scheme]:
            return _GREY[self.scheme][name]
        colours = palette.LIGHT if self.scheme == "light" else palette.DARK
        return colours[palette.position(name, self.algorithms) % len(colours)]

    def marker(self, name: str) -> str:
        """Return the model's marker."""
        if name in (BASE, SFT):
            return "|" if name == BASE else "d"
        return _MARKERS[palette.position(name, self.algorithms) % len(_MARKERS)]

    def dashes(self, name: str) -> str:
        """Return the line style: dashed if all colours are already used."""
        return "-" if palette.position(name, self.algorithms) < len(palette.LIGHT) else "--"

    @property
    def ink(self) -> str:
        """Return the colour of text and axes."""
        return _INK[self.scheme][1]

    @property
    def ground(self) -> str:
        """Return the background colour."""
        return _INK[self.scheme][0]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Apply the style to matplotlib inside the context."""
        ground, ink, rule = _INK[self.scheme]
        settings: dict[Any, Any] = {
            "figure.facecolor": ground, "axes.facecolor": ground, "savefig.facecolor": ground,
            "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": rule, "xtick.color": ink, "ytick.color": ink,
            "grid.color": rule, "axes.grid": True, "axes.axisbelow": True, "grid.linewidth": 0.8,
            "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
            "xtick.major.size": 0, "ytick.major.size": 0,
            "font.family": "DejaVu Sans", "font.size": 10.5, "axes.titlesize": 11.5, "axes.titleweight": "bold",
            "axes.titlelocation": "left", "axes.titlepad": 10, "legend.frameon": False, "lines.solid_capstyle": "round",
            "axes.formatter.useoffset": False,
        }  # fmt: skip
        with matplotlib.rc_context():
            matplotlib.rcdefaults()  # A matplotlibrc of this machine must not change the plot.
            matplotlib.rcParams.update(settings)
            yield


def figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure that matplotlib's global state does not hold."""
    drawn = Figure(figsize=(width, height), layout="constrained")
    return drawn, drawn.subplots(rows, columns, squeeze=False).ravel().tolist()


def legend_below(drawn: Figure, *handles_and_labels: Any) -> None:
    """Draw the legend under the axes, in as many columns as fit into the figure's width, five at most."""
    for columns in range(COLUMNS, 0, -1):
        legend = drawn.legend(*handles_and_labels, loc="outside lower center", ncols=columns)
        if columns == 1 or _width_without_margin(legend) <= drawn.bbox.width:
            return
        legend.remove()


def _width_without_margin(legend: Legend) -> float:
    """Return the width of a legend's entries in pixels; its margin may lie outside the figure."""
    points = max((float(text.get_fontsize()) for text in legend.get_texts()), default=0.0)
    return legend.get_window_extent().width - 2 * float(legend.borderpad) * points * legend.figure.dpi / 72


def png(drawn: Figure) -> bytes:
    """Return PNG bytes that depend only on the plot, without date and library version."""
    target = BytesIO()
    drawn.savefig(target, format="png", dpi=DPI, metadata={"Software": None})
    return target.getvalue()
