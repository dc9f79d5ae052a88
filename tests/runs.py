"""Training runs for tests of fairseq's own commands: a tiny translation corpus, and fairseq-train in this process."""

import random
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List
from unittest.mock import patch

SMALL = (
    "--arch transformer_moe_tiny --encoder-layers 2 --decoder-layers 1 --encoder-embed-dim 16 --decoder-embed-dim 16"
    " --encoder-ffn-embed-dim 24 --decoder-ffn-embed-dim 24 --encoder-attention-heads 2 --decoder-attention-heads 2"
    " --dropout 0 --attention-dropout 0 --activation-dropout 0"
    " --criterion moe_cross_entropy --optimizer adam --lr 0.01 --batch-size 4 --max-epoch 50 --seed 1 --num-workers 0"
    " --log-format json --log-interval 1 --disable-validation --cpu --clip-norm 1.0"
).split()
EXPERTS = "--num-experts 4 --moe-freq 1 --router switch --jitter-eps 0".split()


def make_corpus(folder: Path, sentences: int = 64) -> Path:
    """Binarise translation data of random words into folder/bin, with splits `train` and `valid`."""
    from fairseq_cli import preprocess

    draw = random.Random(1)
    for language in ("de", "en"):
        for part, count in (("train", sentences), ("valid", 8)):
            lines = [" ".join(f"w{draw.randrange(20)}" for _ in range(draw.randrange(3, 9))) for _ in range(count)]
            (folder / f"{part}.{language}").write_text("\n".join(lines) + "\n")
    run(
        preprocess.cli_main, "-s", "de", "-t", "en", "--trainpref", folder / "train", "--validpref", folder / "valid",
        "--destdir", folder / "bin", "--joined-dictionary", "--workers", 1,
    )  # fmt: skip
    return folder / "bin"


@contextmanager
def arguments(*words) -> Iterator[None]:
    """Set the command line of the process while the context is open."""
    with patch.object(sys, "argv", ["fairseq", *map(str, words)]):
        yield


def run(main, *words) -> None:
    """Run a fairseq command in this process."""
    with arguments(*words):
        main()


def train(
    data: Path, save_dir: Path, *flags, updates: int, ranks: int = 1, rank: int = 0, port: int = 0, moe: bool = True
) -> List[float]:
    """Run fairseq-train up to `updates` updates. Returns the loss of each update of this run, as logged by fairseq.

    moe: False for fairseq's own models, which have no flags for experts.
    """
    import fairseq_cli.train
    from fairseq import checkpoint_utils
    from fairseq.logging import metrics

    import fairseq_sparsemixer

    checkpoint_utils.save_checkpoint.__dict__.pop("best", None)  # fairseq expects to train once per process
    losses: List[float] = []
    distributed = []
    if ranks > 1:
        distributed = (
            f"--distributed-world-size {ranks} --distributed-init-method tcp://127.0.0.1:{port} --distributed-rank {rank}"
            " --device-id 0 --distributed-no-spawn --distributed-backend gloo --ddp-backend legacy_ddp"
        ).split()
    train_step = fairseq_sparsemixer.plugin.trainer.MoETrainer.train_step

    def recorded(self, *args, **kwargs):
        log = train_step(self, *args, **kwargs)
        losses.append(float(metrics.get_meter("train_inner", "loss").val))
        return log

    user_dir = Path(fairseq_sparsemixer.__file__).parent
    with patch.object(fairseq_sparsemixer.plugin.trainer.MoETrainer, "train_step", recorded):
        run(
            fairseq_cli.train.cli_main, data, "--user-dir", user_dir, "--save-dir", save_dir, "--max-update", updates,
            *SMALL, *(EXPERTS if moe else ()), *distributed, *flags,
        )  # fmt: skip
    return losses


def initialised(state: Dict[str, Any]) -> Dict[str, Any]:
    """A model's state without the buffer that fairseq 0.12.2 leaves uninitialised, because it uses only its dtype."""
    return {name: value for name, value in state.items() if not name.endswith("._float_tensor")}


def generate(data: Path, checkpoint: Path, results: Path) -> List[str]:
    """Run fairseq-generate on `valid`. Returns the lines of hypotheses, with score and number."""
    from fairseq_cli import generate

    import fairseq_sparsemixer

    user_dir = Path(fairseq_sparsemixer.__file__).parent
    run(
        generate.cli_main, data, "--user-dir", user_dir, "--path", checkpoint, "--gen-subset", "valid", "--cpu",
        "--beam", 2, "--max-len-b", 8, "--results-path", results, "--batch-size", 8,
    )  # fmt: skip
    text = (results / "generate-valid.txt").read_text().splitlines()
    return sorted(line for line in text if line.startswith("H-"))
