"""The study file: the resulting grid, and invalid files."""

import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import yaml
from fairseq.data.indexed_dataset import MMapIndexedDataset

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.tools.study.commands import test_command as score_command  # a name that pytest does not collect
from fairseq_sparsemixer.tools.study.commands import train_command
from fairseq_sparsemixer.tools.study.spec import check_flags, read_study

GOOD = {
    "title": "t",
    "data": "bin",
    "flags": {"task": "translation", "max-update": 10},
    "routers": {"dense": {"router": "dense"}, "switch": {"router": "switch"}, "ours": {"router": "sparsemixer", "lr": 0.1}},
    "num-experts": [4, 8],
    "seeds": [1, 2],
    "baseline": "switch",
}
ENDLESS = {"task": "translation"}
LM = {"task": "language_modeling", "arch": "transformer_lm_moe_tiny", "max-update": 10}
TUNE = {"flag": "max-lr", "values": [0.1, 0.2]}


@pytest.fixture
def spec(tmp_path):
    """write(**changes) -> the path of a study file, GOOD with the changes; None removes a key."""
    (tmp_path / "bin").mkdir()

    def write(**changes) -> Path:
        content = {**GOOD, **{key.replace("_", "-"): value for key, value in changes.items()}}
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}, sort_keys=False))
        return path

    return write


def test_the_grid_has_every_router_experts_and_seed_and_one_dense_model_per_seed(spec):
    names = [run.name for run in read_study(spec()).runs()]
    assert names[:5] == ["dense-seed1", "switch-e4-seed1", "switch-e8-seed1", "ours-e4-seed1", "ours-e8-seed1"]
    assert len(names) == len(set(names)) == 10


def test_a_variants_flags_override_the_common_flags(spec):
    runs = {run.name: run for run in read_study(spec(flags={"lr": 1.0})).runs()}
    assert runs["ours-e4-seed1"].flags == {"lr": 0.1, "router": "sparsemixer"}
    assert runs["switch-e4-seed1"].flags == {"lr": 1.0, "router": "switch"}


