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
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Dict, Iterator

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.tools.study.grid import METRICS, PROGRAMS, Study, Test, Tune
from fairseq_sparsemixer.tools.study.scores import read_languages, read_references, split_sizes
from fairseq_sparsemixer.tools.study.spec_file import ROUTERS, read_spec_file, require, shown, variants_key
from fairseq_sparsemixer.tools.study.spec_values import (
    as_file,
    as_flags,
    as_integers,
    as_mapping,
    as_path,
    as_text,
    as_values,
    check_keys,
    first,
    is_name,
    is_seed,
    is_there,
    listed,
)

ROUTER = "router"  # the flag
OPTIONAL = ("wide", "tune", "test", "user-dir")  # keys
OURS_IN_TEST = ("path", "user-dir", "results-path")  # of the program that scores
UNSCORABLE = ("quiet", "nbest")  # flags that print no translation, or several of a sentence


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
        title=as_text(path, "title", content["title"]),
        data=as_path(path, "data", content["data"]),
        flags=as_flags(path, "flags", content["flags"]),
        routers={
            name: _variant(path, f"{variants}: {name}", flags)
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
    baseline = f"has baseline: {shown(study.baseline)}, which is not one of its {variants}; name one of "
    require(path, study.baseline in study.routers, baseline + shown(listed(study.routers)))
    dense = [name for name in study.routers if study.is_dense(name)]
    good = study.wide is None or study.wide in dense
    require(path, good, f"has wide: {shown(study.wide)}, which is not one of its dense {variants}; name one with router: dense")
    good = study.wide is None or (len(dense) > 1 and study.wide != study.baseline)
    require(path, good, f"has wide: {study.wide}, which has to be compared with another dense model; add one to its {variants}")
    there = is_there(Path.is_dir, study.data)
    require(path, there, f"has data: {shown(content['data'])}, and there is no folder {shown(study.data)}; prepare it first")
    _check_names(path, study, variants)
    if study.test is not None:
        _check_split(path, study, study.test)
    return study


def check_flags(path: Path, study: Study) -> None:
    """Raise ConfigurationError, naming file and key, for flags that fairseq's programs or a router refuse.

    Also for trainings without an end, and for a test that the task does not have.
    """
    from fairseq_sparsemixer.tools.study import flags as fairseq_flags  # loads fairseq

    variants = variants_key(read_spec_file(path))
    # without tuning: the runs of a tuned model have no flags yet
    runs = [(f"{variants}: {run.router}", run) for run in replace(study, tune=None, seeds=study.seeds[:1]).runs()]
    runs += [("tune", run) for run in study.trials()]
    commands = [(key, "fairseq-train", run.flags) for key, run in runs]
    if study.test is not None:
        commands.append(("test: flags", PROGRAMS[study.test.metric], _test_flags(study)))
    for key, program, given in commands:
        with _refused(path, key):
            refused = fairseq_flags.refused_flag(program, given)
        if refused is not None:
            name, complaint = refused
            common = program == "fairseq-train" and name in study.flags and study.flags[name] == given[name]
            require(path, False, f"has {'flags' if common else key}: {name}: {shown(given[name])}{complaint}")
    for key, run in runs:
        endless = f"has {key} without an end of the training; give max-update or max-epoch in flags"
        require(path, fairseq_flags.has_budget(run.flags), endless)
        with _refused(path, key):
            fairseq_flags.check_router(run.flags, run.num_experts)
    if study.test is not None:
        _check_task(path, study.test, _test_flags(study)["task"])


@contextmanager
def _refused(path: Path, key: str) -> Iterator[None]:
    """Name the file and the key in an error about flags."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"the study {shown(path)} has {key}, whose flags are refused: {error.message}") from None


def _test_flags(study: Study) -> Dict[str, Any]:
    assert study.test is not None
    return {"task": study.flags.get("task"), **study.test.flags}


def _check_task(path: Path, test: Test, task: Any) -> None:
    """A perplexity needs the task of a language model, BLEU another one."""
    from fairseq.tasks import TASK_REGISTRY

    if task not in TASK_REGISTRY:
        return
    models_language = hasattr(TASK_REGISTRY[task], "eval_lm_dataloader")
    good = models_language == (test.metric == "perplexity")
    other = "bleu, or remove test" if test.metric == "perplexity" else "perplexity"
    require(path, good, f"has test: metric: {test.metric}, which the task {task} does not have; give {other}")


def _user_dir(path: Path, value: Any) -> Path:
    """Import the folder as fairseq does, so that its routers are known."""
    folder = as_path(path, "user-dir", value)
    there = f"and there is no folder {shown(folder)}; give a path, relative to this file"
    require(path, is_there(Path.is_dir, folder), f"has user-dir: {shown(value)}, {there}")
    from fairseq.utils import import_user_module  # takes seconds

    try:
        import_user_module(Namespace(user_dir=str(folder)))
    except Exception as error:  # of any kind: it is the user's code
        reason = shown(f"{type(error).__name__}: {error}", 300)
        require(path, False, f"has user-dir: {shown(value)}, which cannot be imported ({reason}); correct its code")
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


def _variant(path: Path, key: str, flags: Any) -> Dict[str, Any]:
    require(path, flags is not None, f"has {key}: null, but no base has it to be removed; give its flags, or {{}} for none")
    return as_flags(path, key, flags)


def _check_split(path: Path, study: Study, test: Test) -> None:
    """The data have the split of the test, and the reference as many sentences. Nothing is checked for folders without data."""
    name = str(test.flags.get("gen-subset", "test"))
    sizes = split_sizes(study.data, name)
    good = sizes or not split_sizes(study.data, "train")
    require(path, good, f"has a test, but its data {shown(study.data)} have no split {name}; prepare it, or remove test")
    if test.reference is None or not sizes:
        return
    sentences = len(read_references(test))
    what = f"has test: reference: {shown(test.reference)} of {sentences} lines, and the split {name} of its data has {max(sizes)}"
    require(path, sentences in sizes, f"{what}; give the text of that split")


def _tune(path: Path, content: Dict[str, Any], seed: int) -> Tune:
    """seed: the default."""
    check_keys(path, "tune", content, ("flag", "values", "seed", "flags"), ("seed", "flags"))
    flag, values = content["flag"], content["values"]
    require(path, isinstance(flag, str), f"has tune: flag: {shown(flag)}; give the name of a flag, such as lr")
    good = isinstance(values, list) and not any(isinstance(value, (list, dict)) or value is None for value in values)
    good = good and 2 <= len(values) == len({str(value) for value in values}) == len(set(values))
    require(path, good, f"has tune: values: {shown(values)}; give a list of two values or more, each once")
    require(path, flag != ROUTER, f"has tune: flag: {flag}, which variants differ by; make each value a variant")
    as_flags(path, "tune: values", {flag: values})
    flags = as_flags(path, "tune: flags", content.get("flags"))
    for name, why in ((flag, "is tuned"), (ROUTER, "variants differ by")):
        require(path, name not in flags, f"has tune: flags: {name}, which {why}; remove it")
    seed = content.get("seed", seed)
    require(path, is_seed(seed), f"has tune: seed: {shown(seed)}; give a positive integer")
    return Tune(flag, values, seed, flags)


def _test(path: Path, content: Dict[str, Any]) -> Test:
    check_keys(path, "test", content, [entry.name for entry in fields(Test)], ("reference", "flags", "languages"))
    metric: Any = content.get("metric")
    require(path, metric in METRICS, f"has test: metric: {shown(metric)}; choose from {listed(METRICS)}")
    reference = languages = None
    if metric == "bleu":
        require(path, content.get("reference"), "needs test: reference: FILE for bleu, plain text, one sentence per line")
        reference = as_file(path, "test: reference", content["reference"])
        good = read_references(Test(metric, reference))
        require(path, good, f"has test: reference: {shown(content['reference'])}, which is empty")
    given = content.get("reference")
    require(path, given is None or reference, f"has test: reference: {shown(given)}, which {metric} does not use; remove it")
    given = content.get("languages")
    if given is not None:
        require(path, reference, f"has test: languages: {shown(given)}, which {metric} does not use; remove it")
        languages = as_file(path, "test: languages", given)
    flags = as_values(path, "test: flags", content.get("flags"))
    taken = set(flags) & set(OURS_IN_TEST)
    require(path, not taken, f"has test: flags: {first(taken)}, which the study sets itself; remove it")
    taken = {name for name in UNSCORABLE if flags.get(name) and metric == "bleu"}
    require(path, not taken, f"has test: flags: {first(taken)}, but bleu needs one translation of each sentence; remove it")
    test = Test(metric, reference, flags, languages)
    if languages:
        lines, sentences = len(read_languages(test)), len(read_references(test))
        equal = lines == sentences
        require(
            path, equal, f"has test: languages: {shown(given)} of {lines} lines, and a reference of {sentences}; give as many"
        )
    return test
