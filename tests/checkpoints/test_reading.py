"""Reading: every unusable file gets one sentence, and no file runs code."""

import os
import re
from argparse import Namespace
from pathlib import Path

import numpy
import pytest
import runs
import torch
from fairseq import checkpoint_utils

from fairseq_sparsemixer.checkpoints import read_checkpoint
from fairseq_sparsemixer.errors import ConfigurationError


class Evil:
    """Unpickled by pickle, it makes the file that it names."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    """The checkpoint of a run of one update."""
    folder = tmp_path_factory.mktemp("trained")
    runs.train(corpus, folder, updates=1)
    return folder / "checkpoint_last.pt"


def unusable(kind: str, trained: Path, folder: Path) -> Path:
    path, content = folder / f"{kind}.pt", trained.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("no checkpoint at all\n")
    elif kind == "foreign":
        torch.save({"state_dict": {"weight": torch.ones(2)}}, path)
    elif kind == "tensor":
        torch.save(torch.ones(2), path)
    elif kind == "malicious":
        torch.save({**read_checkpoint(str(trained)), "task_state": Evil(folder / "trace")}, path)
    elif kind == "malicious, old format":
        torch.save({"model": {}, "args": Evil(folder / "trace")}, path, _use_new_zipfile_serialization=False)
    return path


SENTENCES = {
    "missing": "does not exist",
    "truncated": "is cut off, damaged, or no checkpoint",
    "empty": "is cut off, damaged, or no checkpoint",
    "text": "is (no checkpoint|cut off)",
    "foreign": "is no checkpoint of fairseq",
    "tensor": "is (no checkpoint of fairseq|cut off, damaged, or no checkpoint)",
    "malicious": r"holds more than tensors and settings \(\w+.system\): not loaded, as that would run code",
    "malicious, old format": r"holds more than tensors and settings \(\w+.system\): not loaded, as that would run code",
}


@pytest.mark.parametrize("kind", SENTENCES)
def test_an_unusable_file_gets_one_sentence_and_runs_no_code(kind, trained, tmp_path):
    path = str(unusable(kind, trained, tmp_path))
    for read in (
        read_checkpoint,
        checkpoint_utils.load_checkpoint_to_cpu,
        lambda path: checkpoint_utils.load_checkpoint_to_cpu(path, load_on_all_ranks=True),
    ):
        with pytest.raises(ConfigurationError, match=SENTENCES[kind]) as error:
            read(path)
        assert path in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("kind", ["truncated", "malicious"])
def test_training_and_generation_end_with_that_sentence(kind, corpus, trained, tmp_path):
    path = unusable(kind, trained, tmp_path)
    with pytest.raises(SystemExit, match=SENTENCES[kind]) as error:
        runs.train(corpus, tmp_path / "run", "--restore-file", path, updates=1)
    assert error.value.code not in (0, None)
    with pytest.raises(SystemExit, match=SENTENCES[kind]):
        runs.generate(corpus, path, tmp_path / "results")
    assert not (tmp_path / "trace").exists()


def test_a_checkpoint_of_other_experts_gets_one_sentence(corpus, trained, tmp_path):
    with pytest.raises(SystemExit, match="--num-experts 8 does not match the checkpoint, which has 4 experts"):
        runs.train(corpus, tmp_path / "run", "--restore-file", trained, "--num-experts", "8", updates=1)


def test_a_restore_file_that_is_missing_does_not_start_from_scratch(corpus, tmp_path):
    with pytest.raises(SystemExit, match="--restore-file .*gone.pt does not exist"):
        runs.train(corpus, tmp_path, "--restore-file", tmp_path / "gone.pt", updates=1)


def test_numbers_of_numpy_and_arguments_are_data(tmp_path):
    path = str(tmp_path / "old.pt")
    best = {"best": numpy.float64(27.5), "count": numpy.int64(3), "loss": numpy.float32(0.5)}
    torch.save({"model": {}, "extra_state": best, "args": Namespace(arch="transformer")}, path)
    found = read_checkpoint(path)
    assert found["extra_state"] == best and found["args"].arch == "transformer"


def test_the_format_of_old_torch_is_read(tmp_path):
    path = str(tmp_path / "old.pt")
    torch.save({"model": {"weight": torch.arange(3)}}, path, _use_new_zipfile_serialization=False)
    assert read_checkpoint(path)["model"]["weight"].tolist() == [0, 1, 2]


def test_one_file_of_a_sharded_checkpoint_is_not_taken_for_a_model(trained, tmp_path):
    state = read_checkpoint(str(trained))
    state["expert_parallel"].update(size=2)
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(ConfigurationError, match=re.escape("fairseq-sparsemixer reshard IN OUT --portable")):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "part.pt"))
