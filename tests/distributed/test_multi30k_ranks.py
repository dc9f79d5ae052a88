"""200 updates on Multi30k: two ranks, and one process that accumulates two batches, reach the same validation loss."""

import gzip
import math
import sys
from itertools import islice
from pathlib import Path
from typing import List

import fairseq_cli.train
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq_cli import preprocess
from ranks import run_ranks
from runs import run

from fairseq_sparsemixer.cli import main

pytestmark = pytest.mark.distributed

USER_DIR = Path(__file__).resolve().parent.parent.parent / "fairseq_sparsemixer"
FLAGS = (
    "--arch transformer_moe_tiny --encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 32 --decoder-embed-dim 32"
    " --encoder-ffn-embed-dim 64 --decoder-ffn-embed-dim 64 --encoder-attention-heads 2 --decoder-attention-heads 2"
    " --share-all-embeddings --router switch --num-experts 4 --jitter-eps 0"  # routing does not depend on how batches are split
    " --dropout 0 --attention-dropout 0 --activation-dropout 0 --criterion moe_label_smoothed_cross_entropy"
    " --label-smoothing 0.1 --optimizer adam --lr 1e-3 --clip-norm 1.0 --batch-size 8 --max-update 200 --seed 1 --num-workers 0"
    " --no-epoch-checkpoints --no-progress-bar --log-interval 50"
).split()


@pytest.fixture(scope="module")
def multi30k(shared_data, tmp_path_factory) -> Path:
    """The first 3,200 training pairs and 200 validation pairs, with words that occur at least four times."""
    folder = tmp_path_factory.mktemp("multi30k")
    for part, count in (("train", 3200), ("val", 200)):
        for language in ("de", "en"):
            with gzip.open(shared_data / "multi30k" / f"{part}.{language}.gz", "rt", encoding="utf-8") as lines:
                (folder / f"{part}.{language}").write_text("".join(islice(lines, count)).lower(), encoding="utf-8")
    run(
        preprocess.cli_main, "-s", "de", "-t", "en", "--trainpref", folder / "train", "--validpref", folder / "val",
        "--destdir", folder / "bin", "--joined-dictionary", "--thresholdsrc", 4, "--thresholdtgt", 4, "--workers", 1,
    )  # fmt: skip
    return folder / "bin"


def arguments(data: Path, save_dir: Path) -> List[str]:
    return [str(data), "--user-dir", str(USER_DIR), "--save-dir", str(save_dir), *FLAGS]


def train_alone(data: Path, save_dir: Path) -> None:
    run(fairseq_cli.train.cli_main, *arguments(data, save_dir), "--cpu", "--update-freq", "2")


def validation_loss(save_dir: Path) -> float:
    """Bits per word, computed from the checkpoint, because fairseq rounds what it logs."""
    models, _, task = checkpoint_utils.load_model_ensemble_and_task([str(save_dir / "checkpoint_last.pt")])
    model = models[0].eval()
    task.load_dataset("valid")
    loss = words = 0.0
    with torch.no_grad():
        for batch in task.get_batch_iterator(task.dataset("valid"), max_sentences=50).next_epoch_itr(shuffle=False):
            log_probabilities = model.get_normalized_probs(model(**batch["net_input"]), log_probs=True)
            chosen = log_probabilities.gather(-1, batch["target"].unsqueeze(-1)).squeeze(-1)
            real = batch["target"] != task.target_dictionary.pad()
            loss, words = loss - chosen[real].sum().item() / math.log(2), words + real.sum().item()
    return loss / words


def test_two_ranks_reach_the_loss_of_one_process_with_accumulation(multi30k, tmp_path):
    command = [str(Path(sys.executable).parent / "fairseq-train"), *arguments(multi30k, tmp_path / "two")]
    assert main(["launch", "--nproc", "2", "--", *command]) == 0
    run_ranks(1, train_alone, multi30k, tmp_path / "one", group=False)
    together, alone = validation_loss(tmp_path / "two"), validation_loss(tmp_path / "one")
    assert together == pytest.approx(alone, abs=1e-3)
    assert together < 8  # it has learnt something: an untrained model has log2(dictionary size), about 10.7