@pytest.mark.parametrize(
    "changes, complaint",
    [
        (dict(seed=[1]), "has seed: [1], an unknown key; the closest known key is seeds"),
        (dict(colour="red"), "has colour: red, an unknown key; known are baseline, data, "),
        (dict(seeds=None), "lacks the key seeds"),
        (dict(seeds=[0]), "positive integers"),
        (dict(seeds=[True]), "seeds: [True]; give a list of positive integers"),
        (dict(seeds=[1.5]), "positive integers"),
        (dict(seeds=[2**32]), "positive integers"),
        (dict(flags={"router": "swich"}), "flags: --router swich is unknown"),
        (dict(routers={"switch": {"router": "swich"}}), "routers: switch: "),
        (dict(routers={"switch": {"router": True}}), "routers: switch: "),
        (dict(flags={"see": 7}), "flags: see, which is short for seed"),
        (dict(flags={"save": "x"}), "which is short for save-dir"),
        (dict(flags={"seed=7": True}), "flags: seed=7, which is not the name of a flag"),
        (dict(flags={"--lr": 1}), "flags: --lr, which is not the name of a flag"),
        (dict(flags={"lr": "--seed"}), "lr: --seed, which would be read as a flag"),
        (dict(flags={"lr": ["0.1", "--seed", "7"]}), "which would be read as a flag"),
        (dict(flags={"source-lang": "-s"}), "which would be read as a flag"),
        (dict(flags={"lr": float("nan")}), "lr: nan; give a number"),
        (dict(flags={"lr": {"a": 1}}), "give a value, or a list of values"),
        (dict(flags={"lr": [[1]]}), "give a value, or a list of values"),
        (dict(flags={"lr": "a\0b"}), "flags: lr"),
        (dict(flags={False: 1}), "False, a key that is not text"),
        (dict(routers={"switch": {}, 3: {}}), "routers: 3, a key that is not text"),
        (dict(routers={"switch": {}, "..": {}}), "routers: .., which cannot name a folder"),
        (dict(routers={"switch": {}, "x" * 500: {}}), "which cannot name a folder"),
        (dict(routers={"switch": {}, "switch-e4": {"router": "dense"}}), "two runs that would be called switch-e4-seed1"),
        (dict(data="x" * 5000), "no folder"),
        (dict(data=["bin"]), "data: ['bin']; give a path"),
        (dict(baseline="x" * 5000), "which is not one of its routers"),
        (dict(test={"metric": "perplexity", "flags": {"path": "x.pt"}}), "test: flags: path, which the study sets itself"),
        (dict(num_experts=4), "positive integers"),
        (dict(baseline="glam"), "baseline: glam"),
        (dict(wide="glam"), "wide: glam, which is not one of its dense routers; name one with router: dense"),
        (dict(wide="switch"), "wide: switch, which is not one of its dense routers"),
        (dict(wide=["dense"]), "wide: ['dense'], which is not one of its dense routers"),
        (dict(data="nowhere"), "no folder"),
        (dict(flags={"disable-validation": True}), "flags: disable-validation"),
        (dict(flags={"no-save": True}), "flags: no-save"),
        (dict(flags={"save-dir": "x"}), "save-dir, which the study sets itself"),
        (dict(routers={}), "names no routers"),
        (dict(routers=["switch"]), "routers: ['switch']; give keys with values"),
        (dict(routers={"switch": ["lr"]}), "routers: switch: ['lr']; give keys with values"),
        (dict(routers={"a/b": {}, "switch": {}}), "routers: a/b, which cannot name a folder"),
        (dict(seeds=[1, 2, 1]), "seeds: [1, 2, 1]; give each number once"),
        (dict(test="bleu"), "test: bleu; give keys with values"),
        (dict(test={"metric": "perplexity", "flag": {}}), "has test: flag: {}, an unknown key; the closest known key is flags"),
        (dict(test={"metric": "perplexity", "flags": "beam"}), "test: flags: beam; give keys with values"),
        (dict(test={"reference": "test.de"}), "lacks the key test: metric"),
        (dict(tune={"flag": "lr"}), "lacks the key tune: values"),
        (dict(tune={"flag": "lr", "value": [1, 2]}), "has tune: value: [1, 2], an unknown key; the closest known key is values"),
        (dict(tune={**TUNE, "flag": ["lr"]}), "has tune: flag: ['lr']; give the name of a flag, such as lr"),
        (dict(tune={**TUNE, "flag": "--max-lr"}), "has tune: values: --max-lr, which is not the name of a flag"),
        (dict(tune={**TUNE, "flag": "seed"}), "has tune: values: seed, which the study sets itself"),
        (dict(tune={**TUNE, "values": 0.1}), "has tune: values: 0.1; give a list of two values or more, each once"),
        (dict(tune={**TUNE, "values": [0.1]}), "give a list of two values or more"),
        (dict(tune={**TUNE, "values": [0.1, 0.1]}), "two values or more, each once"),
        (dict(tune={**TUNE, "values": [0.1, None]}), "give a list of two values or more"),
        (dict(tune={**TUNE, "values": [0.1, [1]]}), "give a list of two values or more"),
        (dict(tune={**TUNE, "values": [0.1, float("nan")]}), "give a number"),
        (dict(tune={**TUNE, "values": ["a/b", "c"]}), "tune: values: max-lra/b, which cannot name a folder; set that in routers"),
        (dict(tune={**TUNE, "seed": 0}), "has tune: seed: 0; give a positive integer"),
        (dict(tune={**TUNE, "flags": {"max-lr": 1}}), "has tune: flags: max-lr, which is tuned; remove it"),
        (dict(tune={**TUNE, "flags": {"no-save": True}}), "has tune: flags: no-save"),
        (
            dict(tune={"flag": "lr", "values": [1, 2]}, routers={"switch": {"lr": 1}}),
            "flag: lr, which all routers set themselves",
        ),
        (dict(tune=TUNE, routers={"switch": {}, "switch-e4-max-lr0.1": {"router": "dense"}}), "two runs that would be called"),
        (dict(tune={**TUNE, "values": [1, 1.0]}), "two values or more, each once"),
        (dict(tune={**TUNE, "flag": "router"}), "has tune: flag: router, which variants differ by; make each value a variant"),
        (dict(tune={**TUNE, "flags": {"router": "dense"}}), "has tune: flags: router, which variants differ by; remove it"),
        (dict(title=[1]), "has title: [1]; give a text"),
        (dict(title=True), "has title: True; give a text"),
        (dict(title=" "), "has title: ; give a text"),
        (dict(data=""), "has data: ; give a path"),
        (dict(user_dir=""), "has user-dir: ; give a path"),
        (dict(routers={"switch": None}), "routers: switch: null, but no base has it to be removed; give its flags, or {}"),
        (dict(routers={"switch": {}, " x": {}}), "which cannot name a folder"),
        (dict(baseline="glam"), "which is not one of its routers; name one of dense, ours, switch"),
        (dict(wide="dense"), "has wide: dense, which has to be compared with another dense model; add one to its routers"),
        (dict(flags={"valid-subset": "dev,valid1"}), "flags: valid-subset: dev,valid1, but a study reads the losses of valid"),
        (dict(flags={"checkpoint-suffix": "x"}), "flags: checkpoint-suffix, which the study sets itself"),
        (dict(test={"metric": "perplexity", "reference": "test.de"}), "reference: test.de, which perplexity does not use"),
        (dict(test={"metric": ["bleu"]}), "metric: ['bleu']; choose from bleu, perplexity"),
        (dict(test={"metric": "rouge"}), "metric: rouge; choose from bleu, perplexity"),
        (dict(test={"metric": "bleu"}), "reference"),
        (dict(test={"metric": "bleu", "reference": "none.de"}), "no file"),
        (dict(test={"metric": "perplexity", "languages": "test.en"}), "languages: test.en, which perplexity does not use"),
    ],
)
def test_a_bad_study_gives_a_one_line_error_with_the_file(spec, changes, complaint):
    path = spec(**changes)
    with pytest.raises(ConfigurationError) as error:
        read_study(path)
    assert complaint in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def test_the_reference_is_read_before_training(spec, tmp_path):
    path = spec(test={"metric": "bleu", "reference": "test.de"})
    for content, complaint in (
        (b"gut\nK\xe4tzin\n", "test.de, line 2 is not UTF-8"),
        (b"", "reference: test.de, which is empty"),
    ):
        (tmp_path / "test.de").write_bytes(content)
        with pytest.raises(ConfigurationError, match=complaint):
            read_study(path)


