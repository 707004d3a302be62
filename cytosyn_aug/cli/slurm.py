"""A SLURM job array around a command that takes `--shard`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmJob:
    """What the jobs of an array ask for, in SLURM's own words.

    Attributes:
        shards: Jobs of the array.
        gpus: Of each job; 0 for none.
        cpus: Of each job.
        memory: Of each job, as "32G".
        time: Limit of each job.
        partition: Where they run; None for the default.
        account: Who pays; None for the default.
        setup: Line to run before the command.
    """

    shards: int
    gpus: int = 1
    cpus: int = 8
    memory: str = "32G"
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    setup: str = ""

    def __post_init__(self) -> None:
        if self.shards < 1 or self.cpus < 1 or self.gpus < 0:
            raise ValueError(
                f"{self.shards} shards with {self.cpus} CPUs and {self.gpus} GPUs each, expected "
                "at least 1, 1 and 0"
            )
        words = (self.memory, self.time, self.partition or "", self.account or "")
        if any(c.isspace() for word in words for c in word):
            raise ValueError(f"memory, time, partition or account has a blank: {words}")


def array_script(command: str, name: str, job: SlurmJob) -> str:
    """Return a script for `sbatch`.

    Args:
        command: Without `--shard`, quoted for a shell.
        name: Of the job.
        job: What to ask for.
    """
    asked = {
        "job-name": f"cytosyn-{name}",
        "array": f"0-{job.shards - 1}",
        "cpus-per-task": job.cpus,
        "gpus": job.gpus or None,
        "mem": job.memory,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "output": "%x-%A_%a.log",
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in asked.items() if value is not None]
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "#SBATCH --requeue",
            "# Submit it again, or any single job of it, for whatever was killed: what is finished",
            "# is kept. The job that ends last writes the manifest. Exit code 1 means that some",
            "# tiles failed and are named there; 2 that the job could not go on.",
            "set -euo pipefail",
            *([job.setup] if job.setup else []),
            "export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK",
            f'{command} --shard "$SLURM_ARRAY_TASK_ID/{job.shards}" --quiet',
            "",
        ]
    )
