"""The study's file: what it becomes, and what is refused."""

from pathlib import Path

import pytest
import yaml

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.study.spec import read_study

GOOD = {
    "title": "t",
    "data": "bin",
    "flags": {"task": "translation", "max-update": 10},
    "routers": {"dense": {"router": "dense"}, "switch": {"router": "switch"}, "ours": {"router": "sparsemixer", "lr": 0.1}},
    "num-experts": [4, 8],
    "seeds": [1, 2],
    "baseline": "switch",
}


@pytest.fixture
def spec(tmp_path):
    """write(**changes) -> the path of a study file, GOOD but for the changes; None takes a key out."""
    (tmp_path / "bin").mkdir()

    def write(**changes) -> Path:
        content = {**GOOD, **{key.replace("_", "-"): value for key, value in changes.items()}}
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}, sort_keys=False))
        return path

    return write


def test_the_grid_has_every_router_experts_and_seed_and_one_dense_model_a_seed(spec):
    names = [run.name for run in read_study(spec()).runs()]
    assert names[:5] == ["dense-seed1", "switch-e4-seed1", "switch-e8-seed1", "ours-e4-seed1", "ours-e8-seed1"]
    assert len(names) == len(set(names)) == 10


def test_a_routers_flags_win_over_the_common_ones(spec):
    runs = {run.name: run for run in read_study(spec(flags={"lr": 1.0})).runs()}
    assert runs["ours-e4-seed1"].flags == {"lr": 0.1, "router": "sparsemixer"}
    assert runs["switch-e4-seed1"].flags == {"lr": 1.0, "router": "switch"}


@pytest.mark.parametrize(
    "changes, complaint",
    [
        (dict(seed=[1]), "unknown key seed"),
        (dict(seeds=None), "lacks the key seeds"),
        (dict(seeds=[0]), "positive integers"),
        (dict(num_experts=4), "positive integers"),
        (dict(baseline="glam"), "baseline: glam"),
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
        (dict(test={"metric": "perplexity", "flag": {}}), "test: flag, an unknown key; known are metric, reference, flags"),
        (dict(test={"metric": "perplexity", "flags": "beam"}), "test: flags: beam; give keys with values"),
        (dict(test={"metric": "rouge"}), "metric: rouge; choose from bleu, perplexity"),
        (dict(test={"metric": "bleu"}), "reference"),
        (dict(test={"metric": "bleu", "reference": "none.de"}), "no file"),
    ],
)
def test_a_bad_study_ends_in_one_sentence_that_names_the_file(spec, changes, complaint):
    path = spec(**changes)
    with pytest.raises(ConfigurationError) as error:
        read_study(path)
    assert complaint in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_reference_is_read_before_anything_is_trained(spec, tmp_path):
    path = spec(test={"metric": "bleu", "reference": "test.de"})
    for content, complaint in (
        (b"gut\nK\xe4tzin\n", "test.de, line 2 is not UTF-8"),
        (b"", "reference: test.de, which is empty"),
    ):
        (tmp_path / "test.de").write_bytes(content)
        with pytest.raises(ConfigurationError, match=complaint):
            read_study(path)


def test_text_that_is_no_yaml_and_a_missing_file_are_refused(tmp_path):
    path = tmp_path / "s.yaml"
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_study(path)
    path.write_text("a: [")
    with pytest.raises(ConfigurationError, match="no YAML"):
        read_study(path)
