"""The table of patches to fairseq: complete, applied, and idempotent."""

import re
from importlib import import_module
from pathlib import Path

import fairseq_cli.train
import pytest
from fairseq import checkpoint_utils, options
from fairseq.distributed import utils

import fairseq_sparsemixer
from fairseq_sparsemixer.plugin import patches

PACKAGE = Path(fairseq_sparsemixer.__file__).parent
# assignments to a module or class of another library: `checkpoint_utils.PathManager = ...`
LIBRARIES = r"fairseq_cli\.train|checkpoint_utils|utils|options|module|numpy|dist|SequenceGenerator|NanDetector"
ASSIGNED = re.compile(rf"^\s+((?:{LIBRARIES})\.[\w.]+(?:, \w+\.\w+)*) = ")


def test_every_patch_names_its_target_reason_and_end():
    for patch in patches.PATCHES:
        assert patch.target and patch.why and patch.until
        assert not patch.why.endswith(".") and not patch.until.endswith(".")


def test_every_assignment_to_another_library_is_in_the_table():
    targets = " ".join(patch.target for patch in patches.PATCHES)
    for path in (PACKAGE / "plugin").rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            for assigned in ASSIGNED.findall(line):
                for name in assigned.split(", "):
                    assert name.split(".")[-1].replace("__defaults__", "__init__") in targets, f"{path}: {line.strip()}"


OURS = {
    "fairseq.checkpoint_utils.load_checkpoint_to_cpu": lambda: checkpoint_utils.load_checkpoint_to_cpu,
    "fairseq.checkpoint_utils.torch_persistent_save": lambda: checkpoint_utils.torch_persistent_save,
    "fairseq_cli.train.main": lambda: fairseq_cli.train.main,
    "fairseq_cli.train.Trainer": lambda: fairseq_cli.train.Trainer,
    "fairseq.distributed.utils.distributed_init": lambda: utils.distributed_init,
    "fairseq.options.parse_args_and_arch": lambda: options.parse_args_and_arch,
}


@pytest.mark.parametrize("name", OURS)
def test_a_patch_is_applied_and_applying_again_changes_nothing(name):
    ours = OURS[name]()
    assert any(patch.target.startswith(name) for patch in patches.PATCHES)
    code = getattr(ours, "__code__", None)
    defined = code.co_filename if code else import_module(ours.__module__).__file__
    assert Path(defined).is_relative_to(PACKAGE)
    patches.apply()
    assert OURS[name]() is ours
