"""Logging after the package is imported."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_importing_the_package_does_not_change_the_root_logger():
    """fairseq sets it to DEBUG, which would fill the output of every command with messages of other libraries."""
    program = "import logging, fairseq_sparsemixer; root = logging.getLogger(); print(root.level, root.handlers)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "30 []\n"
