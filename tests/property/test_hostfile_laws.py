"""A hostfile is read back as it was written, or told to be wrong: it is never half believed, and never a traceback."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flagscale.runner.config.hostfile import Host, load_hostfile

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
names = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,10}[A-Za-z0-9])?", fullmatch=True)
hosts = st.builds(
    Host,
    names,
    st.integers(1, 999_999),
    st.just("A800"),
    st.none() | st.from_regex(r"[a-z_][a-z0-9_-]{0,6}", fullmatch=True),
    st.none() | st.integers(1, 65535),
)
gaps = st.sampled_from([" ", "\t", "   "])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hosts") / "hostfile.txt"


@quick
@given(
    rows=st.lists(hosts, min_size=1, max_size=5, unique_by=lambda host: host.name),
    gap=gaps,
    comment=st.sampled_from(["", " # why", "\n", "\n# alone\n\n", "\r"]),
    swap=st.booleans(),
)
def test_what_was_written_is_read(path: Path, rows: list[Host], gap: str, comment: str, swap: bool) -> None:
    lines = []
    for host in rows:
        address = (f"{host.user}@" if host.user else "") + host.name + (f":{host.port}" if host.port else "")
        words = [f"slots={host.slots}", f"type={host.chip}"]
        lines.append(gap.join([address, *(reversed(words) if swap else words)]) + comment)
    path.write_text("\n".join(lines) + "\n", newline="")
    assert load_hostfile(path, "k") == (tuple(rows), [])


@quick
@given(st.text(st.sampled_from("ab1.:@=#[] \n\tslottype=\0\u0661é;$'\"/-")))
def test_any_text_gives_hosts_or_faults(path: Path, text: str) -> None:
    path.write_text(text, newline="")
    found, faults = load_hostfile(path, "k")
    assert found or faults
    assert all(str(fault) for fault in faults)
    for host in found:
        assert host.slots >= 1
        assert not set(host.name) & set(" /;$'\"#=\0\n@")


@quick
@given(st.binary(max_size=60))
def test_any_bytes_too(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    found, faults = load_hostfile(path, "k")
    assert found or faults
