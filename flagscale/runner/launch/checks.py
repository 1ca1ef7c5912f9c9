"""What can be found wrong before anything is written: hosts, secrets, programs, ports."""

import os
import secrets as random_words
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from flagscale.errors import LaunchError, UserError, find_nearest
from flagscale.runner.launch.capacity import find_disk_faults, weigh_chips
from flagscale.runner.launch.ports import find_free_port, find_port_owner, is_port_free
from flagscale.runner.plan.job import DRAWN, HostPlan, JobPlan, ProcessSpec


def check_local(plan: JobPlan) -> None:
    """
    Raises:
        LaunchError: the plan names hosts that are not this machine.
    """
    remote = [host.host.name for host in plan.hosts if not host.host.is_local]
    if remote:
        raise LaunchError(
            f"this plan runs on {len(remote)} other machine{'s' * (len(remote) > 1)} ({', '.join(remote)}), and only "
            "this one (localhost) can be started here; remove `experiment.runner.hostfile`, or list `localhost` in it"
        )


def gather_secrets(plan: JobPlan, env: Mapping[str, str]) -> dict[str, str]:
    """The values of the plan's secrets, under their names in the job.

    Raises:
        UserError: some are not set.
    """
    missing = [source for _, source in plan.secrets if source not in env and source != DRAWN]
    if missing:
        raise UserError(
            f"`experiment.secrets`: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set in this "
            f"environment; expected e.g. `export {missing[0]}=…` before the launch"
        )
    return {name: random_words.token_hex(32) if source == DRAWN else env[source] for name, source in plan.secrets}


def _search_path(process: ProcessSpec, env: Mapping[str, str]) -> str:
    return os.pathsep.join((*process.bin_dirs, env.get("PATH", os.defpath)))


def find_program(process: ProcessSpec, env: Mapping[str, str]) -> str | None:
    """The path of a process's program, by the PATH that it will have; None where there is none of that name."""
    name = str(process.argv[0])
    if "/" in name:
        return str(Path(process.cwd, name))
    import shutil  # here and below: half a host's start-up time is what it imports

    return shutil.which(name, path=_search_path(process, env))


def _find_program_fault(process: ProcessSpec, env: Mapping[str, str]) -> str | None:
    words = [str(word) for word in process.argv]
    program = find_program(process, env)
    if program is None:
        return f"program `{words[0]}` is not on the PATH"
    if not os.access(program, os.X_OK):
        return f"program {program} is missing or may not be executed"
    module = words[2].split(".")[0] if program == sys.executable and words[1:2] == ["-m"] else None
    if module and not _has_module(module):
        return f"module `{module}` is not installed for {program}"
    return None


def _has_module(name: str) -> bool:
    """Also where Python was started without its site-packages."""
    if sys.flags.no_site:
        import site

        site.main()
    from importlib.util import find_spec

    return find_spec(name) is not None


def _find_faults(host: HostPlan, process: ProcessSpec, env: Mapping[str, str]) -> Iterator[str]:
    """What the user's own `before_start` may bring (a program on its PATH, a file that it names) is no fault."""
    written = {path for path, _ in host.files}
    if not Path(process.cwd).is_dir():
        if process.cwd not in {*host.make_dirs, *(str(Path(path).parent) for path in written)}:
            yield f"its working folder {process.cwd} is missing"
        return
    if host.before_start is None and (fault := _find_program_fault(process, env)):
        yield fault
    if process.entrypoint is None:
        return
    path = Path(process.cwd, process.entrypoint)
    if not path.is_file() and str(path) not in written and path.name not in (host.before_start or ""):
        near = find_nearest(path.name, [entry.name for entry in path.parent.glob("*.py")])
        yield f"entry point {path} is missing" + (f"; did you mean `{path.with_name(near)}`?" if near else "")


def check_programs(plan: JobPlan, env: Mapping[str, str]) -> None:
    """
    Raises:
        UserError: every interpreter, module and entry point that is not there, all at once.
    """
    faults = [
        f"{process.name} on {host.host.name}: {fault}"
        for host in plan.hosts
        for process in host.processes
        for fault in _find_faults(host, process, env)
    ]
    if faults:
        raise UserError("\n".join(dict.fromkeys(faults)))


def check_outputs(plan: JobPlan) -> None:
    """
    Raises:
        UserError: an output file that earlier runs wrote cannot be appended to.
    """
    for host in plan.hosts:
        path = Path(plan.log_dir, f"{host.label}.output")
        if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
            raise UserError(f"cannot write {path}; expected a file that you may append to, or none")


def check_capacity(plan: JobPlan) -> None:
    """Of a plan whose hosts are this machine; what cannot be seen is said on standard error.

    Raises:
        UserError: there are more ranks than chips.
        LaunchError: the disk is full.
    """
    if faults := list(find_disk_faults(plan)):
        raise LaunchError("\n".join(faults))
    for host in plan.hosts:
        fault, note = weigh_chips(host)
        if fault:
            raise UserError(f"{host.host.name}: {fault}")
        if note:
            print(f"note: {host.host.name}: {note}", file=sys.stderr)


def choose_port(plan: JobPlan) -> int:
    """The plan's master port, or a free one.

    Raises:
        UserError: the plan's port is taken.
        LaunchError: no port is free.
    """
    if plan.master_port is None:
        port = find_free_port()
        if port is None:
            raise LaunchError("no free port was found on this machine; set `experiment.runner.master_port`")
        return port
    if not is_port_free(plan.master_port):
        owner = find_port_owner(plan.master_port)
        raise UserError(
            f"port {plan.master_port} (`experiment.runner.master_port`) is taken"
            + (f" by {owner}" if owner else "")
            + "; choose another, or leave it out and a free one is chosen"
        )
    if plan.no_shared_fs and not is_port_free(plan.master_port, socket.SOCK_DGRAM):
        raise UserError(
            f"port {plan.master_port} (`experiment.runner.master_port`) is taken for UDP, by which the agents of hosts "
            "without a shared folder speak; choose another, or leave it out and a free one is chosen"
        )
    return plan.master_port
