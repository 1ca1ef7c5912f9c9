"""What a connection to a host can do, whichever client makes it, and the words for why there is none.

Two clients: Paramiko (`link.py`), and the machine's own `ssh` (`openssh.py`) for who needs all of its configuration,
jump hosts and agents. Both check host keys, and neither ever asks the terminal for anything.
"""

import subprocess
from typing import Protocol

from flagscale.runner.launch.folder import Remote


class LinkError(Exception):
    """A host cannot be reached, or broke off; the message says why, for one row of a table."""


class Connection(Protocol):
    """An open connection to one host.

    Raises:
        LinkError: it broke off, or did not answer in time.
    """

    def run(self, words: list[str], text: bytes, limit_s: float) -> tuple[int, bytes, bytes]:
        """Exit code, output and errors of a command; `text` is its input. Its words arrive as they are."""

    def close(self) -> None: ...


class HereConnection:
    """Commands of this machine itself, which enter one of its containers."""

    def run(self, words: list[str], text: bytes, limit_s: float) -> tuple[int, bytes, bytes]:
        try:
            done = subprocess.run(words, input=text, capture_output=True, timeout=limit_s, start_new_session=True)
        except FileNotFoundError:
            return 127, b"", f"{words[0]}: command not found".encode()
        except subprocess.TimeoutExpired:
            raise LinkError(describe_break(f"no answer within {limit_s:g} s", "this machine")) from None
        return done.returncode, done.stdout, done.stderr

    def close(self) -> None: ...


def open_connection(remote: Remote, accept_new: bool, timeout_s: float) -> Connection:
    """
    Raises:
        LinkError: the host cannot be reached.
    """
    if remote.client == "local":
        return HereConnection()
    if remote.client == "openssh":
        from flagscale.runner.launch.openssh import OpenSSH

        return OpenSSH(remote, accept_new, timeout_s)
    from flagscale.runner.launch.link import Link

    return Link(remote, accept_new, timeout_s)


def describe_changed_key(remote: Remote, now: str) -> str:
    return (
        f"its host key has changed ({now}); if the machine was made anew, `ssh-keygen -R {remote.name}`, "
        "else do not trust it"
    )


def describe_unknown_key(remote: Remote, key: str) -> str:
    return (
        f"its host key is unknown ({key}); connect once by `ssh {remote}`, or set "
        "`experiment.runner.accept_new_host_keys: true`"
    )


def describe_refusal(remote: Remote, user: str, route: str) -> str:
    return f"lets {user} in by none of this user's keys ({route}); expected that `ssh {remote}` asks nothing"


def describe_timeout(timeout_s: float, route: str) -> str:
    return f"cannot be reached: no answer within {timeout_s:g} s ({route})"


def describe_unknown_name(name: str) -> str:
    return f"cannot be reached: the name `{name}` is not known"


def describe_unreachable(why: str, route: str) -> str:
    return f"cannot be reached: {why} ({route})"


def describe_break(why: str, route: str) -> str:
    return f"was reached, and then: {why} ({route})"
