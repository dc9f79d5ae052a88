"""The main effects of SparseMixer's parts: python -m recipes.multilingual.effects SPEC OUT, of study_parts.yaml and its --out.

Reads the study's finished runs and fits, by least squares, the validation loss after N updates as one level for each seed
plus one effect for each part that is there. Prints and writes OUT/effects.md and OUT/effects.png. Seeds may come from several
machines, as each has its own level: --more takes the results.json of the others.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import numpy as np

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.files import write_whole
from fairseq_sparsemixer.tools.study.grid import Study
from fairseq_sparsemixer.tools.study.intervals import t_quantile
from fairseq_sparsemixer.tools.study.results import gather
from fairseq_sparsemixer.tools.study.spec import read_study
from fairseq_sparsemixer.tools.tables import markdown_table
from recipes.common.session import file_errors_said, run_as_program

PARTS = {
    "sampled": "the expert is sampled, else arg-max",
    "mask": "the mask at 0.1, else none",
    "value": "the multiplier's value is 1, else p",
    "gain": "the gradient's gain is 2, else 1",
    "coin": "the coin, of sampled experts",
    "scale": "omega, the trainable scale",
    "balance": "the balance loss over the masked softmax, else the whole",
    "noise": "noise on the logits, as in Switch",
}


class Effect(NamedTuple):
    """What a part adds to the loss, with its 95% interval; negative is better."""

    part: str
    mean: float
    low: float
    high: float


def main(arguments: Optional[List[str]] = None) -> None:
    """Print and write the effects."""
    parser = argparse.ArgumentParser(prog="python -m recipes.multilingual.effects", description=__doc__.split("\n", 1)[0])
    parser.add_argument("spec", type=Path, help="the study of --router sparsemixer_parts")
    parser.add_argument("out", type=Path, help="its --out")
    parser.add_argument("--more", type=Path, nargs="+", default=[], help="results.json of studies with other seeds")
    parser.add_argument("--updates", type=int, nargs="+", help="when to compare the losses (default: half-way and at the end)")
    options = parser.parse_args(arguments)
    study = read_study(options.spec)
    with file_errors_said(options.out):
        runs = all_runs(study, options.out, options.more)
        last = min(run["updates"] for run in runs)
        tables = {updates: effects(study, runs, updates) for updates in options.updates or (last // 2, last)}
        text = report(study, tables, len(runs))
        print(text)
        write_whole(options.out / "effects.md", text + "\n")
        plot(tables, options.out / "effects.png")


def all_runs(study: Study, out: Path, more: Sequence[Path]) -> List[Dict[str, Any]]:
    """The runs of the plan; of a run that is in several places, the first."""
    found = list(gather(study, out)["runs"])
    for path in more:
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))["runs"]
            found += [run for run in theirs if run["run"] and run["router"] in study.routers]
        except (ValueError, TypeError, KeyError):
            raise ConfigurationError(f"--more {path} is not the results.json of a study; give the one in its --out") from None
    by_name: Dict[str, Dict[str, Any]] = {}
    for run in found:
        if parts_of(study, run["router"]):
            by_name.setdefault(run["run"], run)
    return list(by_name.values())


def parts_of(study: Study, variant: str) -> Optional[Dict[str, bool]]:
    """Whether each part acts in a variant; None for another router. The coin acts on samples, the balance under a mask."""
    flags = {**study.flags, **study.routers[variant]}
    if flags.get("router") != "sparsemixer_parts":
        return None
    options = dict(pair.split("=") for pair in str(flags.get("router-option", "")).split(","))
    sampled, mask = options["sampled"] == "1", math.isfinite(float(flags["jitter-eps"]))
    return {
        "sampled": sampled,
        "mask": mask,
        "value": options["value"] == "one",
        "gain": float(options["gain"]) == 2,
        "coin": sampled and options["coin"] == "1",
        "scale": options["scale"] == "1",
        "balance": mask and options["balance"] == "masked",
        "noise": float(options["noise"]) > 0,
    }


def effects(study: Study, runs: Sequence[Dict[str, Any]], updates: int) -> List[Effect]:
    """The effect of each part on the loss after `updates`, which all runs validated at."""
    seeds = sorted({run["seed"] for run in runs})
    rows, losses = [], []
    for run in runs:
        parts = parts_of(study, run["router"])
        assert parts is not None
        rows.append([float(run["seed"] == seed) for seed in seeds] + [float(parts[part]) for part in PARTS])
        losses.append(dict(zip(run["curve"]["updates"], run["curve"]["losses"]))[updates])
    fitted = fit(np.array(rows), np.array(losses))
    return [Effect(part, *values) for part, values in zip(PARTS, fitted[len(seeds) :])]


def fit(design: np.ndarray, losses: np.ndarray) -> List[Sequence[float]]:
    """[(coefficient, low, high)] by least squares, with 95% intervals of normal errors; NaN without degrees of freedom."""
    coefficients = np.linalg.lstsq(design, losses, rcond=None)[0]
    freedom = len(losses) - np.linalg.matrix_rank(design)
    if freedom < 1:
        return [(value, math.nan, math.nan) for value in coefficients]
    variance = ((losses - design @ coefficients) ** 2).sum() / freedom
    errors = np.sqrt(variance * np.diag(np.linalg.pinv(design.T @ design)))
    half = t_quantile(int(freedom)) * errors
    return list(zip(coefficients, coefficients - half, coefficients + half))


def report(study: Study, tables: Dict[int, List[Effect]], count: int) -> str:
    """The table, a row a part and a column a time."""
    rows = [
        [
            PARTS[part],
            *(f"{e.mean:+.3f} [{e.low:+.3f}, {e.high:+.3f}]" for table in tables.values() for e in table if e.part == part),
        ]
        for part in PARTS
    ]
    header = ["part", *(f"after {updates:,} updates" for updates in tables)]
    note = f"What each part adds to the validation loss, with 95% intervals, over {count} runs; negative is better."
    return f"## {study.title}\n\n{markdown_table(header, rows)}\n\n{note}"


def plot(tables: Dict[int, List[Effect]], path: Path) -> None:
    """A row of intervals for each part."""
    from fairseq_sparsemixer.tools.plotting import new_figure, save, styled

    @styled
    def draw() -> Any:
        figure = new_figure(6.4, 3.2)
        axes = figure.add_subplot()
        for shift, (updates, table) in enumerate(tables.items()):
            heights = [index + 0.18 * shift for index in range(len(table))]
            half = [effect.mean - effect.low for effect in table]
            axes.errorbar(
                [effect.mean for effect in table], heights, xerr=half, fmt="o", markersize=4, label=f"{updates:,} updates"
            )
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.set_yticks(range(len(PARTS)), list(PARTS))
        axes.invert_yaxis()
        axes.set(xlabel="added to the validation loss (negative is better)")
        axes.legend()
        return figure

    save(draw(), path)


if __name__ == "__main__":
    run_as_program(main)
