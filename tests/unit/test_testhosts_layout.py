"""What a set of test hosts consists of, as a value: no root, no namespaces."""

import json
from pathlib import Path

import pytest
from hosts import HostSet
from hypothesis import given
from hypothesis import strategies as st
from testhosts import machine
from testhosts.layout import (
    MOST_HOSTS,
    plan_host_links,
    plan_layout,
    plan_links,
    render_hosts_file,
    render_known_hosts,
    render_passwd,
    render_sshd_config,
)
from testhosts.machine import HostsError
from testhosts.manifest import Manifest, read_manifest, used_networks, write_manifest

FOLDER = Path("/state/demo")


@given(st.integers(1, MOST_HOSTS), st.integers(0, 255))
def test_no_two_members_share_anything(num_hosts: int, network: int) -> None:
    layout = plan_layout("demo", FOLDER, network, num_hosts)
    for attribute in ("name", "namespace", "address", "link", "folder", "home", "etc"):
        assert len({getattr(member, attribute) for member in layout.members}) == num_hosts + 1
    assert all(member.address.startswith(f"10.77.{network}.") for member in layout.members)
    assert all(len(host.link) <= 15 for host in layout.hosts), "the kernel's limit of a link's name"


def test_the_files_of_a_set() -> None:
    layout = plan_layout("demo", FOLDER, 3, 2)
    assert render_hosts_file(layout).splitlines()[2:] == ["10.77.3.254 ctl", "10.77.3.1 h1", "10.77.3.2 h2"]
    keys = {"h1": "ssh-ed25519 AAAA1 h1\n", "h2": "ssh-ed25519 AAAA2 h2\n"}
    assert render_known_hosts(layout, keys) == "h1,10.77.3.1 ssh-ed25519 AAAA1\nh2,10.77.3.2 ssh-ed25519 AAAA2\n"
    config = render_sshd_config(layout.hosts[1])
    assert "ListenAddress 10.77.3.2\n" in config
    assert "PasswordAuthentication no\n" in config
    assert "AuthorizedKeysFile /state/demo/h2/authorized_keys\n" in config


def test_only_root_moves() -> None:
    machine_s = "root:x:0:0:root:/root:/bin/zsh\nrooty:x:1:1::/home/rooty:/bin/sh\n"
    moved = "root:x:0:0:root:/state/demo/h1/home:/bin/bash\nrooty:x:1:1::/home/rooty:/bin/sh\n"
    assert render_passwd(machine_s, FOLDER / "h1" / "home") == moved


def test_links_are_made_in_the_control_namespace_alone() -> None:
    layout = plan_layout("demo", FOLDER, 0, 2)
    lines = plan_links(layout).splitlines()
    assert lines[1] == "link add br0 type bridge forward_delay 0"
    assert lines[-2:] == ["link add v2 type veth peer name eth0 netns fhosts-demo-h2", "link set v2 master br0 up"]
    assert plan_host_links(layout.hosts[0]).splitlines()[1] == "addr add 10.77.0.1/24 dev eth0"


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    manifest = Manifest(plan_layout("demo", folder, 7, 2, (Path("/tmp/x"),)), {"fhosts-demo-h1": 402}, True)
    assert read_manifest(folder) is None
    write_manifest(manifest)
    assert read_manifest(folder) == manifest
    assert used_networks(tmp_path) == {7}
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "demo", "network": "x"}'])
def test_a_file_that_is_no_manifest_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(HostsError, match="is no manifest of test hosts"):
        read_manifest(tmp_path)


def test_a_manifest_s_keys_are_few(tmp_path: Path) -> None:
    write_manifest(Manifest(plan_layout("demo", tmp_path, 0, 1), {}))
    assert json.loads((tmp_path / "manifest.json").read_text())["num_hosts"] == 1


@pytest.mark.parametrize("name", ["", "A", "a b", "-a", "a-", "../x", "a" * 13])
def test_a_name_that_cannot_be_part_of_a_namespace_s_is_refused(name: str) -> None:
    with pytest.raises(HostsError, match="expected up to 12"):
        HostSet(name)


def test_a_set_that_is_not_made_is_not_taken_down(tmp_path: Path) -> None:
    hosts = HostSet("demo", tmp_path / "state")
    assert not hosts.down()
    assert not (tmp_path / "state").exists()
    with pytest.raises(HostsError, match="the set `demo` is not made: make it with `up N`"):
        hosts.cut("h1")


def test_a_program_that_fails_says_why() -> None:
    with pytest.raises(HostsError, match=r"ls /no/such/folder: .*No such file"):
        machine.run(["ls", "/no/such/folder"])


def test_the_lock_is_waited_for_and_then_given_up(tmp_path: Path) -> None:
    late = machine.lock(tmp_path, timeout_s=0.1)
    with machine.lock(tmp_path), pytest.raises(HostsError, match="another testhosts command has held it"):
        late.__enter__()
    with machine.lock(tmp_path):
        pass


def test_without_root_the_reason_is_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert machine.missing() == "test hosts are network namespaces: they need root"


def test_a_missing_program_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(machine, "PROGRAMS", ("sh", "no-such-sshd"))
    reason = machine.missing()
    assert reason is not None
    assert reason.startswith("there is no no-such-sshd: apt-get install")
