"""`ldit launch`: writes batch scripts for clusters; imports no torch."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from ldit.config.requests.launch import SlurmRequest
from ldit.config.run import BaseRun
from ldit.errors import ConfigError, RequestError
from ldit.storage.manifest import check_not_in_checkpoint
from ldit.storage.outputs import put

STOPPED_BY_USR1 = 138  # exit code of a run that saved a checkpoint after SIGUSR1


def run_slurm(request: SlurmRequest, flags: Sequence[str], config: BaseRun) -> int:
    """`ldit launch slurm RECIPE … -- flags`. `config` is the configuration of that run. Errors in it are raised here,
    not when the job has waited in the queue."""
    config.check()
    _check_processes(request, config)
    print(shlex.join(["sbatch", str(write_slurm(request, flags, request.file))]))
    return 0


def _check_processes(request: SlurmRequest, config: BaseRun) -> None:
    """ConfigError when the run cannot be split over the tasks of the job."""
    shared, train, tasks = config.parallel, config.train, request.nodes * request.gpus_per_node
    group = shared.tp * shared.replicate * max(shared.shard, 1)
    if tasks % group or (shared.shard and tasks != group):
        raise ConfigError(
            f"parallel: tp {shared.tp} x shard {shared.shard or 'rest'} x replicate {shared.replicate} "
            f"does not fit {request.nodes} x {request.gpus_per_node} GPUs"
        )
    parts, micro = tasks // shared.tp, train.micro_batch_size or 1
    if train.batch_size % (parts * micro):
        raise ConfigError(
            f"train.batch_size: {train.batch_size} cannot be split over {parts} processes in passes of {micro}"
        )


def write_slurm(request: SlurmRequest, flags: Sequence[str], file: Path) -> Path:
    """Write the script of a request to `file`, which must not exist. `flags`: further flags of `ldit train`."""
    check_not_in_checkpoint(file)
    if file.exists():
        raise RequestError(f"{file} exists; remove it or choose another --file")
    put(file, slurm_script(request, flags))
    return file


def slurm_script(request: SlurmRequest, flags: Sequence[str] = ()) -> str:
    """The script for sbatch, with one task for each GPU, which finds its rank in srun's variables. Before the time
    limit SIGUSR1 stops the run: it saves a checkpoint and exits with 138, and the job is queued again."""
    options: Sequence[tuple[str, object]] = (
        ("job-name", request.name),
        ("partition", request.partition),
        ("account", request.account),
        ("nodes", request.nodes),
        ("ntasks-per-node", request.gpus_per_node),
        ("gpus-per-node", request.gpus_per_node),
        ("cpus-per-task", request.cpus_per_task),
        ("time", request.time),
        ("output", f"{request.name}-%j.log"),
        ("open-mode", "append"),
        ("signal", f"USR1@{request.notice}"),
    )
    header = "\n".join(f"#SBATCH --{key}={value}" for key, value in options if value is not None)
    command = shlex.join(["python", "-u", "-m", "ldit", "train", request.recipe, "--out", str(request.run), *flags])
    # Since Slurm 22.05 srun does not inherit --cpus-per-task from the job.
    srun = (
        "srun --wait=60" if request.cpus_per_task is None else f"srun --wait=60 --cpus-per-task={request.cpus_per_task}"
    )
    return f"""#!/bin/bash
{header}
#SBATCH --requeue

# Submit where ldit's environment is active: sbatch hands it on. Relative paths start where sbatch was called.
set -euo pipefail

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${{hosts%%$'\\n'*}}
export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))

# {request.notice} s before the time limit the tasks get SIGUSR1, commit a step and end with {STOPPED_BY_USR1}.
# Queued again, the same command resumes.
code=0
{srun} {command} || code=$?
if [ "$code" -eq {STOPPED_BY_USR1} ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
"""
