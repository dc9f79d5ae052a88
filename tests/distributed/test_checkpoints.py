"""Checkpoints of runs with sharded experts: fairseq-train on real ranks, stopped and resumed."""

import json
import os
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List
from unittest.mock import patch

import pytest
import runs
import torch
from fairseq import checkpoint_utils
from fairseq.tasks import FairseqTask
from ranks import Rank, collect, free_port, rank_number, run_ranks, start_ranks
from runs import initialised

import fairseq_sparsemixer
from fairseq_sparsemixer.plugin.checkpoints import read_checkpoint
from fairseq_sparsemixer.plugin.checkpoints.resharding import reshard

pytestmark = pytest.mark.distributed

BEFORE, AFTER = 3, 5  # updates at which the run stops, and at which the resumed run stops
FLAGS = ("--store-ema", "--ema-fp32", "--ema-decay", "0.9")


def train_one_rank(log: Path, data: Path, save_dir: Path, flags: tuple, options: Dict[str, Any]) -> List[float]:
    with open(log, "a") as out:
        os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
        return runs.train(data, save_dir, *flags, **options)


def start(data: Path, save_dir: Path, *flags, updates: int, ranks: int, last: tuple = (train_one_rank,)) -> List[Rank]:
    """Start fairseq-train on `ranks` ranks. The last one runs last[0](*last[1:], *arguments of train_one_rank) instead."""
    save_dir.mkdir(exist_ok=True)
    port, started = free_port(), []
    for rank in range(ranks):
        options = dict(updates=updates, ranks=ranks, rank=rank, port=port)
        function, *first = last if rank == ranks - 1 else (train_one_rank,)
        log = save_dir / f"log.{rank}"
        started += start_ranks(1, function, *first, log, data, save_dir, flags, options, group=False)
    return started


def train(data: Path, save_dir: Path, *flags, updates: int, ranks: int) -> List[float]:
    """Train on `ranks` ranks; the losses of its updates, from rank 0. Raises AssertionError with rank 0's error."""
    return collect(start(data, save_dir, *flags, updates=updates, ranks=ranks), deadline=100)[0]


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> List[float]:
    """The losses of an uninterrupted run on two ranks."""
    return train(corpus, tmp_path_factory.mktemp("whole") / "run", *FLAGS, updates=AFTER, ranks=2)


@pytest.fixture(scope="module")
def portable(corpus, tmp_path_factory) -> Path:
    """A checkpoint written after BEFORE updates by two ranks, each with half of the experts."""
    save_dir = tmp_path_factory.mktemp("stopped") / "run"
    train(corpus, save_dir, *FLAGS, updates=BEFORE, ranks=2)
    return save_dir / "checkpoint_last.pt"


def resume(corpus: Path, checkpoint: Path, save_dir: Path, *flags, ranks: int) -> List[float]:
    return train(corpus, save_dir, "--restore-file", str(checkpoint), *FLAGS, *flags, updates=AFTER, ranks=ranks)


def test_two_ranks_resume_a_run_of_two_ranks(corpus, portable, whole, tmp_path):
    assert resume(corpus, portable, tmp_path / "run", ranks=2) == whole[BEFORE:]


def test_one_process_resumes_a_run_of_two_ranks(corpus, portable, whole, tmp_path):
    losses = resume(corpus, portable, tmp_path / "run", "--update-freq", "2", ranks=1)
    torch.testing.assert_close(losses, whole[BEFORE:], rtol=1e-6, atol=0)


def test_ranks_with_all_experts_resume_a_run_of_sharded_experts(corpus, portable, whole, tmp_path):
    losses = resume(corpus, portable, tmp_path / "run", "--expert-parallel-size", "1", ranks=2)
    torch.testing.assert_close(losses, whole[BEFORE:], rtol=1e-6, atol=0)


def test_the_checkpoint_equals_that_of_one_process(corpus, portable, tmp_path):
    losses = train(corpus, tmp_path / "run", *FLAGS, "--update-freq", "2", updates=BEFORE, ranks=1)
    assert len(losses) == BEFORE
    alone, spread = read_checkpoint(tmp_path / "run" / "checkpoint_last.pt"), read_checkpoint(portable)
    for state in (alone, spread):
        for weights in (state["model"], state["extra_state"]["ema"], state["extra_state"]["ema_fp32_params"]):
            for name in [name for name in weights if name.endswith("k_proj.bias")]:
                del weights[name]  # softmax cancels it: its gradient is rounding error around zero, which Adam follows
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    close(dict(spread["last_optimizer_state"]), dict(alone["last_optimizer_state"]))
    close(initialised(spread["model"]), initialised(alone["model"]))
    for part in ("ema", "ema_fp32_params"):
        close(initialised(spread["extra_state"][part]), initialised(alone["extra_state"][part]))
    assert spread["expert_parallel"] == alone["expert_parallel"]
    paths = {"spread": portable, "alone": tmp_path / "run" / "checkpoint_last.pt"}
    words = {name: [line.split("\t")[2] for line in runs.generate(corpus, path, tmp_path / name)] for name, path in paths.items()}
    assert words["spread"] == words["alone"]


