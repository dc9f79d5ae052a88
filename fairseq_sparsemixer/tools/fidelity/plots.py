"""Plots of a fidelity study."""

from typing import Any, Dict, List

from matplotlib.figure import Figure

from fairseq_sparsemixer.tools.fidelity.study import FidelityStudy
from fairseq_sparsemixer.tools.plotting import COLOURS as PALETTE
from fairseq_sparsemixer.tools.plotting import new_figure, styled

COLOURS = {
    "switch-argmax": "#999999",
    "switch": PALETTE["black"],
    "euler": PALETTE["orange"],
    "midpoint": PALETTE["blue"],
    "heun3": PALETTE["vermilion"],
    "inf": PALETTE["green"],
    "reinforce": PALETTE["purple"],
    "reinforce-baseline": PALETTE["purple"],
    "default_moe": PALETTE["yellow"],
    "dense_st": PALETTE["sky"],
}
OTHER = "#666666"  # for estimators not listed above
MARKERS = {"switch": "s", "euler": "^", "midpoint": "o", "heun3": "D", "inf": "v", "reinforce": "P", "reinforce-baseline": "X"}
BELOW = {"fontsize": 7.5, "frameon": False, "loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}  # a legend under its panel
FLOOR = 1e-16  # smaller errors, which are float64 rounding, are drawn here


@styled
def draw_study(study: FidelityStudy) -> Figure:
    """Bias against the number of draws (or per method, if enumerated), variance, and orders of convergence."""
    panels = [_plot_bias if study.draws is None else _plot_history, _plot_variance] + ([_plot_orders] if study.orders else [])
    figure = new_figure(4.8 * len(panels), 4.6)
    for panel, axis in zip(panels, figure.subplots(1, len(panels))):
        panel(study, axis)
    figure.suptitle(f"{study.problem.description}  (* arg-max rule off)", fontsize=10)
    return figure


def _style(method: Any) -> Dict[str, Any]:
    open_marker = method.argmax_rule is False
    return {
        "color": COLOURS.get(method.name, OTHER),
        "markersize": 4,
        "linewidth": 1.3,
        "label": method.label,
        "linestyle": "--" if open_marker or method.name.endswith("baseline") else "-",
        "marker": MARKERS.get(method.name, "o"),
        "markerfacecolor": "white" if open_marker else COLOURS.get(method.name, OTHER),
    }


def _plot_history(study: FidelityStudy, axis: Any) -> None:
    full = study.exact.full
    for found, moments in zip(study.figures, study.moments):
        bias = [((mean - full).norm() / full.norm()).item() for _, mean in moments.history]
        if bias:
            axis.loglog([draws for draws, _ in moments.history], bias, **_style(found.method))
        else:  # a deterministic method
            axis.axhline(found.bias_full, **{**_style(found.method), "marker": ""})
    axis.set_xlabel("draws")
    axis.set_ylabel("|mean - exact gradient| / |exact gradient|")
    axis.set_title("distance to the full gradient", fontsize=9)
    axis.legend(ncol=4, **BELOW)


def _plot_bias(study: FidelityStudy, axis: Any) -> None:
    labels = [found.method.label for found in study.figures]
    for index, found in enumerate(study.figures):
        colour = COLOURS.get(found.method.name, OTHER)
        axis.plot(max(found.bias_aim, FLOOR), index, "o", color=colour, markersize=6)
        axis.plot(max(found.bias_full, FLOOR), index, "D", color=colour, markersize=5, markerfacecolor="white")
    axis.plot([], [], "ko", label="the term it aims at")
    axis.plot([], [], "kD", markerfacecolor="white", label="the full gradient")
    axis.set_xscale("log")
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.set_xlabel("|mean - exact| / |exact|")
    axis.set_title("bias against", fontsize=9)
    axis.legend(ncol=2, **BELOW)


def _plot_variance(study: FidelityStudy, axis: Any) -> None:
    drawn = [found for found in study.figures if found.variance > 0]
    for index, found in enumerate(drawn):
        style = _style(found.method)
        axis.barh(index, found.variance, color=style["markerfacecolor"], edgecolor=style["color"], linewidth=1.3, height=0.65)
        axis.annotate(f" {found.variance:.2g}", (found.variance, index), va="center", fontsize=7)
    axis.set_xscale("log")
    axis.set_yticks(range(len(drawn)), [found.method.label for found in drawn])
    axis.invert_yaxis()
    axis.set_xlabel("variance of one draw / |exact gradient|$^2$")
    axis.margins(x=0.15)
    axis.set_title("variance", fontsize=9)


def _plot_orders(study: FidelityStudy, axis: Any) -> None:
    for found in study.orders:
        order = "exact" if found.order is None else f"order {found.order:.2f}"
        style = {**_style(found.method), "label": f"{found.method.label}: {order}"}
        axis.loglog(found.steps, [max(error, FLOOR) for error in found.errors], **style)
    _halving(axis, list(study.orders[0].steps))
    axis.set_xlabel("step h, by which a = $\\pi_i f_i$ is multiplied")
    axis.set_ylabel("error in the choice term, relative to it at h = 1")
    axis.set_title("order of convergence", fontsize=9)
    axis.legend(ncol=3, **BELOW)


def _halving(axis: Any, steps: List[float]) -> None:
    axis.set_xticks(steps, [f"1/{round(1 / step)}" for step in steps])
    axis.minorticks_off()
