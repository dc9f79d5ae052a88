"""What a study is: a grid of router x experts x seed under one budget, read from a YAML file.

title: Multi30k English-German
data: data-bin                  # what fairseq-preprocess wrote; relative to this file
flags: {task: translation, arch: transformer_moe_tiny, max-update: 2000, ...}   # of fairseq-train, for every run
routers:                        # by the name they have in the report, each with the flags that differ
  dense: {router: dense}
  switch: {router: switch}
  sparsemixer: {router: sparsemixer}
num-experts: [4, 8]             # for every router but dense
seeds: [1, 2, 3]
baseline: switch                # the router whose final loss the others are timed to
test:                           # optional: how the best checkpoint of each run is scored
  metric: bleu                  # bleu (fairseq-generate, sacreBLEU) or perplexity (fairseq-eval-lm)
  reference: test.de            # bleu: plain text, a sentence a line
  flags: {beam: 5, remove-bpe: sentencepiece}
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Dict, List, Optional

import yaml

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.gates import DENSE
from fairseq_sparsemixer.generation import read_sentences

METRICS = ("bleu", "perplexity")
NEEDED_OFF = ("disable-validation", "no-save")
OURS = ("data", "save-dir", "seed", "num-experts", "log-file", "log-format", "user-dir", "moe-load-file", "restore-file")


@dataclass(frozen=True)
class Run:
    """One training: a router, its number of experts (None for the dense model), a seed, and the flags of fairseq-train."""

    router: str
    num_experts: Optional[int]
    seed: int
    flags: Dict[str, Any]

    @property
    def group(self) -> str:
        """What its seeds are averaged under, e.g. `switch-e4`."""
        return self.router if self.num_experts is None else f"{self.router}-e{self.num_experts}"

    @property
    def name(self) -> str:
        """The name of its folder, e.g. `switch-e4-seed1`."""
        return f"{self.group}-seed{self.seed}"


@dataclass(frozen=True)
class Test:
    """How a checkpoint is scored: metric of METRICS, flags of fairseq-generate or fairseq-eval-lm, and bleu's reference."""

    metric: str
    reference: Optional[Path] = None
    flags: Dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """See the top of this file."""

    title: str
    data: Path
    flags: Dict[str, Any]
    routers: Dict[str, Dict[str, Any]]
    num_experts: List[int]
    seeds: List[int]
    baseline: str
    test: Optional[Test] = None

    def runs(self) -> List[Run]:
        """Every run of the grid, seeds outermost: a study that is cut short has compared all routers."""
        return [
            Run(router, experts, seed, {**self.flags, **flags})
            for seed in self.seeds
            for router, flags in self.routers.items()
            for experts in ([None] if flags.get("router") == DENSE else self.num_experts)
        ]


def read_study(path: Path) -> Study:
    """Read and check a study. Raises ConfigurationError, naming the file and the key, for anything that cannot be run."""
    content = _read_yaml(path)
    known = {name.replace("_", "-") for name in (entry.name for entry in fields(Study))}
    _require(path, not set(content) - known, f"has an unknown key {_first(set(content) - known)}; known are {_list(known)}")
    missing = known - set(content) - {"test"}
    _require(path, not missing, f"lacks the key {_first(missing)}")
    study = Study(
        title=str(content["title"]),
        data=(path.parent / str(content["data"])).resolve(),
        flags=_flags(path, "flags", content["flags"]),
        routers={
            name: _flags(path, f"routers: {name}", flags) for name, flags in _mapping(path, "routers", content["routers"]).items()
        },
        num_experts=_integers(path, "num-experts", content["num-experts"]),
        seeds=_integers(path, "seeds", content["seeds"]),
        baseline=str(content["baseline"]),
        test=None if content.get("test") is None else _test(path, _mapping(path, "test", content["test"])),
    )
    _require(path, study.routers, "names no routers")
    for name in study.routers:
        _require(path, Path(str(name)).name == str(name), f"has routers: {name}, which cannot name a folder; give another name")
    _require(path, study.baseline in study.routers, f"has baseline: {study.baseline}, which is none of its routers")
    _require(path, study.data.is_dir(), f"has data: {content['data']}, and there is no folder {study.data}; prepare it first")
    return study


def _test(path: Path, content: Dict[str, Any]) -> Test:
    unknown = set(content) - {entry.name for entry in fields(Test)}
    _require(path, not unknown, f"has test: {_first(unknown)}, an unknown key; known are metric, reference, flags")
    metric = content.get("metric")
    _require(path, metric in METRICS, f"has test: metric: {metric}; choose from {_list(METRICS)}")
    reference = content.get("reference")
    if metric == "bleu":
        _require(path, reference, "needs test: reference: FILE for bleu, plain text, a sentence a line")
        reference = (path.parent / str(reference)).resolve()
        _require(path, reference.is_file(), f"has test: reference: {content['reference']}, and there is no file {reference}")
        _require(path, read_sentences(reference), f"has test: reference: {content['reference']}, which is empty")
    return Test(metric, reference, _mapping(path, "test: flags", content.get("flags")))


def _mapping(path: Path, key: str, value: Any) -> Dict[str, Any]:
    _require(path, value is None or isinstance(value, dict), f"has {key}: {value}; give keys with values, as in key: value")
    return dict(value or {})


def _flags(path: Path, key: str, flags: Any) -> Dict[str, Any]:
    flags = _mapping(path, key, flags)
    taken = set(flags) & set(OURS)
    _require(path, not taken, f"has {key}: {_first(taken)}, which the study sets itself; take it out")
    for flag in NEEDED_OFF:
        _require(
            path, not flags.get(flag), f"has {key}: {flag}, and compares validation losses and best checkpoints; take it out"
        )
    return flags


def _integers(path: Path, key: str, values: Any) -> List[int]:
    good = isinstance(values, list) and values and all(isinstance(value, int) and value > 0 for value in values)
    _require(path, good, f"has {key}: {values}; give a list of positive integers")
    _require(path, len(values) == len(set(values)), f"has {key}: {values}; give each number once")
    return values


def _read_yaml(path: Path) -> Dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the study {path} cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise ConfigurationError(f"the study {path} is no YAML ({' '.join(str(error).split())})") from None
    _require(path, isinstance(content, dict), "is no mapping of keys to values")
    return content


def _require(path: Path, condition: Any, complaint: str) -> None:
    if not condition:
        raise ConfigurationError(f"the study {path} {complaint}")


def _first(names: Any) -> str:
    return next(iter(sorted(names)), "")


def _list(names: Any) -> str:
    return ", ".join(sorted(names))
