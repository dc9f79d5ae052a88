"""A study's grid: its trainings, and how they are scored."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, List, Optional

from fairseq_sparsemixer.moe.gates import DENSE

PROGRAMS = {"bleu": "fairseq-generate", "perplexity": "fairseq-eval-lm"}  # metric: the program that scores a checkpoint
METRICS = tuple(PROGRAMS)


@dataclass(frozen=True)
class Run:
    """One training: a router, its number of experts (None for the dense model), a seed, and the flags of fairseq-train.

    trial: of a training that only tries a value of a flag (see Tune), flag and value, e.g. `lr0.001`; otherwise empty.
    """

    router: str
    num_experts: Optional[int]
    seed: int
    flags: Dict[str, Any]
    trial: str = ""

    @property
    def group(self) -> str:
        """The model: the name under which its seeds are averaged, e.g. `switch-e4`."""
        return self.router if self.num_experts is None else f"{self.router}-e{self.num_experts}"

    @property
    def name(self) -> str:
        """The name of its folder, e.g. `switch-e4-seed1`, or `switch-e4-lr0.001-seed1`."""
        return "-".join(filter(None, [self.group, self.trial, f"seed{self.seed}"]))


@dataclass(frozen=True)
class Test:
    """How a checkpoint is scored: metric of METRICS, and flags of fairseq-generate or fairseq-eval-lm.

    For bleu: the reference, and optionally a file with the language of each sentence, see scores.read_languages.
    """

    metric: str
    reference: Optional[Path] = None
    flags: Dict[str, Any] = field(default_factory=dict)
    languages: Optional[Path] = None


@dataclass(frozen=True)
class Tune:
    """A flag whose value is chosen for each model: the one with the lowest final validation loss in a training with one seed.

    flags: of these trainings alone, such as fewer updates.
    """

    flag: str
    values: List[Any]
    seed: int
    flags: Dict[str, Any]


@dataclass(frozen=True)
class Study:
    """See spec.py. user_dir: fairseq's, None for this package. chosen: the values of the models that were tuned, by group."""

    title: str
    data: Path
    flags: Dict[str, Any]
    routers: Dict[str, Dict[str, Any]]
    num_experts: List[int]
    seeds: List[int]
    baseline: str
    wide: Optional[str] = None
    tune: Optional[Tune] = None
    test: Optional[Test] = None
    user_dir: Optional[Path] = None
    chosen: Dict[str, Any] = field(default_factory=dict)

    def runs(self) -> List[Run]:
        """Every run of the grid, seeds outermost: an unfinished study has runs of all routers.

        A tuned model has none until its value is chosen.
        """
        grid = [run for seed in self.seeds for run in self._grid(seed)]
        if self.tune is None:
            return grid
        ready = [run for run in grid if run.group in self.chosen or not self._is_tuned(run)]
        values = [{self.tune.flag: self.chosen[run.group]} if self._is_tuned(run) else {} for run in ready]
        return [replace(run, flags={**run.flags, **value}) for run, value in zip(ready, values)]

    def is_dense(self, variant: str) -> bool:
        """Whether a variant has no experts."""
        return {**self.flags, **self.routers[variant]}.get("router") == DENSE

    def trials(self) -> List[Run]:
        """The trainings that try the values of `tune`, one model after the other."""
        tune = self.tune
        if tune is None:
            return []
        models = [run for run in self._grid(tune.seed) if self._is_tuned(run)]
        return [
            replace(run, flags={**run.flags, **tune.flags, tune.flag: value}, trial=f"{tune.flag}{value}")
            for run in models
            for value in tune.values
        ]

    def _is_tuned(self, run: Run) -> bool:
        """A variant that sets the flag itself keeps its value."""
        return self.tune is not None and self.tune.flag not in self.routers[run.router]

    def _grid(self, seed: int) -> List[Run]:
        """A run of each model."""
        return [
            Run(router, experts, seed, {**self.flags, **flags})
            for router, flags in self.routers.items()
            for experts in ([None] if self.is_dense(router) else self.num_experts)
        ]
