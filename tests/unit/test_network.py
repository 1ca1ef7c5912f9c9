"""The host's own interfaces, and the one that leads to another host."""

import sys

import pytest
from factories import ROOT
from hosts import MakeHosts, missing, run_at

from flagscale.runner.launch.network import find_interface, interface_env, list_interfaces

pytest_plugins = ("host_fixtures",)


def test_the_loopback_is_there_and_leads_nowhere() -> None:
    assert list_interfaces()["lo"] is True
    assert find_interface("localhost") is None
    assert find_interface("no-such-name.invalid") is None


def test_no_variable_is_set_without_an_interface() -> None:
    assert interface_env(("GLOO_SOCKET_IFNAME",), "localhost") == {}
    assert interface_env(("GLOO_SOCKET_IFNAME",), "") == {}
    assert interface_env((), "192.0.2.1") == {}


@pytest.mark.hosts
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_the_interface_that_leads_to_a_host(make_hosts: MakeHosts) -> None:
    """h1 has a cable to the others under two addresses, one to somewhere else, one that is down, and Debian's name."""
    hosts = make_hosts(2)
    h2 = hosts.host("h2").address
    names = {"127.0.0.1": "localhost", "127.0.1.1": "h1", h2: "h2", "10.1.0.2": "far", "10.2.0.2": "behind"}
    (hosts.host("h1").etc / "hosts").write_text("".join(f"{address} {name}\n" for address, name in names.items()))
    for words in (
        *("link add other type veth peer name other-end", "addr add 10.1.0.1/24 dev other"),
        *("link set other up", "link set other-end up", "addr add 10.2.0.1/24 dev eth0", "link add idle type bridge"),
    ):
        done = run_at(hosts, "ip", *words.split(), on="h1")
        assert done.returncode == 0, done.stderr
    source = """if True:
        from flagscale.runner.launch.network import find_interface, interface_env, list_interfaces
        print([find_interface(name) for name in ("h2", "far", "behind", "h1", "10.2.0.1", "203.0.113.9")])
        print(interface_env(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "h2"))
        print(dict(sorted(list_interfaces().items())))
    """
    told = run_at(hosts, "env", f"PYTHONPATH={ROOT}", sys.executable, "-c", source, on="h1")
    assert told.stdout.splitlines() == [
        "['eth0', 'other', 'eth0', None, 'eth0', None]",
        "{'GLOO_SOCKET_IFNAME': 'eth0', 'NCCL_SOCKET_IFNAME': 'eth0'}",
        "{'eth0': True, 'idle': False, 'lo': True, 'other': True, 'other-end': True}",
    ], told.stderr
