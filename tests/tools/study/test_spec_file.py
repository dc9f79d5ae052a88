"""Studies with a base study."""

from pathlib import Path

import pytest
import yaml

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.tools.study.spec import read_study
from fairseq_sparsemixer.tools.study.spec_file import merged, read_spec_file

BASE = {
    "title": "the base", "data": "bin", "flags": {"task": "translation", "lr": 0.1, "adam-betas": [1, 2]}, "num-experts": [4, 8],
    "variants": {"dense": {"router": "dense"}, "switch": {"router": "switch", "lr": 0.5}}, "seeds": [1, 2], "baseline": "switch",
    "test": {"metric": "bleu", "reference": "test.de", "languages": "test.en", "flags": {"beam": 5}},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with the study base.yaml, its data and its reference."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "test.de").write_text("gut\n")
    (tmp_path / "test.en").write_text("<2de> good\n")
    return write(tmp_path / "base.yaml", BASE).parent


def write(path: Path, content) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def test_a_study_inherits_what_it_does_not_set(folder):
    own = {
        "base": "base.yaml",
        "title": "the heir",
        "flags": {"lr": 0.2},
        "variants": {"ours": {"router": "sparsemixer"}},
        "seeds": [3],
    }
    base, heir = read_study(folder / "base.yaml"), read_study(write(folder / "heir.yaml", own))
    assert (heir.title, heir.seeds, heir.num_experts, heir.data) == ("the heir", [3], [4, 8], base.data)
    assert heir.flags == {"task": "translation", "lr": 0.2, "adam-betas": [1, 2]} and heir.test == base.test
    assert heir.routers == {**base.routers, "ours": {"router": "sparsemixer"}}


def test_null_removes_a_key_of_the_base(folder):
    own = {"base": "base.yaml", "flags": {"lr": None}, "variants": {"dense": None, "switch": {"lr": None}}, "test": None}
    heir = read_study(write(folder / "heir.yaml", own))
    assert heir.routers == {"switch": {"router": "switch"}} and "lr" not in heir.flags and heir.test is None


@pytest.mark.parametrize("base, heir, result", [
    ({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}}, {"a": {"b": 1, "c": 3}}),
    ({"a": {"b": {"c": 1, "d": 2}}}, {"a": {"b": {"c": None}}}, {"a": {"b": {"d": 2}}}),
    ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
    ({"a": {"b": 1}}, {"a": 2}, {"a": 2}),
    ({"a": 1}, {"a": {"b": 2}}, {"a": {"b": 2}}),
    ({}, {"a": None}, {"a": None}),
])  # fmt: skip
def test_mappings_are_merged_and_other_values_replaced(base, heir, result):
    before = repr(base)
    assert merged(base, heir) == result and repr(base) == before


def test_paths_are_relative_to_the_file_of_the_chain_that_has_them(folder):
    write(folder / "below" / "middle.yaml", {"base": "../base.yaml", "title": "the middle"})
    heir = read_study(write(folder / "other" / "heir.yaml", {"base": "../below/middle.yaml", "seeds": [7]}))
    assert (heir.title, heir.seeds, heir.data) == ("the middle", [7], (folder / "bin").resolve())
    assert heir.test.reference == (folder / "test.de").resolve() and heir.test.languages == (folder / "test.en").resolve()


@pytest.mark.parametrize("old, new", [("base", "heir"), ("heir", "base")])
def test_variants_can_be_called_routers_in_either_file(folder, old, new):
    own = {"base": "base.yaml", "variants": {"ours": {"router": "sparsemixer"}}}
    for name, content in (("base", BASE), ("heir", own)):
        content = dict(content)
        if name == old:
            content["routers"] = content.pop("variants")
        write(folder / f"{name}.yaml", content)
    assert list(read_study(folder / "heir.yaml").routers) == ["dense", "switch", "ours"]


@pytest.mark.parametrize("content, complaint", [
    ({"base": 3}, "has base: 3; give the path of the study that it builds on"),
    ({"base": ["base.yaml"]}, "has base: .*; give the path"),
    ({"base": None}, "has base: None; give the path"),
    ({"base": ""}, "has base: ; give the path"),
    ({"base": "none.yaml"}, "has base: none.yaml, and there is no file .*none.yaml; give the path of a study, relative"),
    ({"base": "bin"}, "has base: bin, and there is no file"),
    ({"base": "heir.yaml"}, "has base: heir.yaml, which builds on this file itself; remove base from one of them"),
    ({"routers": {}, "variants": {}}, "has routers and variants, two names for the same key; use variants only"),
    ({"base": "base.yaml", "variants": {"switch": 3}}, "has variants: switch: 3; give keys with values"),
    ({"base": "base.yaml", "flags": 3}, "has flags: 3; give keys with values"),
    ({"base": "base.yaml", "variants": {"switch": None}}, "has baseline: switch, which is not one of its variants"),
])  # fmt: skip
def test_a_bad_base_gives_a_one_line_error_with_the_file(folder, content, complaint):
    path = write(folder / "heir.yaml", content)
    with pytest.raises(ConfigurationError, match=f"the study {path} {complaint}") as error:
        read_study(path)
    assert "\n" not in str(error.value)


def test_a_cycle_of_bases_names_the_file_that_closes_it(folder):
    write(folder / "a.yaml", {"base": "b.yaml"})
    write(folder / "b.yaml", {"base": "a.yaml"})
    with pytest.raises(ConfigurationError, match="b.yaml has base: a.yaml, which builds on this file itself"):
        read_spec_file(folder / "a.yaml")


def test_an_unreadable_base_is_named_in_the_error(folder):
    write(folder / "base.yaml", "a: [")
    with pytest.raises(ConfigurationError, match="base.yaml is not YAML"):
        read_study(write(folder / "heir.yaml", {"base": "base.yaml"}))
