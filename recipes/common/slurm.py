"""SLURM batch scripts: one task per GPU, which fairseq detects itself, requeued until training is done."""

from pathlib import Path
from typing import List

from recipes.common.progress import format_command

PORT = 29500  # rendezvous port on the first machine

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
# add the options of your cluster: --partition, --account, ...

# A requeued or resubmitted job resumes from checkpoint_last.pt.
srun {command}
"""


def batch_script(name: str, command: List[str], nodes: int, gpus: int, folder: Path) -> str:
    """A script that runs a fairseq-hydra-train command on `nodes` machines with `gpus` GPUs each."""
    command = [*command, f"+distributed_training.distributed_port={PORT}"]
    return TEMPLATE.format(name=name, nodes=nodes, gpus=gpus, folder=folder, command=format_command(command))
