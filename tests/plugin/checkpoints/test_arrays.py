"""numpy arrays in checkpoints: numeric arrays, as stored by the meters of --eval-bleu, are read; all others are refused."""

import copy
import io
import json
import pickle
from pathlib import Path
from unittest.mock import patch

import numpy
import pytest
import runs
import torch
from fairseq.logging import meters, metrics
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase

from fairseq_sparsemixer.cli import main
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.plugin.checkpoints import arrays, read_checkpoint

ARRAYS = [
    numpy.array([7, 5, 3, 1]), numpy.array([1.5, numpy.nan]), numpy.zeros((2, 0, 3)), numpy.array(3), numpy.array([True, False]),
    numpy.arange(6, dtype="f4").reshape(2, 3).T, numpy.arange(6, dtype=">i2")[::2], numpy.array([1 + 2j]),
    numpy.array([1, 2], "u1"), numpy.bool_(True),
    numpy.asfortranarray(numpy.arange(6.0).reshape(2, 3)), numpy.float16(2.5), numpy.float64(27.5),
    numpy.uint8(9),
]  # fmt: skip

# fairseq 0.12.2's own transformer has a fused path that fails in torch 2, so it cannot generate from a checkpoint
FUSED = "can_use_fastpath" in TransformerEncoderLayerBase.__init__.__code__.co_names


def test_bytes_are_read_only_in_the_encoding_of_pickles():
    (encode,) = [function for function in arrays.safe_globals() if function.__module__ == "_codecs"]
    assert encode("\xe9\x00", "latin1") == b"\xe9\x00"
    for text, encoding in (("a", "utf-16"), ("a", None), (b"a", "latin1")):
        with pytest.raises(arrays.NoNumbers):
            encode(text, encoding)


def saved(value, folder: Path, **options) -> str:
    path = str(folder / "m.pt")
    torch.save({"model": {}, "extra_state": {"value": value}}, path, **options)
    return path


@pytest.mark.parametrize("value", ARRAYS, ids=str)
@pytest.mark.parametrize("zipped", [True, False])
def test_arrays_and_numbers_are_read_back_unchanged(value, zipped, tmp_path):
    found = read_checkpoint(saved(value, tmp_path, _use_new_zipfile_serialization=zipped))["extra_state"]["value"]
    numpy.testing.assert_array_equal(found, value)
    assert found.shape == value.shape and found.dtype.newbyteorder("=") == value.dtype.newbyteorder("=")


def test_files_written_with_numpy_1_are_read(tmp_path):
    path = tmp_path / "m.pt"
    state = {"model": {}, "extra_state": {"sum": numpy.arange(3), "n": numpy.float64(2)}}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    found = read_checkpoint(str(path))["extra_state"]
    assert found["sum"].tolist() == [0, 1, 2] and found["n"] == 2


def test_an_array_that_was_read_is_saved_and_copied_as_a_plain_array(tmp_path):
    value = read_checkpoint(saved(numpy.arange(4), tmp_path))["extra_state"]["value"]
    buffer = io.BytesIO()
    torch.save([value, value + 1, copy.deepcopy(value)], buffer)
    buffer.seek(0)
    plain = torch.load(buffer, weights_only=False)
    assert [type(array) for array in plain] == [numpy.ndarray] * 3 and plain[1].tolist() == [1, 2, 3, 4]
    assert type(pickle.loads(pickle.dumps(value, protocol=5))) is numpy.ndarray
    assert numpy.array([value, value]).shape == (2, 4) and torch.from_numpy(value.copy()).sum() == 6


REFUSED = [
    numpy.array([object()], dtype=object), numpy.array([{"a": 1}]), numpy.array(["text"]), numpy.array([b"text"]),
    numpy.array([(1, 2.0)], dtype="i4,f8"), numpy.array([], dtype="datetime64[s]"), numpy.dtype("O"), numpy.longdouble(1),
]  # fmt: skip


@pytest.mark.parametrize("value", REFUSED, ids=range(len(REFUSED)))
def test_arrays_of_other_types_are_refused(value, tmp_path):
    with pytest.raises(ConfigurationError, match="m.pt holds more than tensors and settings .*if you trust it, set TORCH_FORCE"):
        read_checkpoint(saved(value, tmp_path))


class Call:
    """Pickles as a function call and the state to set on its result."""

    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.parts


def forged(shape, code, content):
    """An array in numpy's pickle format, with the given shape, type code and content."""
    empty = numpy.zeros(0).__reduce__()[0], numpy.ndarray, (0,), b"b"
    return lambda: Call(*empty, state=(1, shape, Call(numpy.dtype, code), False, content))