def test_one_process_validates_and_translates_without_further_flags(corpus, portable, tmp_path, capsys):
    from fairseq_cli import interactive, validate

    of_checkpoint = ["--user-dir", Path(fairseq_sparsemixer.__file__).parent, "--path", portable, "--cpu"]
    as_any_model = "--task", "translation", "--batch-size", 8, "--log-format", "json"  # fairseq-validate requires --task
    capsys.readouterr()
    runs.run(validate.cli_main, corpus, *of_checkpoint, *as_any_model)
    (figures,) = re.findall(r"\| valid \| (.*)", capsys.readouterr().out)
    assert float(json.loads(figures)["valid_loss"]) == pytest.approx(bits_a_word(portable), abs=1e-3)

    generated = [line.split("\t")[2] for line in runs.generate(corpus, portable, tmp_path)]
    capsys.readouterr()
    words = ["--input", corpus.parent / "valid.de", "--beam", 2, "--max-len-b", 8]
    runs.run(interactive.cli_main, corpus, *of_checkpoint, *words, "--buffer-size", 8, "--batch-size", 8)
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines() if line.startswith("H-")]
    assert [words for _, _, words in sorted(lines)] == generated and len(generated) == 8


def bits_a_word(checkpoint: Path) -> float:
    """The model's loss on the `valid` split, in bits per word, computed from its probabilities."""
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)])
    task.load_dataset("valid")
    bits = count = 0.0
    for batch in task.get_batch_iterator(task.dataset("valid"), max_sentences=1).next_epoch_itr(shuffle=False):
        probabilities = model.eval()(**batch["net_input"])[0].softmax(-1)
        chosen = probabilities.gather(-1, batch["target"].unsqueeze(-1))
        bits, count = bits - chosen.log2().sum().item(), count + chosen.numel()
    return bits / count


def test_an_average_of_checkpoints_can_be_loaded_and_generates(corpus, portable, tmp_path):
    train(corpus, tmp_path / "run", *FLAGS, updates=1, ranks=2)
    states = [read_checkpoint(str(path)) for path in (portable, tmp_path / "run" / "checkpoint_last.pt")]
    average = {name: (value + states[1]["model"][name]) / 2 for name, value in states[0]["model"].items()}
    torch.save({**states[0], "model": average}, tmp_path / "average.pt")  # like fairseq's scripts/average_checkpoints.py
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(tmp_path / "average.pt")])
    assert torch.equal(model.state_dict()["encoder.layers.0.fc1.moe.experts.weight_in"],
                       average["encoder.layers.0.fc1.moe.experts.weight_in"])  # fmt: skip
    assert len(runs.generate(corpus, tmp_path / "average.pt", tmp_path)) == 8


def test_a_checkpoint_without_optimizer_state_can_start_another_run(corpus, tmp_path):
    train(corpus, tmp_path / "run", "--no-save-optimizer-state", updates=1, ranks=2)
    checkpoint = tmp_path / "run" / "checkpoint_last.pt"
    assert "last_optimizer_state" not in read_checkpoint(str(checkpoint))
    for name, flags in (("tuned", ["--finetune-from-model"]), ("reset", ["--reset-optimizer", "--restore-file"])):
        losses = train(corpus, tmp_path / name, *flags, str(checkpoint), updates=2, ranks=1)
        assert losses


def test_two_ranks_resume_a_model_without_experts(corpus, tmp_path):
    flags = ("--router", "dense")
    losses = train(corpus, tmp_path / "run", *flags, updates=AFTER, ranks=2)
    train(corpus, tmp_path / "stopped", *flags, updates=BEFORE, ranks=2)
    assert train(corpus, tmp_path / "stopped", *flags, updates=AFTER, ranks=2) == losses[BEFORE:]


def test_sharded_checkpoints_resume_only_on_the_same_layout(corpus, whole, tmp_path):
    run = tmp_path / "run"
    train(corpus, run, *FLAGS, "--sharded-checkpoints", updates=BEFORE, ranks=2)
    assert sorted(path.name for path in run.glob("*.pt*")) == ["checkpoint_last-rank-0.pt", "checkpoint_last-rank-1.pt"]
    layouts = [read_checkpoint(run / f"checkpoint_last-rank-{rank}.pt")["expert_parallel"] for rank in range(2)]
    assert [(layout["size"], layout["index"]) for layout in layouts] == [(2, 0), (2, 1)]
    assert layouts[0]["save"] == layouts[1]["save"] is not None

    shutil.copytree(run, tmp_path / "other")
    assert train(corpus, run, *FLAGS, "--sharded-checkpoints", updates=AFTER, ranks=2) == whole[BEFORE:]
    with pytest.raises(AssertionError, match="is a sharded checkpoint .* fairseq-sparsemixer reshard .* --portable"):
        train(corpus, tmp_path / "other", *FLAGS, updates=AFTER, ranks=1)


