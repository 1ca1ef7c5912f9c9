"""The test hosts themselves: real namespaces and sshds, broken and mended, and a machine that is left as it was."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from factories import ROOT
from hosts import MakeHosts, run_at, run_ssh
from testhosts import machine
from testhosts.hosts import HostSet
from testhosts.layout import ETC_NETNS_DIR
from testhosts.machine import HostsError, missing, namespace_id
from testhosts.manifest import read_manifest, write_manifest

pytest_plugins = ("host_fixtures",)
pytestmark = [pytest.mark.hosts, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

LIMIT_S = 20.0


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not is_so():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def network_of_the_machine() -> dict[str, str]:
    """The links, addresses, routes and neighbours' rules of the network that this test runs in."""
    commands = ("-brief link", "-brief address", "route", "-6 route", "rule")
    return {words: machine.run(["ip", *words.split(), "show"]) for words in commands}


def mounts_of_the_machine() -> set[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return {point for line in lines if not (point := line.split()[4]).startswith("/run/netns")}


def call(*words: str, state_dir: Path) -> subprocess.CompletedProcess[str]:
    """The tool as a user calls it."""
    command = [sys.executable, str(ROOT / "tools" / "testhosts"), "--state-dir", str(state_dir), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_hosts_are_reached_by_name_key_and_known_hosts(make_hosts: MakeHosts) -> None:
    hosts = make_hosts(3)
    for name in ("h1", "h2", "h3"):
        done = run_ssh(hosts, name, "hostname; echo $HOME; tr '\\\\0' ' ' < /proc/1/cmdline")
        assert done.returncode == 0, done.stderr
        host_name, home, first = done.stdout.splitlines()
        assert (host_name, home) == (name, str(hosts.host(name).home))
        assert first.startswith("sshd:")


def test_hosts_see_each_other_and_nothing_else(make_hosts: MakeHosts) -> None:
    hosts = make_hosts(3)
    assert run_ssh(hosts, "h1", "ssh -o BatchMode=yes h2 ssh -o BatchMode=yes h3 hostname").stdout == "h3\n"
    links = run_ssh(hosts, "h2", "ip -brief link").stdout.splitlines()
    assert sorted(line.split()[0].split("@")[0] for line in links) == ["eth0", "lo"]
    assert run_ssh(hosts, "h2", "ip route").stdout.split()[0] == f"10.77.{hosts.layout.network}.0/24"
    numbers = run_ssh(hosts, "h2", "ls /proc | grep -c '^[0-9]*$'").stdout
    assert int(numbers) < 12, "h2 sees processes that are not its own"


def test_a_strange_key_and_a_strange_host_are_refused(make_hosts: MakeHosts, tmp_path: Path) -> None:
    hosts = make_hosts(1)
    machine.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "other")])
    refused = run_ssh(hosts, "-i", str(tmp_path / "other"), "-o", "IdentitiesOnly=yes", "h1", "true")
    assert (refused.returncode, "Permission denied" in refused.stderr) == (255, True)
    unknown = run_ssh(hosts, "-o", f"UserKnownHostsFile={tmp_path}/none", "h1", "true")
    assert (unknown.returncode, "Host key verification failed" in unknown.stderr) == (255, True)


def test_a_shared_file_system_is_shared_and_a_private_one_is_not(make_hosts: MakeHosts, tmp_path: Path) -> None:
    shared, private = tmp_path / "shared", tmp_path / "private"
    shared.mkdir()
    private.mkdir()
    (private / "of_the_machine").touch()
    hosts = make_hosts(2, private_dirs=(private,))
    run_ssh(hosts, "h1", f"touch {shared}/seen {private}/unseen")
    assert run_ssh(hosts, "h1", f"ls {private}").stdout == "unseen\n"
    assert run_ssh(hosts, "h2", f"ls {private}").stdout == ""
    assert run_ssh(hosts, "h2", f"ls {shared}").stdout == "seen\n"
    assert [path.name for path in private.iterdir()] == ["of_the_machine"]


def test_a_cut_host_is_a_time_out_and_joins_again(make_hosts: MakeHosts) -> None:
    hosts = make_hosts(2)
    ticking = run_ssh(hosts, "h2", "setsid sh -c 'while sleep 0.1; do :; done' > /dev/null 2>&1 & echo $!")
    pid = ticking.stdout.strip()
    hosts.cut("h2")
    assert [(row.is_up, row.is_linked) for row in hosts.status()] == [(True, True), (True, False)]
    lost = run_ssh(hosts, "h2", "true")
    assert (lost.returncode, "timed out" in lost.stderr) == (255, True)
    assert run_ssh(hosts, "h1", "true").returncode == 0
    assert run_at(hosts, "test", "-d", f"/proc/{pid}", on="h2").returncode == 0, "a cut host runs on"
    hosts.join("h2")
    wait_until(lambda: run_ssh(hosts, "h2", "true").returncode == 0)
    assert hosts.status()[1].is_linked


