"""The Triton kernels compile to machine code for every GPU that they are chosen for; this needs no GPU."""

import importlib

import pytest
import torch

from fairseq_sparsemixer.moe.kernels import choice, self_check

pytestmark = [
    pytest.mark.slow,
    pytest.mark.gpu,
    pytest.mark.skipif(not choice.has_triton(), reason="Triton is not installed; pip install triton has it for Linux"),
]
CASES = [(80, torch.float16), (90, torch.bfloat16), (100, torch.bfloat16), (120, torch.float16)]
SHARED_MEMORY = 99 << 10  # bytes that a block may use on compute capability 8.6, 8.9 and 12.0, the least of all
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32"}
WIDTH, HIDDEN = 64, 96


def compiled(function, arguments, options, capability):
    """Compile a kernel for these arguments, as a launch would: integers are 32 bits wide, and 1 is a constant."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    signature, constants, attributes = {}, {}, {}
    for place, (parameter, value) in enumerate(zip(function.params, arguments)):
        if parameter.is_constexpr or (value == 1 if type(value) is int else False):
            signature[parameter.name], constants[(place,)] = "constexpr", value
            continue
        if torch.is_tensor(value):
            signature[parameter.name] = "*" + ("i1" if value.dtype == torch.bool else NAMES[value.dtype])
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
        if torch.is_tensor(value) or (isinstance(value, int) and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, attributes)
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def launches(dtype):
    """The kernels that the examples of the check at first use would launch, with arguments and options, by op."""
    from triton.runtime.jit import JITFunction

    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", lambda self, *args, grid, warmup, **options: found.append((self, args, options)))
        for name, arguments in self_check.examples(torch.device("cpu"), dtype, WIDTH, HIDDEN):
            importlib.import_module(f"fairseq_sparsemixer.moe.kernels.{name}").run(*arguments)
            assert found[-1][0].__module__.endswith(name)
    return found


@pytest.mark.parametrize("capability, dtype", CASES)
def test_every_kernel_compiles_and_fits_into_shared_memory(capability, dtype):
    known = {}
    for function, arguments, options in launches(dtype):
        types = tuple(value.dtype if torch.is_tensor(value) else value for value in arguments)
        if (function, types) in known:
            continue
        known[function, types] = compiled(function, arguments, options, capability)
        assert known[function, types].metadata.shared <= SHARED_MEMORY, function.__module__
