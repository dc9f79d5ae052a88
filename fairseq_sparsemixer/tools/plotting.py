"""The common style of plots, and plots of training runs as PNG files: validation-loss curves and expert-load heatmaps."""

import io
import logging
import math
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from fairseq_sparsemixer.files import write_whole
from fairseq_sparsemixer.tools.language_table import LanguageLoad
from fairseq_sparsemixer.tools.runs import Run

# once imported, fairseq turns on debug logging for all packages, and matplotlib logs while it is imported
logging.getLogger("matplotlib").setLevel(logging.WARNING)

import matplotlib  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

matplotlib.use("agg")  # no display is needed
DPI = 130
DARK = 0.7  # relative distance from the even share above which a heatmap's text is white
# Okabe and Ito's colours, which colour-blind readers can distinguish
COLOURS = {
    "black": "#000000",
    "blue": "#0072B2",
    "vermilion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "yellow": "#F0E442",
}
STYLE: Dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.prop_cycle": matplotlib.cycler(color=list(COLOURS.values())),  # type: ignore[attr-defined]  # of another package
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "grid.alpha": 0.3,
}
styled = matplotlib.rc_context(STYLE)  # @styled: draw in the common style


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, whose layout keeps its parts from overlapping."""
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write the figure to a PNG file atomically. Raises OSError."""
    write_whole(path, drawn(figure))


@styled
def drawn(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, dpi=DPI, format="png")
    return content.getvalue()


def as_text(name: str) -> str:
    """A name escaped for a label: `$` would start a formula, and a leading `_` would hide it from the legend."""
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


def plot_valid_loss(runs: Sequence[Run], path: Path) -> None:
    """Write draw_valid_loss to a file."""
    save(draw_valid_loss(runs), path)


@styled
def draw_valid_loss(runs: Sequence[Run]) -> Figure:
    """Validation loss against updates, one curve per run, with gaps where a loss is not finite."""
    figure = new_figure(6.4, 4)
    axes = figure.add_subplot()
    for run in runs:
        if run.valid_loss:
            axes.plot(*zip(*run.valid_loss), marker="o", markersize=3, label=f"{as_text(run.name)} ({run.valid_loss[-1][1]:.3f})")
    axes.set(xlabel="updates", ylabel="validation loss (bits per token)")
    if axes.lines:
        axes.legend(title="run (last loss)")
    return figure


def plot_expert_load(runs: Sequence[Run], path: Path) -> bool:
    """Write draw_expert_load to a file. Returns False if no run has experts."""
    figure = draw_expert_load(runs)
    if figure is not None:
        save(figure, path)
    return figure is not None


@styled
def draw_expert_load(runs: Sequence[Run]) -> Optional[Figure]:
    """Each layer's token shares, a heatmap (layers x experts) per run with experts; None if no run has experts."""
    loads = [(run.name, run.load) for run in runs if run.load is not None]
    if not loads:
        return None
    heights = [len(load.layers) for _, load in loads]
    figure = new_figure(6.4, 1.1 * len(loads) + 0.45 * sum(heights))
    panels = figure.subplots(len(loads), squeeze=False, height_ratios=heights)[:, 0]
    for (name, load), axes in zip(loads, panels):
        _heatmap(axes, name, load.layers, load.total())
    return figure


def _heatmap(axes, title: str, layers: List[str], shares: List[List[float]]) -> None:
    """Draw shares [L][E]; a layer's even share 1 / E is the middle of the colour scale. Layers may differ in E."""
    experts = max(map(len, shares))
    relative = [[value * len(row) for value in row] + [math.nan] * (experts - len(row)) for row in shares]
    image = axes.imshow(relative, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2)
    axes.grid(False)
    axes.set(title=f"{as_text(title)}: share of tokens", xlabel="expert", xticks=range(experts))
    axes.set_yticks(range(len(layers)), list(map(_layer_label, layers)))
    if experts <= 16:
        for row, values in enumerate(shares):
            for column, value in enumerate(values):
                colour = "white" if abs(relative[row][column] - 1) > DARK else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axes.figure.colorbar(image, ax=axes, label="share * E")


def plot_language_load(loads: Dict[str, LanguageLoad], path: Path) -> None:
    """Write draw_language_load to a file."""
    save(draw_language_load(list(loads.items())), path)


@styled
def draw_language_load(loads: Sequence[Tuple[str, LanguageLoad]]) -> Figure:
    """Each language's token shares: a row of heatmaps per run, one heatmap (languages x experts) per layer."""
    tables = [load for _, load in loads]
    columns, languages = max(len(load.layers) for load in tables), max(len(load.languages) for load in tables)
    largest = max(share for load in tables for rows in load.shares() for row in rows for share in row)
    figure = new_figure(0.8 + 2.2 * columns, len(loads) * (1 + 0.16 * languages))
    panels = figure.subplots(len(loads), columns, squeeze=False)
    for (name, load), row in zip(loads, panels):
        for axes in row[len(load.layers) :]:
            axes.set_axis_off()
        for axes, layer, shares, information in zip(row, load.layers, load.shares(), load.information()):
            image = axes.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=largest)
            axes.grid(False)
            axes.set_title(f"{as_text(name)}, {_layer_label(layer)}\n{information:.2f} bits", fontsize=8)
            axes.set(xlabel="expert", xticks=range(len(shares[0])))
            axes.set_yticks(range(len(load.languages)), [as_text(language) for language in load.languages], fontsize=7)
        figure.colorbar(image, ax=row, label="share of tokens")
    return figure


def _layer_label(layer: str) -> str:
    return as_text(layer.replace(".layers.", " "))
