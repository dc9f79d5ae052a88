"""fairseq-train in this process on tiny models, with everything needed to recompute a run's metrics."""

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional
from unittest.mock import patch

import torch
from runs import initialised, run
from torch import Tensor, nn

LAYER = "--{0}-layers 2 --{0}-embed-dim 16 --{0}-ffn-embed-dim 24 --{0}-attention-heads 2"
TRANSLATION = (
    f"--arch transformer_moe_tiny {LAYER.format('encoder')} {LAYER.format('decoder')} --criterion moe_cross_entropy".split()
)
NO_DROPOUT = "--dropout 0 --attention-dropout 0".split()
# a Switch gate without noise behaves the same in training and at inference, so losses can be computed from the model alone
EXPERTS = "--num-experts 2 --moe-freq 1 --router switch --jitter-eps 0".split()
TRAINING = (
    "--optimizer adam --lr 0.01 --clip-norm 1.0 --seed 1 --num-workers 0 --cpu --no-progress-bar --log-interval 1"
    " --max-epoch 100 --required-batch-size-multiple 1"
).split()


@dataclass
class Run:
    """A training run: logged loss (bits) and batches of each update, and the models before each update and at the end."""

    trainer: Any = None
    losses: List[float] = field(default_factory=list)
    batches: List[List[Any]] = field(default_factory=list)
    models: List[nn.Module] = field(default_factory=list)
    valid: List[Dict[str, float]] = field(default_factory=list)


def fit(data: Path, save_dir: Path, *flags, updates: int, user_dir: Optional[Path] = None) -> Run:
    """Run fairseq-train up to `updates` updates. Later flags override those above, except architecture and sizes."""
    import fairseq_cli.train
    from fairseq import checkpoint_utils
    from fairseq.logging import metrics

    from fairseq_sparsemixer import __file__ as package
    from fairseq_sparsemixer.plugin.trainer import MoETrainer

    for name in ("best", "num_runs"):  # fairseq expects to train once per process
        checkpoint_utils.save_checkpoint.__dict__.pop(name, None)
        fairseq_cli.train.should_stop_early.__dict__.pop(name, None)
    recorded = Run()
    step, validate = MoETrainer.train_step, fairseq_cli.train.get_valid_stats

    def train_step(self, samples, *args, **kwargs):
        recorded.trainer = self
        if not self.cfg.distributed_training.distributed_world_size > 1:
            recorded.models.append(copy.deepcopy(self.get_model()))
        output = step(self, samples, *args, **kwargs)
        recorded.batches.append(samples)
        recorded.losses.append(float(metrics.get_meter("train_inner", "loss").val))
        return output

    def get_valid_stats(*args, **kwargs):
        stats = validate(*args, **kwargs)
        recorded.valid.append({name: float(value) for name, value in stats.items() if isinstance(value, (int, float, Tensor))})
        return stats

    with patch.object(MoETrainer, "train_step", train_step), patch.object(fairseq_cli.train, "get_valid_stats", get_valid_stats):
        run(
            fairseq_cli.train.cli_main, data, "--user-dir", user_dir or Path(package).parent, "--save-dir", save_dir,
            "--max-update", updates, *TRAINING, *NO_DROPOUT, *flags,
        )  # fmt: skip
    recorded.models.append(recorded.trainer.get_model())
    return recorded


def bits(model: nn.Module, sample: Dict[str, Any], padding: int) -> float:
    """Cross-entropy of a batch in bits per target word, from the log-softmax of the model's output in float64."""
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        logits = model(**sample["net_input"])[0]
    target = sample["target"]
    chosen = logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return -chosen[target.ne(padding)].mean().item() / math.log(2)


def weights(checkpoint: Path) -> Dict[str, Tensor]:
    """The tensors of a checkpoint's model."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=False)  # a file written by this test
    return initialised(state["model"])