def test_a_killed_host_loses_its_processes_and_no_other_does(make_hosts: MakeHosts) -> None:
    hosts = make_hosts(2)
    for name in ("h1", "h2"):
        run_ssh(hosts, name, "setsid sleep 600 > /dev/null 2>&1 &")
    own = subprocess.Popen(["sleep", "600"])
    try:
        assert [row.num_processes for row in hosts.status()] == [2, 2]
        hosts.kill("h1")
        assert [(row.is_up, row.num_processes) for row in hosts.status()] == [(False, 0), (True, 2)]
        assert own.poll() is None
        dead = run_ssh(hosts, "h1", "true")
        assert (dead.returncode, "Connection refused" in dead.stderr) == (255, True)
    finally:
        own.kill()
        own.wait()


def test_a_killed_host_starts_again_with_its_own_key_and_home(make_hosts: MakeHosts) -> None:
    hosts = make_hosts(1)
    run_ssh(hosts, "h1", "touch kept")
    with pytest.raises(HostsError, match="h1 runs already"):
        hosts.start("h1")
    hosts.kill("h1")
    with pytest.raises(HostsError, match="h1 is not up"):
        hosts.command(["true"], on="h1")
    hosts.start("h1")
    done = run_ssh(hosts, "h1", "ls; hostname")
    assert (done.stdout, done.stderr) == ("kept\nh1\n", "")


def test_orphans_on_a_host_are_reaped(make_hosts: MakeHosts) -> None:
    """A launcher's processes are left to the host's first one, as on a real host."""
    hosts = make_hosts(1)
    run_ssh(hosts, "h1", "for i in 1 2 3; do (setsid sleep 0.1 &) ; done")
    wait_until(lambda: "sleep" not in run_ssh(hosts, "h1", "ps -e -o comm=").stdout)


def test_sets_stand_side_by_side(make_hosts: MakeHosts) -> None:
    one, two = make_hosts(1), make_hosts(2)
    assert (one.layout.network, two.layout.network) == (0, 1)
    assert run_ssh(two, "h2", "hostname").stdout == "h2\n"
    one.down()
    assert [row.is_up for row in two.status()] == [True, True]
    with pytest.raises(HostsError, match="is not made"):
        one.status()


def test_all_of_it_is_taken_down_and_the_machine_is_as_it_was(make_hosts: MakeHosts, tmp_path: Path) -> None:
    network, mounts, had_etc = network_of_the_machine(), mounts_of_the_machine(), ETC_NETNS_DIR.exists()
    hosts = make_hosts(3, private_dirs=(tmp_path,))
    assert network_of_the_machine() == network
    layout = hosts.layout
    names = [member.namespace for member in layout.members]
    launcher = subprocess.Popen(hosts.command(["sleep", "600"]))
    run_ssh(hosts, "h2", "setsid sleep 600 > /dev/null 2>&1 &")
    pids = [pid for found in machine.find_processes(names).values() for pid in found]
    assert len(pids) >= 8
    assert hosts.down()
    assert launcher.wait(LIMIT_S) == -signal.SIGKILL, "what runs in the control namespace belongs to the set"
    wait_until(lambda: not any(map(psutil.pid_exists, pids)))  # the machine's init takes note of each in its own time
    assert [namespace_id(name) for name in names] == [None] * 4
    assert not any(member.etc.exists() for member in layout.members)
    assert not layout.folder.exists()
    assert network_of_the_machine() == network
    assert mounts_of_the_machine() == mounts
    assert ETC_NETNS_DIR.exists() == had_etc or list(ETC_NETNS_DIR.iterdir())
    assert not hosts.down()


def test_a_set_that_is_up_is_not_made_again(make_hosts: MakeHosts) -> None:
    hosts = make_hosts(1)
    with pytest.raises(HostsError, match="is made already"):
        HostSet(hosts.name, hosts.state_dir).up(1)
    assert run_ssh(hosts, "h1", "true").returncode == 0


def test_somebody_else_s_namespace_is_left_alone(tmp_path: Path) -> None:
    name = f"x{os.getpid()}"
    machine.run(["ip", "netns", "add", f"fhosts-{name}-h1"])
    try:
        hosts = HostSet(name, tmp_path)
        with pytest.raises(HostsError, match="and not by this tool"):
            hosts.up(1)
        assert not hosts.down()
        assert namespace_id(f"fhosts-{name}-h1") is not None
        assert namespace_id(f"fhosts-{name}-ctl") is None
    finally:
        machine.run(["ip", "netns", "delete", f"fhosts-{name}-h1"])


