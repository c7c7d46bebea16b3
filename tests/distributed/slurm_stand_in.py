"""Stand-ins for ``srun`` and ``scontrol``, and the variables of a job with two tasks."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from tests.distributed.tiny_fit import environment

SRUN = """#!/usr/bin/env bash
[[ $1 == --kill-on-bad-exit=1 ]] || { echo "what is $1?" >&2; exit 2; }
for task in 0 1; do
  SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=0 "${@:2}" &
  tasks+=($!)
done
echo "${tasks[@]}" >"$TASKS"
code=0
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >>"$ASKED"
if [[ -e $ASKED.refuse ]]; then echo "Job can not be requeued" >&2; exit 1; fi
"""


def job_variables(folder: Path) -> dict[str, str]:
    """Write the stand-ins to a folder; return what SLURM would set for a job on one machine.

    ``folder/tasks`` will hold the process ids of the tasks, ``folder/asked`` what scontrol was
    asked, which it refuses while there is a file ``folder/asked.refuse``.
    """
    programs = folder / "programs"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    job = {"NNODES": "1", "NTASKS": "2", "NTASKS_PER_NODE": "2", "CPUS_PER_TASK": "1"}
    job |= {"JOB_ID": "7", "JOB_NAME": "lit-moe", "NODELIST": "127.0.0.1", "NODEID": "0"}
    return {f"SLURM_{name}": value for name, value in job.items()} | {
        "ASKED": str(folder / "asked"),
        "TASKS": str(folder / "tasks"),
        "PATH": f"{programs}{os.pathsep}{environment()['PATH']}",
    }


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