@pytest.mark.parametrize("text, complaint", [
    (None, "has test: languages: test.en, and there is no file"),
    ("de\n", "has test: languages: test.en of 1 lines, and a reference of 2; give as many"),
    ("de\na house\n", "test.en, line 2 does not begin with a tag such as <2de>"),
])  # fmt: skip
def test_the_languages_of_a_test_are_read_before_training(spec, tmp_path, text, complaint):
    (tmp_path / "test.de").write_text("gut\nsehr gut\n")
    if text is not None:
        (tmp_path / "test.en").write_text(text)
    with pytest.raises(ConfigurationError, match=complaint):
        read_study(spec(test={"metric": "bleu", "reference": "test.de", "languages": "test.en"}))


@pytest.mark.parametrize("flag", [{"quiet": True}, {"nbest": 2}])
def test_flags_that_do_not_print_one_translation_of_each_sentence_are_refused(spec, tmp_path, flag):
    (tmp_path / "test.de").write_text("gut\n")
    with pytest.raises(ConfigurationError, match=f"test: flags: {next(iter(flag))}, but bleu needs one translation of each"):
        read_study(spec(test={"metric": "bleu", "reference": "test.de", "flags": flag}))


def write_index(path: Path, sentences: int) -> None:
    index = MMapIndexedDataset.Index.writer(str(path), np.int32)
    with index as writer:
        writer.write([1] * sentences)


@pytest.mark.parametrize("flags, complaint", [
    ({}, "has test: reference: .*test.de of 2 lines, and the split test of its data has 3; give the text of that split"),
    ({"gen-subset": "test1"}, "has a test, but its data .*bin have no split test1; prepare it, or remove test"),
    ({"gen-subset": "valid"}, None),
])  # fmt: skip
def test_the_reference_has_as_many_lines_as_the_split_of_the_data(spec, tmp_path, flags, complaint):
    (tmp_path / "test.de").write_text("gut\nsehr gut\n")
    path = spec(test={"metric": "bleu", "reference": "test.de", "flags": flags})
    for split, sentences in (("train", 9), ("test", 3), ("valid", 2)):
        for language in ("en", "de"):
            write_index(tmp_path / "bin" / f"{split}.en-de.{language}.idx", sentences)
    with pytest.raises(ConfigurationError, match=complaint) if complaint else nullcontext():
        read_study(path)


