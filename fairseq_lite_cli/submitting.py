"""What all jobs that submitit takes to Slurm have in common."""

from __future__ import annotations

import shlex
from pathlib import Path

from fairseq_lite.errors import ConfigError


def job_setup(folder: Path) -> list[str]:
    """The first lines of a job's script.

    Args:
        folder: holds the packages that the job imports.
    """
    return [
        f'export PYTHONPATH={shlex.quote(str(folder))}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        # srun does not take the job's --cpus-per-task over.
        "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}",
    ]


def refusal(name: str, error: Exception) -> ConfigError:
    """What is said of a job that is not taken.

    Args:
        name: the job's.
        error: submitit's; it has several kinds, which hold what sbatch said.
    """
    said = str(error).strip().splitlines() or [type(error).__name__]
    return ConfigError(f"{name}: not submitted: {said[-1]}")
