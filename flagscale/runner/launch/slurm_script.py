"""The one script that Slurm is given: a plan's nodes as options of sbatch, and one agent on each of them.

The script knows nothing of the job but where its run's folder is: what runs on a node stands in the same scripts and
specs as for every other launcher. Which machine is the first and which port is free there is found out when the job
starts, on that very machine, and reaches the scripts by two variables.
"""

import posixpath
import shlex

from flagscale.runner.plan.job import JobPlan, LaunchName
from flagscale.runner.render.script import from_environment

MASTER_ADDR, SECOND_ADDR = "FLAGSCALE_MASTER_ADDR", "FLAGSCALE_SECOND_ADDR"
MASTER_PORT, NEXT_PORT = "FLAGSCALE_MASTER_PORT", "FLAGSCALE_NEXT_PORT"
BATCH_LOG = "slurm.out"
"""what the script and srun themselves print; a node's own output is where it always is"""
LAST_WORD = "slurm.end"
"""what Slurm said of the job at its end, as `scontrol show job` prints it: Slurm itself forgets it within minutes"""
_STARTS_AGENT = (
    'exec "$1" -I "$2/keeper.pyz" "Slurm job $SLURM_JOB_ID" '
    '"$2/host_${SLURM_NODEID}_node${SLURM_NODEID}.spec.json" "${@:3}"'
)


def job_name(run_id: str) -> str:
    """Under which Slurm knows a run, also if the launcher was killed before it learned the job's number."""
    return f"flagscale-{run_id}"


def bind_values(run_id: str) -> dict[LaunchName, str]:
    """What takes the place of words that only the launch knows: most of them are read from the environment there."""
    address, port = from_environment(MASTER_ADDR), from_environment(MASTER_PORT)
    return {
        "run_id": run_id,
        "master_port": port,
        "next_port": from_environment(NEXT_PORT),
        "master_addr": address,
        "master_endpoint": f"{address}:{port}",
    }


def render_sbatch(plan: JobPlan, run_id: str, python: str) -> str:
    """The whole script.

    run_id: of the run; a dry run gives its name in place
    python: the interpreter that runs agents, on the same path on every node
    """
    folder = posixpath.join(plan.exp_dir, "runs", run_id)
    secrets = [f"{name}={source}" for name, source in plan.secrets]
    words = shlex.join([python, folder, *secrets])
    keeper = shlex.join([python, "-I", posixpath.join(folder, "keeper.pyz")])
    title = f"{plan.exp_name or plan.task}: {plan.task} with {plan.backend} on {len(plan.hosts)} nodes"
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *_list_directives(plan, run_id, folder),
            f"# {title}".replace("\n", " "),
            *_find_master(plan, keeper),
            "# srun does not take this from the job by itself",
            '[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"',
            "# the end is told by srun, whose tasks are asked to end at the same time",
            "trap : TERM",
            f"srun --nodes={len(plan.hosts)} --ntasks-per-node=1 --kill-on-bad-exit=0 \\",
            f"  bash -c {shlex.quote(_STARTS_AGENT)} bash {words}",
            "status=$?",
            f'scontrol show job -o "$SLURM_JOB_ID" >{shlex.quote(posixpath.join(folder, LAST_WORD))} 2>/dev/null',
            'exit "$status"',
            "",
        ]
    )


def _list_directives(plan: JobPlan, run_id: str, folder: str) -> list[str]:
    options = (
        ("job-name", job_name(run_id)),
        ("nodes", str(len(plan.hosts))),
        ("ntasks-per-node", "1"),
        ("output", posixpath.join(folder, BATCH_LOG).replace("%", "%%")),
        ("no-requeue", ""),
        *plan.launcher_options,
    )
    return [f"#SBATCH --{name}{f'={_quote_value(value)}' if value else ''}" for name, value in options]


def _quote_value(value: str) -> str:
    """As sbatch reads it: in double quotes where it holds what would end it."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"' if any(letter in value for letter in " \t#'\"\\") else value


def _find_master(plan: JobPlan, keeper: str) -> list[str]:
    """This script runs on the first node: where it can be reached by name, and a port that is free on it."""
    lines = [
        f'{{ read -r {MASTER_ADDR}; read -r {SECOND_ADDR}; }} < <(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        f'{MASTER_PORT}="$({keeper} --port)"',
    ]
    if plan.master_port is not None:
        lines[1] = f"{MASTER_PORT}={plan.master_port}"
    return [
        *lines,
        f'if [ -z "${MASTER_ADDR}" ] || [ -z "${MASTER_PORT}" ]; then',
        '  echo "neither the first node of $SLURM_JOB_NODELIST nor a free port on it was found" >&2; exit 1',
        "fi",
        f"export {MASTER_ADDR} {SECOND_ADDR} {MASTER_PORT} {NEXT_PORT}=$(({MASTER_PORT} + 1))",
    ]
