"""`python -m benchmarks.fake_cuda SHIM MODULE ARGUMENTS...` runs a module, such as pytest, with the compiled shim loaded."""

import runpy
import sys

from benchmarks.fake_cuda import shim

shim.load(sys.argv[1])
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
