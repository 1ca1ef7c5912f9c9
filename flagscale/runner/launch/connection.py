"""What a connection to a host can do, whichever client makes it, and the words for why there is none.

Two clients: Paramiko (`link.py`), and the machine's own `ssh` (`openssh.py`) for who needs all of its configuration,
jump hosts and agents. Both check host keys, and neither ever asks the terminal for anything.
"""

import contextlib
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from flagscale.runner.launch.folder import Remote

HERE = "this machine"
CLOSE_S = 5.0
MISSING = 127
"""the exit code of a shell for a program that is not there"""


class LinkError(Exception):
    """A host cannot be reached, or broke off; the message says why, for one row of a table."""


class ProgramEndedError(Exception):
    """A program that was asked something ended instead of answering."""

    def __init__(self, code: int, err: bytes) -> None:
        super().__init__(f"exit code {code}")
        self.code, self.err = code, err


class Dialog(Protocol):
    """A program on a host that answers each line with a line. It ends with its input, so that `close` ends it."""

    def ask(self, text: bytes, limit_s: float) -> bytes:
        """Send `text`, whose last line is a question, and return the answer.

        Raises:
            LinkError: the connection broke off, or no answer came in time.
            ProgramEndedError: there will be none.
        """

    def close(self) -> None: ...


class Connection(Protocol):
    """An open connection to one host.

    Raises:
        LinkError: it broke off, or did not answer in time.
    """

    def start(self, words: list[str]) -> Dialog:
        """Start a command to speak with. Its words arrive as they are."""

    def run(self, words: list[str], text: bytes, limit_s: float) -> tuple[int, bytes, bytes]:
        """Exit code, output and errors of a command; `text` is its input. Its words arrive as they are."""

    def close(self) -> None: ...


class PipeDialog:
    """A dialog through the pipes of a process of this machine, which it owns.

    route: what to call the host
    failed: the exit code by which the process says that it was the connection that failed

    Raises:
        ProgramEndedError: there is no such program.
    """

    def __init__(
        self, words: Sequence[str], route: str, env: Mapping[str, str] | None = None, failed: int | None = None
    ) -> None:
        self.route, self.failed = route, failed
        self.rest, self.said = b"", bytearray()
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 it is closed with the dialog
        pipe = subprocess.PIPE
        try:
            self.process = subprocess.Popen(
                words, bufsize=0, stdin=pipe, stdout=pipe, stderr=self.errors, env=env, start_new_session=True
            )
        except FileNotFoundError:
            self.errors.close()
            raise ProgramEndedError(MISSING, f"{words[0]}: command not found".encode()) from None
        assert self.process.stdin
        assert self.process.stdout
        self.input, self.output = self.process.stdin, self.process.stdout
        os.set_blocking(self.input.fileno(), False)

    def ask(self, text: bytes, limit_s: float) -> bytes:
        deadline = time.monotonic() + limit_s
        self.rest += text  # what a line was answered before is still to be sent
        while (end := self.said.find(b"\n")) < 0:
            poll = select.poll()
            poll.register(self.output, select.POLLIN)
            if self.rest:
                poll.register(self.input, select.POLLOUT)
            ready = dict(poll.poll(1000 * max(0.0, deadline - time.monotonic())))
            if not ready:
                raise LinkError(describe_break(f"no answer within {limit_s:g} s", self.route))
            if self.input.fileno() in ready:
                self._send()
            if self.output.fileno() in ready:
                chunk = self.output.read(1 << 16)
                if not chunk:
                    raise self._explain_end()
                self.said += chunk
        line = bytes(self.said[:end])
        del self.said[: end + 1]
        return line

    def _send(self) -> None:
        try:
            self.rest = self.rest[self.input.write(self.rest) or 0 :]
        except BrokenPipeError:
            self.rest = b""  # why it has ended is known when its output ends

    def _explain_end(self) -> Exception:
        code = self._wait()
        self.errors.seek(0)
        err = self.errors.read()
        if code == self.failed:
            said = err.decode(errors="replace").strip().splitlines()
            return LinkError(describe_break(said[-1] if said else "broke off", self.route))
        return ProgramEndedError(code, err)

    def _wait(self) -> int:
        try:
            return self.process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.input.close()
        self.output.close()
        self._wait()
        self.errors.close()


class HereConnection:
    """Commands of this machine itself, which enter one of its containers."""

    def start(self, words: list[str]) -> Dialog:
        return PipeDialog(words, HERE)

    def run(self, words: list[str], text: bytes, limit_s: float) -> tuple[int, bytes, bytes]:
        try:
            done = subprocess.run(words, input=text, capture_output=True, timeout=limit_s, start_new_session=True)
        except FileNotFoundError:
            return MISSING, b"", f"{words[0]}: command not found".encode()
        except subprocess.TimeoutExpired:
            raise LinkError(describe_break(f"no answer within {limit_s:g} s", HERE)) from None
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
