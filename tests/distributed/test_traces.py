"""--moe-trace and --moe-replay on two ranks: the files of both hold what one process writes, and replays read them."""

import json
from pathlib import Path
from typing import List
from unittest.mock import patch

import pytest
from ranks import meeting_place, rank_number, run_ranks
from runs import run
from torch.nn.parallel import DistributedDataParallel

import fairseq_sparsemixer
from fairseq_sparsemixer.cli.launch import rank_command

pytestmark = pytest.mark.distributed

USER_DIR = Path(fairseq_sparsemixer.__file__).parent
FLAGS = (
    "--arch transformer_moe_tiny --encoder-layers 2 --decoder-layers 1 --encoder-embed-dim 16 --decoder-embed-dim 16"
    " --encoder-ffn-embed-dim 24 --decoder-ffn-embed-dim 24 --num-experts 4 --moe-freq 1 --router switch --jitter-eps 0"
    " --dropout 0 --attention-dropout 0 --activation-dropout 0 --criterion moe_cross_entropy --optimizer adam --lr 0.01"
    " --max-update 2 --seed 1 --num-workers 0 --no-save --log-format none --required-batch-size-multiple 1 --cpu"
    " --clip-norm 1"
).split()


def trained(world_size: int, meeting: str, flags: List[str]) -> List[float]:
    """The losses of each update on this rank."""
    import fairseq_cli.train
    from fairseq.logging import metrics
    from fairseq.models import distributed_fairseq_model

    from fairseq_sparsemixer.plugin.trainer import MoETrainer

    losses: List[float] = []
    step = MoETrainer.train_step

    def recorded(self, *args, **kwargs):
        output = step(self, *args, **kwargs)
        losses.append(float(metrics.get_meter("train_inner", "loss").val))
        return output

    def on_a_cpu(module, device_ids, output_device, **options):
        return DistributedDataParallel(module, **options)  # fairseq names a GPU

    with (
        patch.object(MoETrainer, "train_step", recorded),
        patch.object(distributed_fairseq_model, "DistributedDataParallel", on_a_cpu),
    ):
        run(fairseq_cli.train.cli_main, *rank_command(["fairseq-train", *flags], rank_number(), world_size, meeting)[1:])
    return losses


def lines(*paths: Path):
    """{place: (word, experts, weights)} of files, in which no place is twice."""
    found = {}
    for path in paths:
        for line in map(json.loads, path.read_text().splitlines()):
            place = tuple(line[name] for name in ("subset", "updates", "layer", "sentence", "position"))
            assert place not in found
            found[place] = (line["word"], line["experts"], line["weights"])
    return found


@pytest.mark.parametrize("backend", ["legacy_ddp", "pytorch_ddp"])
def test_two_ranks_trace_and_replay_as_one_process(corpus, tmp_path, backend):
    """The second rank's last validation batch is a dummy, which is not traced, and asks nothing of a replay."""
    command = [str(corpus), "--user-dir", str(USER_DIR), "--ddp-backend", backend, "--expert-parallel-size", "1", *FLAGS]
    alone, both = tmp_path / "alone.jsonl", tmp_path / "both.jsonl"
    sizes = ["--batch-size", "4", "--batch-size-valid", "3"]
    traced = [*command, *sizes, "--moe-trace-interval", "1", "--moe-trace"]
    (expected,) = run_ranks(1, trained, 1, "", [*traced, str(alone), "--update-freq", "2"], group=False)
    found = run_ranks(2, trained, 2, meeting_place(), [*traced, str(both)], group=False)
    assert found[0] == pytest.approx(expected, abs=1e-5)
    assert not both.exists()
    one, two = lines(alone), lines(tmp_path / "both-rank-0.jsonl", tmp_path / "both-rank-1.jsonl")
    assert one.keys() == two.keys()
    first = {place for place in one if place[1] == 0}
    assert first and all(one[place][:2] == two[place][:2] for place in first)
    for place in one:
        assert two[place][2] == pytest.approx(one[place][2], abs=1e-4)
    replay = [*command, *sizes, "--expert-parallel-size", "2", "--moe-replay", str(both), "--moe-replay-weights", "model"]
    again = run_ranks(2, trained, 2, meeting_place(), replay, group=False)
    assert again[0] == pytest.approx(expected, abs=1e-4)
