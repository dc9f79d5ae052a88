"""Plots of training runs: validation-loss curves and expert-load heatmaps, as PNG files."""

import logging
from pathlib import Path
from typing import List, Sequence

from fairseq_sparsemixer.runs import Run

# fairseq, once imported, logs everything down to debugging, and matplotlib has things to say while it is imported
logging.getLogger("matplotlib").setLevel(logging.WARNING)

import matplotlib  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

matplotlib.use("agg")  # no display is needed
DPI = 110


def plot_valid_loss(runs: Sequence[Run], path: Path) -> None:
    """A curve of the validation loss against updates for each run."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    for run in runs:
        if run.valid_loss:
            axes.plot(*zip(*run.valid_loss), marker="o", markersize=3, label=f"{run.name} ({run.valid_loss[-1][1]:.3f})")
    axes.set(xlabel="updates", ylabel="validation loss (bits per token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(title="run (last loss)")
    figure.savefig(path, dpi=DPI)


def plot_expert_load(runs: Sequence[Run], path: Path) -> bool:
    """A heatmap for each run with experts: layers x experts, the share of a layer's tokens. False: no run has any."""
    runs = [run for run in runs if run.load is not None]
    if not runs:
        return False
    rows = sum(len(run.load.layers) for run in runs)
    figure = Figure(figsize=(6.4, 1.1 * len(runs) + 0.45 * rows), layout="constrained")
    panels = figure.subplots(len(runs), squeeze=False, height_ratios=[len(run.load.layers) for run in runs])[:, 0]
    for run, axes in zip(runs, panels):
        _heatmap(axes, run.name, run.load.layers, run.load.total())
    figure.savefig(path, dpi=DPI)
    return True


def _heatmap(axes, title: str, layers: List[str], shares: List[List[float]]) -> None:
    """shares [L][E] with the even share 1 / E as the middle of the colours."""
    experts = len(shares[0])
    image = axes.imshow(shares, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2 / experts)
    axes.set(title=f"{title}: share of tokens", xlabel="expert", xticks=range(experts))
    axes.set_yticks(range(len(layers)), [layer.replace(".layers.", " ") for layer in layers])
    if experts <= 16:
        for row, values in enumerate(shares):
            for column, value in enumerate(values):
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8)
    axes.figure.colorbar(image, ax=axes)
