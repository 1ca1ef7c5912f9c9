"""The hostfile: one machine a line, `[user@]host[:port] slots=N [type=CHIP]`, the first is the master.

`#` starts a comment. Every fault of a file is told, each with its line; a hostfile is never half believed.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from flagscale.errors import Fault

HOST = re.compile(
    r"(?:(?P<user>[A-Za-z_][\w.-]*)@)?(?P<name>[A-Za-z0-9](?:[\w.-]*\w)?|\[[0-9a-fA-F:.]+\])(?::(?P<port>\d{1,5}))?"
)
GRAMMAR = "`[user@]host[:port] slots=N [type=CHIP]`"
SLOTS = re.compile(r"0*[1-9]\d{0,5}")


@dataclass(frozen=True, slots=True)
class Host:
    """A machine of the hostfile. `chip` is the hostfile's `type=`, None where it has none."""

    name: str
    slots: int
    chip: str | None = None
    user: str | None = None
    port: int | None = None
    is_placeholder: bool = False
    """stands for a machine that a scheduler chooses, known once the job starts"""

    @property
    def is_local(self) -> bool:
        return self.name in ("localhost", "127.0.0.1")


def load_hostfile(path: Path, key: str) -> tuple[tuple[Host, ...], list[Fault]]:
    """The hosts of a file, and every fault in it. `key` is the dotted path under which the file was named."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        return (), [Fault(key, f"hostfile {path}: {reason}", expected="a file with one host a line")]
    hosts: list[Host] = []
    names: set[str] = set()
    faults: list[Fault] = []
    for number, line in enumerate(text.split("\n"), 1):
        bare = line.split("#", 1)[0].split()
        if not bare:
            continue
        host, problem = _parse_host(bare)
        if host is not None and host.name in names:
            problem = f"host `{host.name}` stands here a second time"
        if problem:
            faults.append(Fault(key, problem, expected=GRAMMAR, where=f"{path}:{number}"))
        elif host is not None:
            hosts.append(host)
            names.add(host.name)
    if not hosts and not faults:
        faults.append(Fault(key, f"hostfile {path} names no host", expected=GRAMMAR))
    typed = [host for host in hosts if host.chip]
    if typed and len(typed) < len(hosts):
        bare_names = ", ".join(host.name for host in hosts if not host.chip)
        faults.append(Fault(key, f"hostfile {path}: type= is given for some hosts but not for {bare_names}"))
    return tuple(hosts), faults


def _parse_host(words: list[str]) -> tuple[Host | None, str | None]:
    match = HOST.fullmatch(words[0])
    if match is None:
        return None, f"`{words[0]}` is not a host name"
    fields: dict[str, str] = {}
    for word in words[1:]:
        name, separator, value = word.partition("=")
        if not separator or name not in ("slots", "type") or not value or name in fields:
            return None, f"`{word}` cannot be read"
        fields[name] = value
    slots = fields.get("slots", "")
    if not SLOTS.fullmatch(slots):
        return None, f"host `{match['name']}` has " + (f"slots={slots}" if slots else "no slots=")
    port = int(match["port"]) if match["port"] else None
    if port is not None and not 1 <= port <= 65535:
        return None, f"port {port} is not a port"
    return Host(match["name"].strip("[]"), int(slots), fields.get("type"), match["user"], port), None
