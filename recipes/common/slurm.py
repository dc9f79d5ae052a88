"""A batch script for SLURM: one task a GPU, which fairseq recognises by itself, requeued until it is done."""

from pathlib import Path
from typing import List

from recipes.common.progress import format_command

PORT = 29500  # where the ranks meet, on the first machine

TEMPLATE = """#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={gpus}
#SBATCH --gpus-per-node={gpus}
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={folder}/slurm.log
# add what your cluster asks for: --partition, --account, ...

# A requeued or resubmitted job goes on from checkpoint_last.pt.
srun {command}
"""


def batch_script(name: str, command: List[str], nodes: int, gpus: int, folder: Path) -> str:
    """The text of a script that runs a command of fairseq-hydra-train on `gpus` GPUs of each of `nodes` machines."""
    command = [*command, f"+distributed_training.distributed_port={PORT}"]
    return TEMPLATE.format(name=name, nodes=nodes, gpus=gpus, folder=folder, command=format_command(command))
