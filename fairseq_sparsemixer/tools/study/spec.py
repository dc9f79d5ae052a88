"""What a study is: a grid of router x experts x seed under one budget, read from a YAML file.

title: Multi30k English-German
data: data-bin                  # what fairseq-preprocess wrote; relative to this file
flags: {task: translation, arch: transformer_moe_tiny, max-update: 2000, ...}   # of fairseq-train, for every run
variants:                       # by the name they have in the report, each with the flags that differ; once called routers
  dense: {router: dense}
  switch: {router: switch}
  sparsemixer: {router: sparsemixer}
num-experts: [4, 8]             # for every router but dense
seeds: [1, 2, 3]
baseline: switch                # the variant that the others are compared with
wide: wide-dense                # optional: the dense variant as wide as all experts together, see headroom.py
test:                           # optional: how the best checkpoint of each run is scored
  metric: bleu                  # bleu (fairseq-generate, sacreBLEU) or perplexity (fairseq-eval-lm)
  reference: test.de            # bleu: plain text, a sentence a line
  flags: {beam: 5, remove-bpe: sentencepiece}
base: other.yaml                # optional: a study that this one builds on, see spec_file.py
"""

import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.gates import DENSE, gate_class
from fairseq_sparsemixer.options import in_flags
from fairseq_sparsemixer.tools.generation import read_sentences
from fairseq_sparsemixer.tools.study.spec_file import ROUTERS, read_spec_file, require, shown, variants_key

PROGRAMS = {"bleu": "fairseq-generate", "perplexity": "fairseq-eval-lm"}  # by metric, what scores a checkpoint
METRICS = tuple(PROGRAMS)
OPTIONAL = ("wide", "test")  # keys
LARGEST = 2**32 - 1  # numpy's largest seed
LONGEST_NAME = 100  # characters of a router's name, which names folders
FLAG = re.compile(r"[A-Za-z0-9][\w-]*")
SMUGGLED = re.compile(r"-(?![\d.]|$)|--")  # the beginning of a value that argparse takes for a flag
NEEDED_OFF = ("disable-validation", "no-save")
OURS_IN_TEST = ("path", "user-dir", "results-path")  # of the program that scores
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
    wide: Optional[str] = None
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
    content = read_spec_file(path)
    require(path, all(isinstance(key, str) for key in content), "has a key that is not a text; put it in quotes")
    variants = variants_key(content)
    known = {name.replace("_", "-") for name in (entry.name for entry in fields(Study))} - {ROUTERS} | {variants}
    require(path, not set(content) - known, f"has an unknown key {_first(set(content) - known)}; known are {_list(known)}")
    missing = known - set(content) - set(OPTIONAL)
    require(path, not missing, f"lacks the key {_first(missing)}")
    study = Study(
        title=" ".join(str(content["title"]).split()),
        data=_beside(path, "data", content["data"]),
        flags=_flags(path, "flags", content["flags"]),
        routers={
            name: _flags(path, f"{variants}: {name}", flags)
            for name, flags in _mapping(path, variants, content[variants]).items()
        },
        num_experts=_integers(path, "num-experts", content["num-experts"]),
        seeds=_integers(path, "seeds", content["seeds"]),
        baseline=str(content["baseline"]),
        wide=None if content.get("wide") is None else str(content["wide"]),
        test=None if content.get("test") is None else _test(path, _mapping(path, "test", content["test"])),
    )
    require(path, study.routers, f"names no {variants}")
    for name in study.routers:
        require(path, _is_name(name), f"has {variants}: {shown(name)}, which cannot name a folder; give another name")
    baseline = shown(study.baseline)
    require(path, study.baseline in study.routers, f"has baseline: {baseline}, which is none of its {variants}")
    dense = [name for name, flags in study.routers.items() if flags.get("router") == DENSE]
    good = study.wide is None or study.wide in dense
    require(path, good, f"has wide: {shown(study.wide)}, which is none of its dense {variants}; name one with router: dense")
    there = _is(Path.is_dir, study.data)
    require(path, there, f"has data: {shown(content['data'])}, and there is no folder {shown(study.data)}; prepare it first")
    names = [run.name for run in study.runs()]
    double = next((name for name in names if names.count(name) > 1), None)
    require(path, double is None, f"has two runs that would be called {double}; give one of the {variants} another name")
    return study


def check_flags(path: Path, study: Study) -> None:
    """Raise ConfigurationError, naming the file, for a flag that fairseq's programs do not have by that whole name."""
    from fairseq_sparsemixer.tools.study.flags import unknown_flag  # loads fairseq

    variants = variants_key(read_spec_file(path))
    commands = [(f"{variants}: {name}", "fairseq-train", {**study.flags, **flags}) for name, flags in study.routers.items()]
    if study.test is not None:
        program = PROGRAMS[study.test.metric]
        commands.append(("test: flags", program, {"task": study.flags.get("task"), **study.test.flags}))
    for key, program, flags in commands:
        try:
            unknown = unknown_flag(program, flags)
        except ConfigurationError as error:
            raise ConfigurationError(
                f"the study {shown(path)} has {key}, and flags with it that do not go: {error.message}"
            ) from None
        where = "flags" if unknown in study.flags and program == "fairseq-train" else key
        require(path, unknown is None, f"has {where}: {unknown}, and {program} has no such flag; give its whole name")


