"""Two clones on one machine: a clone uses only its own code."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

ELSEWHERE = """
import sys
from importlib.machinery import PathFinder

class Editable:  # like setuptools' finder for `pip install -e` of the clone at ROOT
    @staticmethod
    def find_spec(name, path=None, target=None):
        known = {{"fairseq_sparsemixer": [{root!r}], "fairseq_sparsemixer.criterions": [{root!r}]}}
        return PathFinder.find_spec(name.rpartition(".")[2], known[name]) if name in known else None

sys.meta_path.append(Editable)
sys.modules["fairseq"] = None  # not installed, and not needed here
sys.path.insert(0, {clone!r})
import fairseq_sparsemixer
from importlib.util import find_spec
print(fairseq_sparsemixer.__file__)
print(find_spec("fairseq_sparsemixer.criterions").origin)
"""


@pytest.fixture
def clone(tmp_path):
    """A second clone with the parts needed here."""
    for folder in ("fairseq_sparsemixer", "criterions"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_a_clone_next_to_an_installed_one_uses_its_own_criterions(clone):
    script = ELSEWHERE.format(root=str(ROOT), clone=str(clone))
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        str(clone / "fairseq_sparsemixer" / "__init__.py"),
        str(clone / "criterions" / "__init__.py"),
    ]
