"""Every patch that this package applies to fairseq, torch and numpy. `fairseq-sparsemixer doctor` prints the table."""

from typing import Callable, NamedTuple, Optional

from fairseq_sparsemixer.plugin import bfloat16, compatibility, lost_ranks, trainer
from fairseq_sparsemixer.plugin.checkpoints import folder_lock, reading, settings, writing
from fairseq_sparsemixer.plugin.traces import commands
from fairseq_sparsemixer.plugin.traces import options as trace_options


class Patch(NamedTuple):
    """target: what is replaced. why: what would go wrong otherwise. until: what would make the patch unnecessary.

    apply: applies the patch, idempotent; None if the patch is applied only for the duration of a call.
    """

    target: str
    why: str
    until: str
    apply: Optional[Callable[[], None]]


PATCHES = (
    Patch(
        "eval in every module of fairseq; torch.load in those that read files",
        "a file's settings could run code when evaluated, and its pickle when read",
        "fairseq evaluates only literals, and reads with weights_only",
        lambda: settings.install(prepare=reading.read_data_only),
    ),
    Patch(
        "fairseq.checkpoint_utils.load_checkpoint_to_cpu, load_ema_from_checkpoint and load_model_ensemble_and_task",
        "unusable files end in tracebacks, and every rank would read all experts",
        "fairseq says what is wrong with a file, and lets a rank read part of one",
        reading.install,
    ),
    Patch(
        "torch.serialization's safe globals",
        "torch.load refuses the argparse.Namespace and numpy numbers in fairseq's checkpoints",
        "fairseq saves plain data",
        reading.allow_fairseq_checkpoints,
    ),
    Patch(
        "fairseq.checkpoint_utils.torch_persistent_save, save_checkpoint, verify_checkpoint_directory and PathManager",
        "a run killed while saving replaces a complete file by a truncated one",
        "fairseq writes to a temporary file and renames it",
        writing.install,
    ),
    Patch(
        "fairseq_cli.train.main",
        "two trainings into one --save-dir overwrite each other's checkpoints",
        "fairseq locks the folder",
        folder_lock.install,
    ),
    Patch(
        "fairseq_cli.train.Trainer",
        "fairseq's Trainer averages the gradients of all parameters over ranks, and saves rank 0's parameters",
        "fairseq has a registry of trainers",
        trainer.install,
    ),
    Patch(
        "fairseq.distributed.utils.distributed_init and distributed_main",
        "process groups wait for a lost rank for torch's default time-out, and then end in tracebacks",
        "fairseq passes a time-out to torch",
        lost_ranks.install,
    ),
    Patch(
        "torch.distributed.init_process_group and fairseq's _global_group, while fairseq starts with --collective-timeout",
        "fairseq passes no time-out to them",
        "fairseq passes a time-out to torch",
        None,
    ),
    Patch(
        "fairseq.sequence_generator.SequenceGenerator._generate, in training with experts sharded over ranks",
        "a rank that generates longer than the others waits for them in a layer",
        "a hook of fairseq's around generation in training",
        None,
    ),
    Patch(
        "fairseq.dataclass.configs.CommonConfig",
        "no command but fairseq-train would know --moe-trace and --moe-replay",
        "fairseq lets a user-dir add flags to its commands",
        trace_options.install,
    ),
    Patch(
        "main of fairseq_cli.generate, interactive, eval_lm and validate",
        "these commands would ignore --moe-trace and --moe-replay",
        "fairseq has hooks around its commands",
        commands.install,
    ),
    Patch(
        "SequenceGenerator._generate, SequenceScorer.generate, fairseq.criterions.build_criterion and"
        " fairseq_cli.interactive.make_batches, with --moe-trace or --moe-replay",
        "nothing says which sentences a layer sees",
        "fairseq has hooks around its generators and criterions",
        None,
    ),
    Patch(
        "fairseq.options.parse_args_and_arch",
        "--bf16 on the command line implies a TPU",
        "fairseq sets --tpu only if there is a TPU",
        bfloat16.install,
    ),
    Patch(
        "fairseq.nan_detector.NanDetector.__init__",
        "its backward hooks raise an error in torch, which hides the NaN",
        "fairseq's detector supports modules that return more than tensors",
        compatibility.look_for_nans_forward_only,
    ),
    Patch(
        "numpy.compat",
        "fairseq splits text using numpy.compat.long, which numpy 2 removed",
        "fairseq uses int",
        compatibility.restore_numpy_long,
    ),
)


def apply() -> None:
    """Apply all patches; idempotent."""
    for patch in PATCHES:
        if patch.apply is not None:
            patch.apply()