def test_a_router_in_the_common_flags_makes_variants_dense(spec):
    study = read_study(spec(flags={"router": "dense"}, routers={"narrow": {}, "switch": {"router": "switch"}}))
    assert [run.name for run in study.runs()][:3] == ["narrow-seed1", "switch-e4-seed1", "switch-e8-seed1"]


def test_invalid_yaml_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "s.yaml"
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_study(path)
    path.write_text("a: [")
    with pytest.raises(ConfigurationError, match="not YAML"):
        read_study(path)


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(40))
MERGE_BOMB = "a0: &a0 {x: 1}\n" + "".join(f"a{i + 1}: &a{i + 1} {{<<: [*a{i}, *a{i}]}}\n" for i in range(20))


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("seeds: [1]\ntitle: t\nseeds: [2]\n", "has the key seeds twice, again in line 3"),
        ("routers:\n  a: {router: switch}\n  a: {router: base}\n", "has the key a twice, again in line 3"),
        (BOMB, "expands to more than 20,000 values"),
        (MERGE_BOMB, "expands to more than 20,000 values"),
        ("a: &a [*a]\n", "levels deep"),
        ("[" * 3000 + "]" * 3000, "levels deep"),
        ("{a: " * 60 + "1" + "}" * 60, "levels deep"),
        ("#" * (1 << 20) + "\n", "has more than 1,048,576 bytes"),
        ("!!python/object/apply:os.system ['true']\n", "is not YAML"),
        ("title: 2026-99-99\n", "has a value that cannot be read"),
        ("a: 1\n---\nb: 2\n", "is not YAML"),
        ("\0", "is not YAML"),
        ("", "is not a mapping"),
    ],
)
def test_yaml_with_double_keys_or_excessive_size_is_refused(tmp_path, text, complaint):
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as error:
        read_study(path)
    assert complaint in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_pipes_folders_and_impossible_paths_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "x" * 300, "y" * 5000, ".", "a\0b"):
        with pytest.raises(ConfigurationError, match="the study .* cannot be read"):
            read_study(tmp_path / name)


USER_DIR = """
from fairseq_sparsemixer.moe.gates import register_gate
from fairseq_sparsemixer.moe.gates.switch import SwitchGate

@register_gate("of_a_study")
class OfAStudy(SwitchGate):
    pass
"""


def test_a_user_dir_adds_its_routers(spec, tmp_path):
    (tmp_path / "moe_of_a_study").mkdir()
    (tmp_path / "moe_of_a_study" / "__init__.py").write_text(USER_DIR)
    routers = {"switch": {"router": "switch"}, "own": {"router": "of_a_study"}}
    with pytest.raises(ConfigurationError, match="--router of_a_study is unknown"):
        read_study(spec(routers=routers))
    path = spec(routers=routers, user_dir="moe_of_a_study", flags=LM, test={"metric": "perplexity"})
    study = read_study(path)
    check_flags(path, study)
    for command in (train_command(study, study.runs()[0], tmp_path), score_command(study, tmp_path)):
        assert command[command.index("--user-dir") + 1] == str((tmp_path / "moe_of_a_study").resolve())


@pytest.mark.parametrize("name, complaint", [
    ("nowhere", "has user-dir: nowhere, and there is no folder"),
    ("broken_of_a_study", r"has user-dir: broken_of_a_study, which cannot be imported \(ValueError: not today\)"),
])  # fmt: skip
def test_a_user_dir_that_cannot_be_imported_is_refused(spec, tmp_path, name, complaint):
    (tmp_path / "broken_of_a_study").mkdir()
    (tmp_path / "broken_of_a_study" / "__init__.py").write_text("raise ValueError('not today')")
    with pytest.raises(ConfigurationError, match=complaint):
        read_study(spec(user_dir=name))


def test_yaml_merge_keys_work(spec):
    path = spec()
    text = path.read_text().replace(
        "routers:\n", "routers:\n  base: &base {router: switch, lr: 0.5}\n  hot: {<<: *base, lr: 1.0}\n"
    )
    path.write_text(text)
    assert read_study(path).routers["hot"] == {"router": "switch", "lr": 1.0}


