"""The CUDA path on fake tensors: runs cases/ in a process in which torch sees a fake GPU."""

import subprocess
from pathlib import Path

import pytest

from benchmarks.fake_cuda import shim as fake_cuda

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
CASES = Path(__file__).parent / "cases"


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    """The compiled library; skips the test if it cannot be built."""
    reason = fake_cuda.why_not()
    if reason:
        pytest.skip(reason)
    try:
        return fake_cuda.build(tmp_path_factory.mktemp("shim"))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the shim does not compile against this torch: {error.stderr.splitlines()[0] if error.stderr else error}")


@pytest.mark.parametrize("case", sorted(path.name for path in CASES.glob("case_*.py")))
def test_cases(case, shim):
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore", "-o", "addopts="]
    command = fake_cuda.command(shim, "pytest", *options, str(CASES / case))
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout[-6000:], done.stderr[-2000:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
