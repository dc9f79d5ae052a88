"""The Triton kernels in Triton's interpreter: test_kernel_ops.py again, in a process that sets TRITON_INTERPRET=1."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fairseq_sparsemixer.moe.kernels import choice

pytestmark = pytest.mark.slow
TESTS = Path(__file__).with_name("test_kernel_ops.py")


@pytest.mark.skipif(not choice.has_triton(), reason="Triton is not installed; pip install triton has it for Linux")
def test_the_kernels_pass_the_tests_of_the_formulas():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=", str(TESTS)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    print(done.stdout[-6000:], done.stderr[-2000:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
