"""Reading checkpoints: every unusable file gives a one-line error, and no file runs code."""

import os
import re
import shutil
import threading
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy
import pytest
import runs
import torch
from fairseq import checkpoint_utils

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.plugin.checkpoints import read_checkpoint
from fairseq_sparsemixer.plugin.checkpoints.reading import changed_by


class Evil:
    """Creates the file `trace` when it is unpickled with pickle."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    """The checkpoint of a run with one update."""
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
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "recursive":
        path.write_bytes(b"\x80\x02" + b"(" * 100_000)
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
    "truncated": "is truncated, damaged, or not a checkpoint",
    "empty": "is truncated, damaged, or not a checkpoint",
    "text": "is (not a checkpoint|truncated)",
    "folder": "is a folder; name a checkpoint file",
    "pipe": "is a pipe or device; name a checkpoint file",
    "recursive": "is (not a checkpoint|truncated)",
    "foreign": "is not a fairseq checkpoint",
    "tensor": "is (not a fairseq checkpoint|truncated, damaged, or not a checkpoint)",
    "malicious": r"holds more than tensors and settings \(\w+.system\): not loaded, as that would run code",
    "malicious, old format": r"holds more than tensors and settings \(\w+.system\): not loaded, as that would run code",
}


@pytest.mark.parametrize("kind", SENTENCES)
def test_an_unusable_file_gives_a_one_line_error_and_runs_no_code(kind, trained, tmp_path):
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


@pytest.mark.parametrize("kind", ["truncated", "malicious", "pipe", "folder"])
def test_training_and_generation_end_with_the_same_error(kind, corpus, trained, tmp_path):
    path = unusable(kind, trained, tmp_path)
    with pytest.raises(SystemExit, match=SENTENCES[kind]) as error:
        runs.train(corpus, tmp_path / "run", "--restore-file", path, updates=1)
    assert error.value.code not in (0, None)
    with pytest.raises(SystemExit, match=SENTENCES[kind]):
        runs.generate(corpus, path, tmp_path / "results")
    assert not (tmp_path / "trace").exists()


def test_a_checkpoint_with_another_number_of_experts_is_refused(corpus, trained, tmp_path):
    with pytest.raises(SystemExit, match="--num-experts 8 does not match the checkpoint, which has 4 experts"):
        runs.train(corpus, tmp_path / "run", "--restore-file", trained, "--num-experts", "8", updates=1)


def test_a_missing_restore_file_is_an_error(corpus, tmp_path):
    with pytest.raises(SystemExit, match="--restore-file .*gone.pt does not exist"):
        runs.train(corpus, tmp_path, "--restore-file", tmp_path / "gone.pt", updates=1)


def test_numpy_numbers_and_arguments_are_read(tmp_path):
    path = str(tmp_path / "old.pt")
    best = {"best": numpy.float64(27.5), "count": numpy.int64(3), "loss": numpy.float32(0.5)}
    torch.save({"model": {}, "extra_state": best, "args": Namespace(arch="transformer")}, path)
    found = read_checkpoint(path)
    assert found["extra_state"] == best and found["args"].arch == "transformer"


def test_torchs_old_file_format_is_read(tmp_path):
    path = str(tmp_path / "old.pt")
    torch.save({"model": {"weight": torch.arange(3)}}, path, _use_new_zipfile_serialization=False)
    assert read_checkpoint(path)["model"]["weight"].tolist() == [0, 1, 2]


def test_one_file_of_a_sharded_checkpoint_is_refused_as_a_model(trained, tmp_path):
    state = read_checkpoint(str(trained))
    state["expert_parallel"].update(size=2)
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(ConfigurationError, match=re.escape("fairseq-sparsemixer reshard IN OUT --portable")):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "part.pt"))


def test_the_common_name_of_a_sharded_checkpoint_is_refused_with_the_command_that_joins_it(corpus, trained, tmp_path):
    shutil.copy(trained, tmp_path / "both-rank-0.pt")
    path = tmp_path / "both.pt"
    sentence = f"{path} is a checkpoint in several files ({tmp_path / 'both-rank-0.pt'}, ...); make one of them:"
    command = re.escape(f"{sentence} fairseq-sparsemixer reshard {path} OUT --portable")
    with pytest.raises(ConfigurationError, match=command):
        read_checkpoint(str(path))
    with pytest.raises(ConfigurationError, match=command):
        runs.generate(corpus, path, tmp_path / "results")
    with pytest.raises(OSError, match="Model file not found"):  # fairseq's own
        runs.generate(corpus, tmp_path / "gone.pt", tmp_path / "results")


CHANGES = {
    "the layout is a list": ({"expert_parallel": [1]}, "its expert_parallel is a list, not a dict"),
    "the layout has text for a size": ({"expert_parallel": {"size": "two"}}, "its expert_parallel is file 0 of 'two'"),
    "the layout has no such file": ({"expert_parallel": {"size": 2, "index": 2}}, "its expert_parallel is file 2 of 2"),
    "the layout has text for a save": ({"expert_parallel": {"size": 2, "save": "x"}}, "is of save 'x', which is not a number"),
    "the layout has text for indices": ({"expert_parallel": {"optimizer": "all"}}, "with the optimizer indices 'all'"),
    "the optimizer is a list": ({"last_optimizer_state": [1]}, "its last_optimizer_state is a list, not a dict"),
    "its states are numbers": ({"last_optimizer_state": {"state": {0: 5}}}, "its last_optimizer_state is without"),
    "its groups are a number": ({"last_optimizer_state": {"param_groups": 3}}, "its last_optimizer_state is without"),
    "the history is text": ({"optimizer_history": "long"}, "its optimizer_history is a str, not a list"),
    "its updates are text": ({"optimizer_history": [{"num_updates": "many"}]}, "its optimizer_history is not a list of what"),
    "the extra state is text": ({"extra_state": "none"}, "its extra_state is a str, not a dict"),
    "the EMA is text": ({"extra_state": {"ema": "x"}}, "its ema is not a dictionary of tensors"),
    "the EMA is of another model": (
        {"model": {"w": torch.ones(2)}, "extra_state": {"ema": {"w": torch.ones(3)}}},
        r"its ema is of another model: w is \(3,\), not \(2,\)",
    ),
    "the EMA has text": (
        {"model": {"w": torch.ones(2)}, "extra_state": {"ema_fp32_params": {"w": "x"}}},
        r"its ema_fp32_params is of another model: w is None, not \(2,\)",
    ),
    "the position is a number": ({"extra_state": {"train_iterator": 3}}, "its train_iterator is a int, not a dict"),
    "the epoch is text": ({"extra_state": {"train_iterator": {"epoch": "x"}}}, "its train_iterator is at epoch 'x'"),
    "the model is a number": ({"model": 3}, "'model' is missing or wrong"),
    "there is no model": ({"model": None}, "'model' is missing or wrong"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_an_entry_of_the_wrong_type_is_named(kind, tmp_path):
    change, sentence = CHANGES[kind]
    path = str(tmp_path / "m.pt")
    torch.save({"model": {}, "optimizer_history": [{}], "extra_state": {}, **change}, path)
    for read in (read_checkpoint, checkpoint_utils.load_checkpoint_to_cpu):
        with pytest.raises(ConfigurationError, match=f"m.pt is not a fairseq checkpoint: .*{sentence}.*; use another file"):
            read(path)


ROUTER = "encoder.layers.0.fc1.moe.gate.projection.weight"


def moments_of(state, name):
    """The entry of a parameter in Adam's state, which has the model's parameters in their order."""
    names = [other for other in state["model"] if other not in ("encoder.version", "decoder.version") and "_float" not in other]
    return state["last_optimizer_state"]["state"][names.index(name)]


RUNS = {
    "a moment of another shape": (
        lambda state: moments_of(state, ROUTER).update(exp_avg=torch.ones(3)),
        rf"the optimizer state in .*m.pt does not fit parameter {ROUTER}: exp_avg is \(3,\), not \(4, 16\);"
        " use another checkpoint, or load only the weights with --reset-optimizer --reset-lr-scheduler --reset-meters$",
    ),
    "a moment that would be repeated": (
        lambda state: moments_of(state, ROUTER).update(exp_avg_sq=torch.ones(1, 16)),
        rf"{ROUTER}: exp_avg_sq is \(1, 16\), not \(4, 16\)",
    ),
    "a moment that is a number": (lambda state: moments_of(state, ROUTER).update(exp_avg=5), rf"{ROUTER}: exp_avg is int"),
    "no moment": (lambda state: moments_of(state, ROUTER).pop("exp_avg"), f"{ROUTER}: it has no exp_avg, which others have"),
    "a step in words": (lambda state: moments_of(state, ROUTER).update(step="x"), f"{ROUTER}: its step is not a number"),
    "no model": (lambda state: state.pop("model"), "m.pt is not a fairseq checkpoint: 'model' is missing"),
    "another criterion": (
        lambda state: state["optimizer_history"][-1].update(criterion_name="x"),
        "m.pt does not fit this run .Criterion does not match.*--reset-optimizer",
    ),
    "another model": (lambda state: state["model"].update(odd=torch.ones(2)), "m.pt does not fit this run .*odd"),
    "no cfg": (lambda state: state["cfg"].pop("distributed_training"), "m.pt .*distributed_training"),
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_checkpoint_that_does_not_fit_the_run_gives_a_one_line_error(kind, corpus, trained, tmp_path):
    change, sentence = RUNS[kind]
    state = read_checkpoint(str(trained))
    change(state)
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(ConfigurationError, match=sentence) as error:
        runs.train(corpus, tmp_path / "run", "--restore-file", tmp_path / "m.pt", updates=2)
    assert "\n" not in str(error.value)


def test_reading_a_checkpoint_does_not_affect_torch_load_in_other_threads(trained, tmp_path):
    torch.save({"theirs": Path("x")}, tmp_path / "theirs.pt")
    before, upgrade, found = torch.load, checkpoint_utils._upgrade_state_dict, []

    def read_theirs():
        found.append(torch.load(str(tmp_path / "theirs.pt"), weights_only=False, mmap=True, map_location="cpu"))

    def read_in_between(state):
        thread = threading.Thread(target=read_theirs)
        thread.start()
        thread.join()
        assert torch.load is before
        return upgrade(state)

    with patch.object(checkpoint_utils, "_upgrade_state_dict", read_in_between):
        for on_all_ranks in (False, True):
            checkpoint_utils.load_checkpoint_to_cpu(str(trained), load_on_all_ranks=on_all_ranks)
    assert found == [{"theirs": Path("x")}] * 2


def test_threads_that_read_concurrently_get_their_own_files(tmp_path):
    paths = [str(tmp_path / f"{number}.pt") for number in range(4)]
    for number, path in enumerate(paths):
        history = [{"num_updates": number, "lr_scheduler_state": {}}]
        torch.save({"model": {}, "optimizer_history": history, "extra_state": {"train_iterator": {"epoch": 1}}}, path)

    def read(number):
        with changed_by(lambda state: {**state, "changed": number}) if number % 2 else nullcontext():
            state = checkpoint_utils.load_checkpoint_to_cpu(paths[number], load_on_all_ranks=number > 1)
        return state["optimizer_history"][0]["num_updates"], state.get("changed")

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, [0, 1, 2, 3] * 10)) == [(0, None), (1, 1), (2, None), (3, 3)] * 10


def test_a_mismatch_is_an_exception_for_library_callers(trained, tmp_path):
    state = read_checkpoint(str(trained))
    state["model"].pop("encoder.layers.0.fc1.moe.gate.projection.weight")
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(ConfigurationError, match="the router of the flags has") as error:
        checkpoint_utils.load_model_ensemble([str(tmp_path / "m.pt")])
    assert isinstance(error.value, Exception)  # a bare SystemExit is not an Exception