@pytest.mark.parametrize(
    "changes, complaint",
    [
        (dict(flags={"task": "translation", "ma-update": 10}),
         "and fairseq-train has no such flag with this task, arch and criterion; the closest is max-update"),
        (dict(flags={"task": "translation", "max-upd": 10}), "has flags: max-upd: 10, and fairseq-train has no such flag"),
        (dict(routers={"switch": {"router": "switch", "capacity": 1.0}}), "has routers: switch: capacity: 1.0, and"),
        (dict(flags={"optimizer": "sgd", "adam-betas": "(0.9, 0.98)"}), "has flags: adam-betas: (0.9, 0.98), and fairseq-train"),
        (dict(flags={"arch": "transformer_moe_tyni"}), "invalid choice: 'transformer_moe_tyni'"),
        (dict(test={"metric": "perplexity", "flags": {"bem": 5}}), "has test: flags: bem: 5, and fairseq-eval-lm"),
        (dict(test={"metric": "perplexity", "flags": {"context": 5}}), "has test: flags: context: 5, and fairseq-eval-lm"),
        (dict(flags={**ENDLESS, "max-update": "abc"}), "has flags: max-update: abc; give a whole number"),
        (dict(flags={**ENDLESS, "max-update": 4.5}), "has flags: max-update: 4.5; give a whole number"),
        (dict(flags={**ENDLESS, "max-update": True}), "has flags: max-update: True, which takes a value; give one, with quotes"),
        (dict(flags={**ENDLESS, "max-update": [1, 2]}), "which takes a single value; write several as text, such as '1,2'"),
        (dict(flags={**ENDLESS, "target-lang": False}), "has flags: target-lang: False, which takes a value; give one"),
        (dict(flags={**ENDLESS, "clip-norm": "x"}), "has flags: clip-norm: x; give a number"),
        (dict(flags={**ENDLESS, "fp16": "yes"}), "has flags: fp16: yes, which takes no value; give true or false"),
        (dict(flags={**ENDLESS, "lr": "fast"}), "has flags: lr: fast; give a number, or several with commas between them"),
        (dict(flags={**ENDLESS, "ddp-backend": "x"}), "has flags: ddp-backend: x; choose from c10d, "),
        (dict(flags=ENDLESS), "has routers: dense without an end of the training; give max-update or max-epoch in flags"),
        (dict(flags={**ENDLESS, "max-update": 0}), "has routers: dense without an end of the training"),
        (dict(flags={**ENDLESS, "max-epoch": 1, "lr": "1e-3,2e-3", "fp16": False}), None),
        (dict(routers={"switch": {"router": "switch", "jitter-eps": -1}}), "switch, whose flags are refused: --jitter"),
        (dict(routers={"switch": {"router": "switch", "router-option": "a=1"}}), "--router-option a=1 does not work with"),
        (dict(routers={"switch": {"router": "topk", "moe-top-k": 9}}), "--moe-top-k 9 must lie between 1 and --num-experts 4"),
        (dict(tune={"flag": "lr", "values": [0.1, "fast"]}), "has tune: lr: fast; give a number"),
        (dict(test={"metric": "perplexity"}), "metric: perplexity, which the task translation does not have; give bleu"),
        (dict(flags=LM, test={"metric": "perplexity"}), None),
        (dict(flags={"task": "language_modeling", "tokens-per-sample": 512, "max-epoch": 1, "optimizer": "adam",
                     "adam-betas": "(0.9,0.98)",
                     "lr-scheduler": "inverse_sqrt", "warmup-updates": 5, "criterion": "moe_label_smoothed_cross_entropy",
                     "label-smoothing": 0.1, "moe-balance-loss-weight": 0.01, "capacity-factor": 2.0}), None),
    ],
)  # fmt: skip
def test_flags_must_be_whole_names_of_the_programs_flags(spec, changes, complaint):
    path = spec(**changes)
    study = read_study(path)
    if complaint is None:
        return check_flags(path, study)
    with pytest.raises(ConfigurationError) as error:
        check_flags(path, study)
    assert complaint in str(error.value) and str(path) in str(error.value) and len(str(error.value)) < 1000


def test_flag_values_are_never_evaluated(spec, tmp_path):
    value = f"[open('{tmp_path}/ran', 'w')]"
    for flag in ("lr", "adam-betas", "update-freq"):
        path = spec(flags={flag: value, "optimizer": "adam", "max-update": 1})
        with pytest.raises(ConfigurationError, match="give a number") if flag != "adam-betas" else nullcontext():
            check_flags(path, read_study(path))
    assert not (tmp_path / "ran").exists()
