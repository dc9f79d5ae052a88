"""What a study is: a grid of router x experts x seed under one budget, read from a YAML file.

title: Multi30k English-German
data: data-bin                  # output of fairseq-preprocess; relative to this file
flags: {task: translation, arch: transformer_moe_tiny, max-update: 2000, ...}   # of fairseq-train, for every run
variants:                       # name in the report: flags that differ; `routers` is an older name of this key
  dense: {router: dense}
  wide-dense: {router: dense, encoder-ffn-embed-dim: 8192, decoder-ffn-embed-dim: 8192}
  switch: {router: switch}
  sparsemixer: {router: sparsemixer}
num-experts: [4, 8]             # for every variant but dense ones
seeds: [1, 2, 3]
baseline: switch                # the variant that the others are compared with
wide: wide-dense                # optional: a dense variant as wide as all experts together, see headroom.py
tune:                           # optional: choose a flag's value for each model that does not set it, see tuning.py
  flag: lr
  values: [0.001, 0.002, 0.004]
  seed: 1                       # optional, default: the first of `seeds`
  flags: {max-update: 500}      # optional: of these trainings only
test:                           # optional: how the best checkpoint of each run is scored
  metric: bleu                  # bleu (fairseq-generate, sacreBLEU) or perplexity (fairseq-eval-lm)
  reference: test.de            # bleu: plain text, one sentence per line
  languages: test.en            # bleu, optional: scores by language; tagged source (<2de> ...), or one language per line
  flags: {beam: 5, remove-bpe: sentencepiece}
user-dir: my_moe                # optional: a folder with routers or models of your own, as fairseq's --user-dir
base: other.yaml                # optional: a study that this one builds on, see spec_file.py
"""

from argparse import Namespace
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Dict

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.gates import DENSE
from fairseq_sparsemixer.tools.study.grid import METRICS, PROGRAMS, Study, Test, Tune
from fairseq_sparsemixer.tools.study.scores import read_languages, read_references
from fairseq_sparsemixer.tools.study.spec_file import ROUTERS, read_spec_file, require, shown, variants_key
from fairseq_sparsemixer.tools.study.spec_values import (
    as_file,
    as_flags,
    as_integers,
    as_mapping,
    as_path,
    as_values,
    check_keys,
    first,
    is_name,
    is_seed,
    is_there,
    listed,
)

OPTIONAL = ("wide", "tune", "test", "user-dir")  # keys
OURS_IN_TEST = ("path", "user-dir", "results-path")  # of the program that scores


def read_study(path: Path) -> Study:
    """Read and check a study. Raises ConfigurationError, naming the file and the key, for anything that cannot be run."""
    content = read_spec_file(path)
    require(path, all(isinstance(key, str) for key in content), "has a key that is not text; put it in quotes")
    variants = variants_key(content)
    known = {entry.name.replace("_", "-") for entry in fields(Study)} - {ROUTERS, "chosen"} | {variants}
    check_keys(path, "", content, known, OPTIONAL)
    user_dir = None if content.get("user-dir") is None else _user_dir(path, content["user-dir"])  # before its routers are checked
    seeds = as_integers(path, "seeds", content["seeds"])
    study = Study(
        title=" ".join(str(content["title"]).split()),
        data=as_path(path, "data", content["data"]),
        flags=as_flags(path, "flags", content["flags"]),
        routers={
            name: as_flags(path, f"{variants}: {name}", flags)
            for name, flags in as_mapping(path, variants, content[variants]).items()
        },
        num_experts=as_integers(path, "num-experts", content["num-experts"]),
        seeds=seeds,
        baseline=str(content["baseline"]),
        wide=None if content.get("wide") is None else str(content["wide"]),
        tune=None if content.get("tune") is None else _tune(path, as_mapping(path, "tune", content["tune"]), seeds[0]),
        test=None if content.get("test") is None else _test(path, as_mapping(path, "test", content["test"])),
        user_dir=user_dir,
    )
    require(path, study.routers, f"names no {variants}")
    for name in study.routers:
        require(path, is_name(name), f"has {variants}: {shown(name)}, which cannot name a folder; give another name")
    baseline = shown(study.baseline)
    require(path, study.baseline in study.routers, f"has baseline: {baseline}, which is not one of its {variants}")
    dense = [name for name, flags in study.routers.items() if flags.get("router") == DENSE]
    good = study.wide is None or study.wide in dense
    require(path, good, f"has wide: {shown(study.wide)}, which is not one of its dense {variants}; name one with router: dense")
    there = is_there(Path.is_dir, study.data)
    require(path, there, f"has data: {shown(content['data'])}, and there is no folder {shown(study.data)}; prepare it first")
    _check_names(path, study, variants)
    return study