def _test(path: Path, content: Dict[str, Any]) -> Test:
    unknown = set(content) - {entry.name for entry in fields(Test)}
    require(path, not unknown, f"has test: {_first(unknown)}, an unknown key; known are metric, reference, flags")
    metric: Any = content.get("metric")
    require(path, metric in METRICS, f"has test: metric: {metric}; choose from {_list(METRICS)}")
    reference = content.get("reference")
    if metric == "bleu":
        require(path, reference, "needs test: reference: FILE for bleu, plain text, a sentence a line")
        given, reference = shown(reference), _beside(path, "test: reference", reference)
        require(path, _is(Path.is_file, reference), f"has test: reference: {given}, and there is no file {shown(reference)}")
        require(path, read_sentences(reference), f"has test: reference: {given}, which is empty")
    flags = _values(path, "test: flags", content.get("flags"))
    taken = set(flags) & set(OURS_IN_TEST)
    require(path, not taken, f"has test: flags: {_first(taken)}, which the study sets itself; take it out")
    return Test(metric, reference, flags)


def _is_name(name: str) -> bool:
    """Whether it can be (the beginning of) a folder's name."""
    return Path(name).name == name and name not in (".", "..") and len(name) <= LONGEST_NAME and name.isprintable()


def _beside(path: Path, key: str, value: Any) -> Path:
    """The path that a spec gives, relative to the spec."""
    require(path, isinstance(value, (str, int, float)) and not isinstance(value, bool), f"has {key}: {shown(value)}; give a path")
    require(path, "\0" not in str(value), f"has {key}: {shown(value)}; give a path")
    return Path(os.path.realpath(path.parent / str(value)))


def _is(test: Callable[[Path], bool], path: Path) -> bool:
    """Whether a path is something; False for one that no file can have."""
    try:
        return test(path)
    except (OSError, ValueError):
        return False


def _mapping(path: Path, key: str, value: Any) -> Dict[str, Any]:
    good = value is None or isinstance(value, dict)
    require(path, good, f"has {key}: {shown(value)}; give keys with values, as in key: value")
    other = next((name for name in value or {} if not isinstance(name, str)), None)
    require(path, other is None, f"has {key}: {shown(other)}, a key that is not a text; put it in quotes")
    return dict(value or {})


def _values(path: Path, key: str, flags: Any) -> Dict[str, Any]:
    """Flags whose values can stand on a command line."""
    flags = _mapping(path, key, flags)
    for name, value in flags.items():
        require(
            path,
            FLAG.fullmatch(name),
            f"has {key}: {shown(name)}, which is not a name of a flag; give it without dashes and value",
        )
        several = isinstance(value, list) and bool(value)
        parts = value if several else [value]
        good = all(isinstance(part, (str, int, float)) for part in parts) or value is None
        require(path, good, f"has {key}: {name}: {shown(value)}; give a value, or a list of values")
        good = not any(part != part for part in parts)
        require(path, good, f"has {key}: {name}: {shown(value)}; give a number")
        good = not any(isinstance(part, str) and ("\0" in part or SMUGGLED.match(part)) for part in parts)
        require(path, good, f"has {key}: {name}: {shown(value)}, which would be read as a flag; give a value")
    return flags


def _flags(path: Path, key: str, flags: Any) -> Dict[str, Any]:
    flags = _values(path, key, flags)
    if "router" in flags:
        _check_router(path, key, flags["router"])
    taken = set(flags) & set(OURS)
    require(path, not taken, f"has {key}: {_first(taken)}, which the study sets itself; take it out")
    for name in flags:
        whole = next((ours for ours in OURS if ours.startswith(name)), None)
        require(
            path, whole is None, f"has {key}: {name}, which is short for {whole}, and that the study sets itself; take it out"
        )
    for flag in NEEDED_OFF:
        require(path, not flags.get(flag), f"has {key}: {flag}, and compares validation losses and best checkpoints; take it out")
    return flags


def _check_router(path: Path, key: str, router: Any) -> None:
    try:
        if router != DENSE:
            with in_flags():
                gate_class(str(router))
    except ConfigurationError as error:
        raise ConfigurationError(f"the study {shown(path)} has {key}: {error.message}") from None


def _integers(path: Path, key: str, values: Any) -> List[int]:
    good = isinstance(values, list) and values and all(type(value) is int and 0 < value <= LARGEST for value in values)
    require(path, good, f"has {key}: {shown(values)}; give a list of positive integers")
    require(path, len(values) == len(set(values)), f"has {key}: {shown(values)}; give each number once")
    return values


def _first(names: Any) -> str:
    return shown(next(iter(sorted(map(str, names))), ""))


def _list(names: Any) -> str:
    return ", ".join(sorted(names))