def test_a_file_that_rank_0_cannot_read_ends_every_rank_with_the_same_error(corpus, tmp_path):
    torch.save({"model": {}, "expert_parallel": {"size": 4}}, tmp_path / "checkpoint_last-rank-0.pt")
    started = start(corpus, tmp_path, "--sharded-checkpoints", updates=1, ranks=2)
    for rank in started:
        with pytest.raises(AssertionError, match="sharded over 4 ranks, but this run has --expert-parallel-size 2"):
            collect([rank], deadline=60)


def train_elsewhere(log: Path, data: Path, save_dir: Path, *args) -> List[float]:
    return train_one_rank(log, data, save_dir / "disk of this node", *args)


def test_a_file_visible_to_some_ranks_only_is_an_error_on_all(corpus, portable, tmp_path):
    shutil.copy(portable, tmp_path)
    for rank in start(corpus, tmp_path, *FLAGS, updates=AFTER, ranks=2, last=(train_elsewhere,)):
        with pytest.raises(AssertionError, match="checkpoint_last.pt is visible to 1 of 2 ranks; put it where all nodes see it"):
            collect([rank], deadline=60)


def killed_on_call(number: int, function: Callable, half: Callable) -> Callable:
    """`function`, which at its n-th call runs `half` instead and kills the process."""
    calls = iter(range(1, 1000))

    def counted(*args):
        if next(calls) < number:
            return function(*args)
        half(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    return counted


def half_a_file(_, path) -> None:
    Path(path).write_bytes(b"PK" + bytes(1000))


# moments at which rank 1 dies in its third save; each save writes a file, renames three times and copies once
MOMENTS = {
    "half of its file is written": ("torch.save", torch.save, 3, half_a_file),
    "rank 0 has renamed its file, rank 1 has not": ("os.replace", os.replace, 8, lambda *_: None),
    "half of the copy is written": ("shutil.copyfile", shutil.copyfile, 3, half_a_file),
}


def train_until_killed(moment: str, *args) -> List[float]:
    name, function, number, half = MOMENTS[moment]
    with patch(name, killed_on_call(number, function, half)):
        return train_one_rank(*args)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_rank_killed_during_a_sharded_save_leaves_a_resumable_checkpoint(moment, corpus, whole, tmp_path):
    run = tmp_path / "run"
    flags = (*FLAGS, "--sharded-checkpoints", "--save-interval-updates", "1", "--keep-interval-updates", "1")
    survivor, killed = start(corpus, run, *flags, updates=AFTER, ranks=2, last=(train_until_killed, moment))
    with pytest.raises(AssertionError, match="rank 0 lost contact with another rank"):
        collect([survivor], deadline=60)
    killed.process.join()
    assert killed.process.exitcode == -signal.SIGKILL
    losses = train(corpus, run, *flags, updates=AFTER, ranks=2)
    assert len(losses) in (AFTER - 3, AFTER - 2) and losses == whole[-len(losses) :]
    assert not [path for path in run.iterdir() if not path.name.startswith("log") and path.suffix != ".pt"]


@pytest.mark.parametrize("sharded", [False, True], ids=["portable", "sharded"])
def test_adapters_of_experts_move_between_numbers_of_ranks(sharded, corpus, tmp_path):
    flags = "--expert-lora-rank", "2", "--freeze", "^(?!.*(lora_|gate))", *(["--sharded-checkpoints"] if sharded else [])
    losses = train(corpus, tmp_path / "run", *flags, updates=2, ranks=2)
    last = tmp_path / "whole.pt"
    reshard(str(tmp_path / "run" / "checkpoint_last.pt"), str(last), 1)
    state = read_checkpoint(str(last))
    assert {len(value) for name, value in state["model"].items() if ".lora_" in name} == {4}
    losses += train(corpus, tmp_path / "run", *flags, updates=4, ranks=2)
    resumed = train(corpus, tmp_path / "alone", *flags[:4], "--restore-file", str(last), "--update-freq", "2", updates=4, ranks=1)
    torch.testing.assert_close(resumed, losses[2:], rtol=1e-6, atol=0)


def fail_in_update(number: int, data: Path, save_dir: Path, port: int, flags: tuple) -> None:
    """Train one of two ranks, until every batch fails after `number` updates."""

    def step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False):
        if update_num == number:
            raise ValueError("a batch fails")
        return stepped(self, sample, model, criterion, optimizer, update_num, ignore_grad)

    stepped = FairseqTask.train_step
    with patch.object(FairseqTask, "train_step", step), pytest.raises(ValueError, match="a batch fails"):
        runs.train(data, save_dir, *flags, updates=20, ranks=2, rank=rank_number(), port=port)


@pytest.mark.parametrize("placement", [(), ("--expert-parallel-size", "1", "--shard-expert-optimizer")])
def test_a_failed_batch_leaves_no_checkpoint_with_experts_of_an_earlier_update(placement, corpus, tmp_path):
    """fairseq gathers after the 8 updates of an epoch, and then finds that these flags ask for no file."""
    flags = "--save-interval-updates 8 --no-epoch-checkpoints --no-last-checkpoints".split()
    run_ranks(2, fail_in_update, 9, corpus, tmp_path / "run", free_port(), (*flags, *placement), group=False)
    assert [path.name for path in (tmp_path / "run").glob("*.pt")] == []