def check_flags(path: Path, study: Study) -> None:
    """Raise ConfigurationError, naming the file, for a flag that fairseq's programs do not have by that whole name."""
    from fairseq_sparsemixer.tools.study.flags import unknown_flag  # loads fairseq

    variants = variants_key(read_spec_file(path))
    commands = [(f"{variants}: {name}", "fairseq-train", {**study.flags, **flags}) for name, flags in study.routers.items()]
    commands += [("tune", "fairseq-train", trial.flags) for trial in study.trials()[:1]]
    if study.test is not None:
        program = PROGRAMS[study.test.metric]
        commands.append(("test: flags", program, {"task": study.flags.get("task"), **study.test.flags}))
    for key, program, flags in commands:
        try:
            unknown = unknown_flag(program, flags)
        except ConfigurationError as error:
            raise ConfigurationError(f"the study {shown(path)} has {key}, whose flags are refused: {error.message}") from None
        where = "flags" if unknown in study.flags and program == "fairseq-train" else key
        require(path, unknown is None, f"has {where}: {unknown}, and {program} has no such flag; give its whole name")


def _user_dir(path: Path, value: Any) -> Path:
    """Import the folder as fairseq does, so that its routers are known."""
    folder = as_path(path, "user-dir", value)
    require(path, is_there(Path.is_dir, folder), f"has user-dir: {shown(value)}, and there is no folder {shown(folder)}")
    from fairseq.utils import import_user_module  # takes seconds

    try:
        import_user_module(Namespace(user_dir=str(folder)))
    except Exception as error:  # of any kind: it is the user's code
        reason = shown(f"{type(error).__name__}: {error}", 300)
        require(path, False, f"has user-dir: {shown(value)}, which cannot be imported ({reason})")
    return folder


def _check_names(path: Path, study: Study, variants: str) -> None:
    """Each run has its own folder. Runs of tuned models are named as without tuning."""
    runs = [*replace(study, tune=None).runs(), *study.trials()]
    names = [run.name for run in runs]
    double = next((name for name in names if names.count(name) > 1), None)
    require(path, double is None, f"has two runs that would be called {double}; give one of the {variants} another name")
    tuned = study.tune is None or study.trials()
    require(path, tuned, f"has tune: flag: {study.tune and study.tune.flag}, which all {variants} set themselves; remove tune")
    for trial in study.trials():
        good = is_name(trial.trial)
        require(path, good, f"has tune: values: {shown(trial.trial)}, which cannot name a folder; set that in {variants} instead")


def _tune(path: Path, content: Dict[str, Any], seed: int) -> Tune:
    """seed: the default."""
    check_keys(path, "tune", content, ("flag", "values", "seed", "flags"), ("seed", "flags"))
    flag, values = content["flag"], content["values"]
    require(path, isinstance(flag, str), f"has tune: flag: {shown(flag)}; give the name of a flag, such as lr")
    good = isinstance(values, list) and not any(isinstance(value, (list, dict)) or value is None for value in values)
    good = good and 2 <= len(values) == len({str(value) for value in values})
    require(path, good, f"has tune: values: {shown(values)}; give a list of two values or more, each once")
    as_flags(path, "tune: values", {flag: values})
    flags = as_flags(path, "tune: flags", content.get("flags"))
    require(path, flag not in flags, f"has tune: flags: {flag}, which is tuned; remove it")
    seed = content.get("seed", seed)
    require(path, is_seed(seed), f"has tune: seed: {shown(seed)}; give a positive integer")
    return Tune(flag, values, seed, flags)


def _test(path: Path, content: Dict[str, Any]) -> Test:
    check_keys(path, "test", content, [entry.name for entry in fields(Test)], ("reference", "flags", "languages"))
    metric: Any = content.get("metric")
    require(path, metric in METRICS, f"has test: metric: {metric}; choose from {listed(METRICS)}")
    reference = languages = None
    if metric == "bleu":
        require(path, content.get("reference"), "needs test: reference: FILE for bleu, plain text, one sentence per line")
        reference = as_file(path, "test: reference", content["reference"])
        good = read_references(Test(metric, reference))
        require(path, good, f"has test: reference: {shown(content['reference'])}, which is empty")
    given = content.get("languages")
    if given is not None:
        require(path, reference, f"has test: languages: {shown(given)}, which {metric} does not use; remove it")
        languages = as_file(path, "test: languages", given)
    flags = as_values(path, "test: flags", content.get("flags"))
    taken = set(flags) & set(OURS_IN_TEST)
    require(path, not taken, f"has test: flags: {first(taken)}, which the study sets itself; remove it")
    test = Test(metric, reference, flags, languages)
    if languages:
        lines, sentences = len(read_languages(test)), len(read_references(test))
        equal = lines == sentences
        require(
            path, equal, f"has test: languages: {shown(given)} of {lines} lines, and a reference of {sentences}; give as many"
        )
    return test
