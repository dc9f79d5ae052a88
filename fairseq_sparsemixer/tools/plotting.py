"""How plots look and are saved, and those of training runs: validation-loss curves and expert-load heatmaps, as PNG files."""

import io
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence

from fairseq_sparsemixer.files import write_whole
from fairseq_sparsemixer.tools.runs import Run

if TYPE_CHECKING:  # it loads torch and fairseq
    from fairseq_sparsemixer.tools.language_load import LanguageLoad

# fairseq, once imported, logs everything down to debugging, and matplotlib has things to say while it is imported
logging.getLogger("matplotlib").setLevel(logging.WARNING)

import matplotlib  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

matplotlib.use("agg")  # no display is needed
DPI = 130
DARK = 0.7  # distance from the even share, relative to it, from which a heatmap's colours take white text
# Okabe and Ito's colours, told apart by colour-blind readers
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
styled = matplotlib.rc_context(STYLE)  # @styled: what a function draws looks like all our plots


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, whose parts make room for each other."""
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Draw a PNG file, whole or not at all. Raises OSError."""
    write_whole(path, drawn(figure))


@styled
def drawn(figure: Figure) -> bytes:
    """The figure as a PNG file's bytes."""
    content = io.BytesIO()
    figure.savefig(content, dpi=DPI, format="png")
    return content.getvalue()


def as_text(name: str) -> str:
    """A name for a label: no dollar sign in it begins a formula, no underscore at its beginning hides it from the legend."""
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


def plot_valid_loss(runs: Sequence[Run], path: Path) -> None:
    """draw_valid_loss into a file."""
    save(draw_valid_loss(runs), path)


@styled
def draw_valid_loss(runs: Sequence[Run]) -> Figure:
    """A curve of the validation loss against updates for each run; with gaps where a loss is not a number."""
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
    """draw_expert_load into a file. False: no run has experts."""
    figure = draw_expert_load(runs)
    if figure is not None:
        save(figure, path)
    return figure is not None


@styled
def draw_expert_load(runs: Sequence[Run]) -> Optional[Figure]:
    """A heatmap for each run with experts: layers x experts, the share of a layer's tokens. None: no run has any."""
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
    """shares [L][E] with the even share 1 / E as the middle of the colours."""
    experts = len(shares[0])
    image = axes.imshow(shares, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2 / experts)
    axes.grid(False)
    axes.set(title=f"{as_text(title)}: share of tokens", xlabel="expert", xticks=range(experts))
    axes.set_yticks(range(len(layers)), list(map(_layer_label, layers)))
    if experts <= 16:
        for row, values in enumerate(shares):
            for column, value in enumerate(values):
                colour = "white" if abs(value * experts - 1) > DARK else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axes.figure.colorbar(image, ax=axes)


def plot_language_load(loads: Dict[str, "LanguageLoad"], path: Path) -> None:
    """draw_language_load into a file."""
    save(draw_language_load(loads), path)


@styled
def draw_language_load(loads: Dict[str, "LanguageLoad"]) -> Figure:
    """A row of heatmaps for each run, one heatmap for each layer: languages x experts, the share of a language's tokens."""
    columns, languages = max(len(load.layers) for load in loads.values()), max(len(load.languages) for load in loads.values())
    figure = new_figure(0.8 + 2.2 * columns, len(loads) * (1 + 0.16 * languages))
    panels = figure.subplots(len(loads), columns, squeeze=False)
    for (name, load), row in zip(loads.items(), panels):
        for axes in row[len(load.layers) :]:
            axes.set_axis_off()
        for axes, layer, shares, information in zip(row, load.layers, load.shares(), load.information()):
            image = axes.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=1)
            axes.grid(False)
            axes.set_title(f"{as_text(name)}, {_layer_label(layer)}\n{information:.2f} bits", fontsize=8)
            axes.set(xlabel="expert", xticks=range(len(shares[0])))
            axes.set_yticks(range(len(load.languages)), [as_text(language) for language in load.languages], fontsize=7)
        figure.colorbar(image, ax=row, label="share of tokens")
    return figure


def _layer_label(layer: str) -> str:
    return as_text(layer.replace(".layers.", " "))
