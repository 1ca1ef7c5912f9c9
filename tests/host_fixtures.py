"""The fixture that makes test hosts: `pytest_plugins = ("host_fixtures",)` in a test module, and the marker `hosts`.

A test gets a set of its own, under a name that no other process of this machine uses, and it is taken down at the end
of the test whatever came of it. Where hosts cannot be made (no root, no sshd) the test is skipped with the reason.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from hosts import HostSet, MakeHosts, hosts_up, missing


@pytest.fixture
def make_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeHosts]:
    """`make_hosts(3)` gives a set of 3 hosts; `private_dirs=(folder,)` is empty and its own on each of them."""
    if reason := missing():
        pytest.skip(reason)
    state_dir = tmp_path_factory.mktemp("hosts")
    with ExitStack() as stack:
        count = 0

        def make(num_hosts: int, private_dirs: Sequence[Path] = ()) -> HostSet:
            nonlocal count
            count += 1
            return stack.enter_context(hosts_up(num_hosts, f"t{os.getpid()}-{count}", private_dirs, state_dir))

        yield make
