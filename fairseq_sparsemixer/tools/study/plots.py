"""A study's plots: loss curves with bands, speed-up against loss level, and the experts' load over time."""

import itertools
from pathlib import Path
from typing import Any, Dict, List

import numpy as np

from fairseq_sparsemixer.tools.plotting import COLOURS, as_text, new_figure, save, styled
from fairseq_sparsemixer.tools.runs import ExpertLoad, read_run
from fairseq_sparsemixer.tools.study.curve import Curve
from fairseq_sparsemixer.tools.study.grid import Study

LEVELS = 40  # points on a speed-up curve


@styled
def draw(study: Study, results: Dict[str, Any], out: Path) -> List[Path]:
    """Write curves.png, speedup.png and, for models with experts, load.png into `out`. Returns their paths."""
    written = [_curves(results, out / "curves.png"), _speedup(study, results, out / "speedup.png")]
    loads = _loads(results, out)
    return written + ([_load_over_time(loads, out / "load.png")] if loads else [])


def _members(results: Dict[str, Any], group: Dict[str, Any]) -> List[Dict[str, Any]]:
    return [run["curve"] for run in results["runs"] if run["group"] == group["group"]]


def _panels(results: Dict[str, Any]) -> List[Any]:
    """The numbers of experts, one panel each; dense models are in all panels."""
    return sorted({group["num_experts"] for group in results["groups"] if group["num_experts"] is not None}) or [None]


def _in_panel(results: Dict[str, Any], experts: Any) -> List[Dict[str, Any]]:
    return [group for group in results["groups"] if group["num_experts"] in (experts, None)]


def _figure(results: Dict[str, Any]):
    panels = _panels(results)
    figure = new_figure(5.2 * len(panels), 3.8)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    for axis, experts in zip(axes[0], panels):
        axis.set_title("" if experts is None else f"{experts} experts")
    return figure, list(zip(axes[0], panels))


def _save(figure, path: Path) -> Path:
    save(figure, path)
    return path


def _colours(results: Dict[str, Any]) -> Dict[str, str]:
    routers = list(dict.fromkeys(group["router"] for group in results["groups"]))
    return dict(zip(routers, itertools.cycle(COLOURS.values())))


def _curves(results: Dict[str, Any], path: Path) -> Path:
    """Validation loss against updates: the mean over seeds, and a band from the lowest to the highest."""
    figure, axes = _figure(results)
    colours = _colours(results)
    for axis, experts in axes:
        for group in _in_panel(results, experts):
            curves = _members(results, group)
            mean = Curve.mean(curves)
            values = np.array([[dict(zip(c["updates"], c["losses"]))[u] for u in mean.updates] for c in curves])
            axis.plot(mean.updates, mean.losses, color=colours[group["router"]], label=as_text(group["router"]))
            axis.fill_between(mean.updates, values.min(0), values.max(0), color=colours[group["router"]], alpha=0.15, linewidth=0)
        axis.set_xlabel("updates")
    axes[0][0].set_ylabel("validation loss")
    axes[0][0].legend()
    return _save(figure, path)


def _speedup(study: Study, results: Dict[str, Any], path: Path) -> Path:
    """How many times fewer updates than the baseline a router's mean curve needs, for each loss the baseline reaches."""
    figure, axes = _figure(results)
    colours = _colours(results)
    for axis, experts in axes:
        groups = _in_panel(results, experts)
        baseline = next((group for group in groups if group["router"] == study.baseline), None)
        if baseline is None:
            continue
        reference = Curve.mean(_members(results, baseline))
        if not reference.updates:  # its seeds have no validation in common
            continue
        levels = np.linspace(reference.losses[0], min(reference.losses), LEVELS)
        for group in groups:
            curve = Curve.mean(_members(results, group))
            reached = [(level, reference.first_below(level), curve.first_below(level)) for level in levels]
            points = [(level, theirs.updates / own.updates) for level, theirs, own in reached if theirs and own]
            axis.plot(*zip(*points), color=colours[group["router"]], label=as_text(group["router"])) if points else None
        axis.invert_xaxis()
        axis.set_xlabel("validation loss reached")
    axes[0][0].set_ylabel(f"speed-up in updates over {as_text(study.baseline)}")
    if axes[0][0].lines:  # there are none if the baseline diverged
        axes[0][0].legend()
    return _save(figure, path)


def _loads(results: Dict[str, Any], out: Path) -> Dict[str, ExpertLoad]:
    """The load of the first seed of each group with experts."""
    first = {run["group"]: run["run"] for run in reversed(results["runs"]) if run["num_experts"] is not None}
    loads = {group: read_run(out / "runs" / name).load for group, name in sorted(first.items())}
    return {group: load for group, load in loads.items() if load is not None}


def _load_over_time(loads: Dict[str, ExpertLoad], path: Path) -> Path:
    """A heatmap per group: experts (of all layers, stacked) against updates, load relative to the layer's mean."""
    figure = new_figure(3.2 * len(loads) + 1, 3.6)
    axes = figure.subplots(1, len(loads), squeeze=False)[0]
    for axis, (group, logged) in zip(axes, loads.items()):
        by_layer = [np.array(rows, dtype=float) for rows in zip(*(counts for _, counts in logged.counts))]  # L times [time, E]
        share = np.concatenate([load / np.maximum(load.mean(-1, keepdims=True), 1) for load in by_layer], axis=1)
        extent = (0, logged.counts[-1][0], share.shape[1], 0)
        image = axis.imshow(share.T, aspect="auto", extent=extent, cmap="viridis", vmin=0, vmax=2)
        axis.grid(False)
        ends = np.cumsum([load.shape[1] for load in by_layer])
        middles = [end - load.shape[1] / 2 for end, load in zip(ends, by_layer)]
        axis.set_yticks(middles, [f"layer {layer + 1}" for layer in range(len(by_layer))])
        axis.set(title=as_text(group), xlabel="updates")
    figure.colorbar(image, ax=axes.tolist(), label="load / mean load of the layer")
    return _save(figure, path)