FORGED = {
    "an array over memory at an address from the file": lambda: Call(numpy.ndarray, (1,), "O", b"A" * 8),
    "objects as bytes": forged((1,), "O", b"A" * 8),
    "too few bytes": forged((9,), "i8", b"A" * 8),
    "a negative shape": forged((-1,), "i8", b""),
    "an endless shape": forged((2**40, 2**40), "i8", b""),
    "text for bytes": forged((1,), "i8", "AAAAAAAA"),
    "bytes by number": lambda: Call(bytes, 10**12),
    "a number of objects": lambda: Call(numpy.float64(0).__reduce__()[0], Call(numpy.dtype, "O"), b"A" * 8),
    "a truncated number": lambda: Call(numpy.float64(0).__reduce__()[0], Call(numpy.dtype, "f8"), b"A"),
    "a type with flags": lambda: Call(numpy.dtype, "i8", False, True, state=(3, "<", None, None, None, -1, -1, 63)),
    "a type with fields": lambda: Call(numpy.dtype, "i8", False, True, state=(3, "<", None, ("a",), {}, 8, 1, 0)),
    "a type without order": lambda: Call(numpy.dtype, "i8", state=(3,)),
}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_arrays_give_an_error_or_are_empty(kind, tmp_path):
    try:
        value = read_checkpoint(saved(FORGED[kind](), tmp_path))["extra_state"]["value"]
    except ConfigurationError as error:
        assert "m.pt" in str(error) and "\n" not in str(error)
    else:
        assert value.size == 0
    assert numpy.arange(3).tolist() == [0, 1, 2] and numpy.dtype("i8").isnative  # numpy's own types are unchanged


def test_a_user_can_trust_a_file_with_other_objects(tmp_path, monkeypatch):
    path = saved(Path("data"), tmp_path)
    with pytest.raises(ConfigurationError, match=r"\(pathlib\S*\): not loaded, .* set TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1"):
        read_checkpoint(path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert read_checkpoint(path)["extra_state"]["value"] == Path("data")


def test_meters_of_the_translation_task_continue_counting(tmp_path):
    with metrics.aggregate("valid", new_root=True) as valid:
        metrics.log_scalar("_bleu_counts", numpy.array([5, 4, 3, 2]))
        metrics.log_scalar("_bleu_sys_len", 12)
        metrics.log_derived("bleu", lambda logged: float(logged["_bleu_counts"].sum[0]))
    loaded = meters.MetersDict()
    loaded.load_state_dict(read_checkpoint(saved(valid.state_dict(), tmp_path))["extra_state"]["value"])
    loaded["_bleu_counts"].update(numpy.array([1, 1, 1, 1]))
    assert loaded["_bleu_counts"].sum.tolist() == [6, 5, 4, 3] and loaded["_bleu_sys_len"].sum == 12


@pytest.mark.slow
@pytest.mark.parametrize("moe, tokenised", [(True, False), (False, True)])
def test_a_run_with_eval_bleu_resumes_and_its_checkpoint_can_be_used(moe, tokenised, corpus, tmp_path, capsys):
    flags = ["--eval-bleu", "--eval-bleu-args", json.dumps({"beam": 1, "max_len_b": 5}), "--best-checkpoint-metric", "bleu"]
    flags += ["--maximize-best-checkpoint-metric", "--validate-interval-updates", 1]
    flags += ["--eval-tokenized-bleu"] if tokenised else ["--eval-bleu-detok", "space"]
    if not moe:
        flags += ["--arch", "transformer_tiny", "--criterion", "cross_entropy"]
    with patch.object(runs, "SMALL", [flag for flag in runs.SMALL if flag != "--disable-validation"]):
        for updates in (1, 2):
            assert len(runs.train(corpus, tmp_path / "run", *flags, updates=updates, moe=moe)) == 1
    for name in ("checkpoint_last.pt", "checkpoint_best.pt"):
        path = tmp_path / "run" / name
        assert b"_bleu_counts" in path.read_bytes()
        if moe or not FUSED:
            assert runs.generate(corpus, path, tmp_path / "results")
        assert main(["inspect", str(path)]) == 0
    if not moe:
        assert main(["upcycle", str(path), str(tmp_path / "moe.pt"), "--num-experts", "2", "--router", "switch"]) == 0
        assert runs.generate(corpus, tmp_path / "moe.pt", tmp_path / "upcycled")
