"""Test hosts for tests: whether this machine can have them, and how a test runs commands on them.

A module that wants some says `pytest_plugins = ("host_fixtures",)` and asks for `make_hosts`. Being imported, this file
also puts tools/ on the import path.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

from testhosts.hosts import HostSet, hosts_up
from testhosts.machine import missing

__all__ = ["HostSet", "MakeHosts", "hosts_up", "missing", "run_at", "run_ssh"]

MakeHosts = Callable[..., HostSet]


def run_at(
    hosts: HostSet, *argv: str, on: str | None = None, timeout_s: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """Run a command where launchers run, or on the host `on`; output as text."""
    command = hosts.command(argv, on)
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


def run_ssh(hosts: HostSet, *words: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """`ssh <words>` from where launchers run, as a user would: key and known hosts are those of the HOME there."""
    options = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=2", "-o", "ServerAliveInterval=5")
    return run_at(hosts, "ssh", *options, *words, timeout_s=timeout_s)
