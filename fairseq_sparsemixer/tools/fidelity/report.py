"""Prints a fidelity study."""

from typing import Tuple

from rich import box
from rich.console import Console
from rich.table import Table

from fairseq_sparsemixer.tools.fidelity.conclusions import conclusions
from fairseq_sparsemixer.tools.fidelity.measure import Fidelity
from fairseq_sparsemixer.tools.fidelity.study import FidelityStudy

HEADER = ("estimator", "aims at", "its bias", "to full", "cosine", "variance", "experts", "time")


def print_study(study: FidelityStudy, console: Console) -> None:
    """Print the table, the orders and the conclusions."""
    how = "exact expectations" if study.draws is None else f"{study.draws:,} draws, seed {study.seed}"
    table = Table(*HEADER, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in table.columns[2:]:
        column.justify = "right"
    for found in study.figures:
        table.add_row(*row(study, found))
    console.print(f"{study.problem.description}; {how}", highlight=False)
    console.print(table)
    console.print(
        "* without the arg-max rule: its quadrature is used for the arg-max expert too. its bias: |mean - aim| / |aim|"
        + ("" if study.draws is None else ", ± the sampling noise of an unbiased method")
        + ". to full: |mean - full| / |full|. cosine: between mean and full. variance: of one draw / |full|²."
        " experts: run per token in training. time: of a layer's step, relative to the switch router.",
        highlight=False,
    )
    if study.orders:
        orders = ", ".join(f"{o.method.label} {'exact' if o.order is None else format(o.order, '.2f')}" for o in study.orders)
        console.print(f"\nOrder of convergence of the choice term as the step shrinks: {orders}.", highlight=False)
    console.print()
    for sentence in conclusions(study):
        console.print(f"- {sentence}", highlight=False)


def row(study: FidelityStudy, found: Fidelity) -> Tuple[str, ...]:
    """The cells under HEADER."""
    time = study.times.get(found.method.label)
    return (
        found.method.label,
        found.method.aim,
        with_noise(found.bias_aim, found.noise_aim),
        brief(found.bias_full),
        f"{found.cosine:.4f}",
        f"{found.variance:.3g}",
        str(study.experts(found.method)),
        "-" if time is None else f"{time:.2f}",
    )


def with_noise(bias: float, noise: float) -> str:
    """A bias and its sampling noise, if any."""
    return f"{brief(bias)} ±{noise:.4f}" if noise else brief(bias)


def brief(bias: float) -> str:
    """Four decimals; below 1e-4, one digit in scientific notation."""
    return f"{bias:.4f}" if bias >= 1e-4 else f"{bias:.0e}"