def test_a_namespace_that_was_made_anew_by_another_is_left_alone(make_hosts: MakeHosts) -> None:
    hosts = make_hosts(1)
    host = hosts.host("h1")
    hosts.kill("h1")
    manifest = read_manifest(hosts.folder)
    assert manifest is not None
    machine.run(["ip", "netns", "delete", host.namespace])
    machine.run(["ip", "netns", "add", "fhosts-keep-number"])
    machine.run(["ip", "netns", "add", host.namespace])
    try:
        if namespace_id(host.namespace) == manifest.namespaces[host.namespace]:
            write_manifest(type(manifest)(manifest.layout, {host.namespace: 1}, manifest.made_etc_netns))
        assert hosts.down()
        assert namespace_id(host.namespace) is not None
    finally:
        machine.run(["ip", "netns", "delete", host.namespace])
        machine.run(["ip", "netns", "delete", "fhosts-keep-number"])


def test_a_set_that_fails_half_way_is_taken_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"y{os.getpid()}"
    monkeypatch.setattr("testhosts.hosts.render_sshd_config", lambda host: f"NoSuchOption {host.name}\n")
    monkeypatch.setattr("testhosts.hosts.BOOT_TIMEOUT_S", 0.5)
    hosts = HostSet(name, tmp_path)
    with pytest.raises(HostsError, match=r"h1 did not start within .*NoSuchOption"):
        hosts.up(2)
    assert namespace_id(f"fhosts-{name}-h1") is None
    assert not hosts.folder.exists()


def test_a_set_whose_making_was_killed_is_taken_down_by_its_manifest(tmp_path: Path) -> None:
    name = f"z{os.getpid()}"
    words = [
        sys.executable,
        str(ROOT / "tools" / "testhosts"),
        "--state-dir",
        str(tmp_path),
        "--name",
        name,
        "up",
        "20",
    ]
    maker = subprocess.Popen(words)
    wait_until(lambda: namespace_id(f"fhosts-{name}-h20") is not None)
    maker.kill()
    maker.wait()
    time.sleep(0.2)  # the child that it was waiting for, an `ip` or an `ssh-keygen`, comes to its own end
    hosts = HostSet(name, tmp_path)
    assert hosts.down()
    assert not any(path.name.startswith(f"fhosts-{name}-") for path in Path("/run/netns").iterdir())
    assert not hosts.folder.exists()


def test_private_folders_that_hosts_cannot_do_without_are_refused(tmp_path: Path) -> None:
    hosts = HostSet(f"p{os.getpid()}", tmp_path)
    for folder, why in ((Path("/usr"), "hosts need"), (Path("/"), "hosts need"), (tmp_path / "none", "is no folder")):
        with pytest.raises(HostsError, match=why):
            hosts.up(1, private_dirs=(folder,))
    with pytest.raises(HostsError, match="expected 1 to 200"):
        hosts.up(0)


def test_the_command_line_does_it_all(tmp_path: Path) -> None:
    name = ("--name", f"c{os.getpid()}")
    try:
        up = call(*name, "up", "2", state_dir=tmp_path)
        assert (up.returncode, up.stderr) == (0, "")
        assert up.stdout == "h1 to h2 are up on 10.77.0.0/24\n"
        assert call(*name, "exec", "--on", "h2", "--", "hostname", state_dir=tmp_path).stdout == "h2\n"
        assert call(*name, "exec", "sh", "-c", "exit 7", state_dir=tmp_path).returncode == 7
        assert call(*name, "exec", "ssh", "h1", "hostname", state_dir=tmp_path).stdout == "h1\n"
        for verb, state in (("cut", "up, cut"), ("join", "up"), ("kill", "dead"), ("start", "up")):
            assert call(*name, verb, "h1", state_dir=tmp_path).returncode == 0
            rows = call(*name, "status", state_dir=tmp_path).stdout.splitlines()
            assert f" {state} " in rows[0]
            assert " up " in rows[1]
        rows = json.loads(call(*name, "status", "--json", state_dir=tmp_path).stdout)
        assert [(row["name"], row["is_up"], row["num_processes"]) for row in rows] == [("h1", True, 1), ("h2", True, 1)]
        wrong = call(*name, "cut", "h9", state_dir=tmp_path)
        assert (wrong.returncode, wrong.stderr.startswith("error: there is no host `h9`")) == (2, True)
        assert call(*name, "exec", state_dir=tmp_path).stderr == "error: exec: there is no command\n"
    finally:
        down = [call(*name, "down", state_dir=tmp_path) for _ in range(2)]
    assert [(done.returncode, done.stdout) for done in down] == [
        (0, "taken down\n"),
        (0, "there was nothing to take down\n"),
    ]
