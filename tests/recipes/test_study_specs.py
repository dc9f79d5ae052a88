"""The recipes' studies: each can be read, and fairseq-train accepts the flags of each of its routers."""

import os
import shutil
from pathlib import Path

import pytest
from fairseq import options

from fairseq_sparsemixer.tools.study.commands import train_command
from fairseq_sparsemixer.tools.study.spec import check_flags, read_study
from fairseq_sparsemixer.tools.study.spec_file import read_spec_file

ROOT = Path(__file__).resolve().parents[2]
USER_DIR = Path("recipes", "multilingual", "sparsemixer_parts")
SPECS = sorted(ROOT.glob("recipes/*/study*.yaml"))


@pytest.mark.parametrize("spec", SPECS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_fairseq_train_accepts_the_flags_of_a_recipes_study(spec, tmp_path):
    for other in (spec.parent, *(ROOT / "recipes" / name for name in ("quickstart", "multilingual"))):  # with its base specs
        shutil.copytree(
            other, tmp_path / other.relative_to(ROOT), dirs_exist_ok=True, ignore=shutil.ignore_patterns(USER_DIR.name)
        )
    (tmp_path / USER_DIR).symlink_to(ROOT / USER_DIR)  # fairseq imports one of a name
    copy = tmp_path / spec.relative_to(ROOT)
    content = read_spec_file(copy)
    Path(os.path.realpath(copy.parent / content["data"])).mkdir(parents=True)  # made by `prepare`
    for name in {"reference", "languages"} & set(content.get("test") or {}):
        file = Path(os.path.realpath(copy.parent / content["test"][name]))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("<2de> Ein Satz.\n", encoding="utf-8")
    study = read_study(copy)
    check_flags(copy, study)
    for router in study.routers:
        run = next(run for run in [*study.runs(), *study.trials()] if run.router == router)  # one to tune has no runs yet
        command = train_command(study, run, tmp_path / run.name)[1:]
        parser = options.get_training_parser()
        assert options.parse_args_and_arch(parser, command, modify_parser=None).router == run.flags["router"]


def test_the_studies_are_found():
    assert len(SPECS) >= 4
