"""What the agents of one run tell each other where no folder is shared: datagrams, by way of the head host's agent.

The agent of the first host listens on UDP, under the number of the ranks' own port. Each other one tells it every few
seconds that it lives, and why the run is ending as soon as that is so; the head's agent answers, and passes a notice
on to all at once. So each learns of the first failure within a second or two, misses a host that has gone silent, and
needs no launcher for it. A datagram is signed with a key of the run, which it does not hold, and numbers only go up:
whoever has no key can forge none, and cannot send an old one again.

The trade-off: datagrams may be lost, so what matters is said again until the run has ended; and a network that lets
none through looks like one where nobody speaks, so a host that was never heard is never missed.
"""

import contextlib
import hmac
import json
import socket
import time
from dataclasses import asdict, dataclass
from typing import Any

from flagscale.runner.launch.journal import Spec
from flagscale.runner.launch.notice import Notice

MOST_BYTES = 4096
MOST_REASON = 400
DIGEST = "sha256"
DIGEST_BYTES = 64
RESOLVE_EVERY_S = 60.0
ANSWER_S = 3.0
NUM_FAREWELLS = 5
AGAIN_S = 0.1


@dataclass(slots=True)
class Heard:
    """Of one other agent: where it speaks from, when it did by our own clock, and the number of its last word."""

    address: Any
    when: float
    count: int
    is_leaving: bool = False


def pack(key: str, row: dict[str, Any]) -> bytes:
    body = json.dumps(row).encode()
    return hmac.new(key.encode(), body, DIGEST).hexdigest().encode() + body


def unpack(key: str, packet: bytes) -> dict[str, Any] | None:
    """None for whatever was not signed with the key."""
    digest, body = packet[:DIGEST_BYTES], packet[DIGEST_BYTES:]
    if not hmac.compare_digest(hmac.new(key.encode(), body, DIGEST).hexdigest().encode(), digest):
        return None
    row: dict[str, Any] = json.loads(body)
    return row


def open_listener(port: int) -> socket.socket:
    """On every address of this machine, of both families where it has both.

    Raises:
        OSError: the port is taken.
    """
    if socket.has_dualstack_ipv6():
        listener = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(("::", port))
    else:
        listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        listener.bind(("", port))
    return listener


class Wire:
    """One agent's end; owns its socket. Nothing waits for anybody here but `ask` and `leave`, seconds at most."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.heard: dict[str, Heard] = {}
        self.socket: socket.socket | None = None
        self.next_resolve = 0.0
        self.next_word = 0.0
        self.refused_since: float | None = None
        self.said: Notice | None = None
        self.is_leaving = False
        if spec.leads:
            self.socket = open_listener(spec.meet_port)
            self.socket.setblocking(False)

    def exchange(self, notice: Notice | None) -> Notice | None:
        """Say what is to be said, a new `notice` at once; returns one that another agent has told, or None."""
        now = time.monotonic()
        self._connect(now)
        is_due = notice != self.said or now >= self.next_word
        self.said = notice  # what is answered now holds it already
        told = self._listen()
        if is_due:
            self.next_word = now + (1.0 if notice else self.spec.heartbeat_s)
            self._speak()
        return told

    def ask(self, notice: Notice | None) -> Notice | None:
        """As `exchange`, and wait for the head's answer: whoever fails asks whether another failed before."""
        begin = time.monotonic()
        told = self.exchange(notice)
        while not (told or self.spec.leads or self._has_answered(begin)) and time.monotonic() < begin + ANSWER_S:
            self._speak()
            time.sleep(AGAIN_S)
            told = self._listen()
        return told

    def _has_answered(self, since: float) -> bool:
        return any(other.when > since for other in self.heard.values())

    def find_silence(self, limit_s: float) -> str | None:
        """What to say of an agent that was heard and is not any more, or of a head host without any."""
        late = time.monotonic() - limit_s
        for label, other in self.heard.items():
            if not other.is_leaving and other.when <= late:
                return f"no word from {label} for {limit_s:g} s"
        if self.refused_since is not None and self.refused_since <= late and not self._is_left():
            return f"no agent of this run listens on {self.spec.meet_host} for {limit_s:g} s"
        return None

    def leave(self, notice: Notice | None) -> None:
        """Say that this agent ends, so that it is not missed, and why, if the others are to end too."""
        self.is_leaving, self.said = True, notice
        for _ in range(NUM_FAREWELLS if self.heard else 0):
            self._speak()
            time.sleep(AGAIN_S)
            self._listen()
        if self.socket is not None:
            self.socket.close()
            self.socket = None

    def _is_left(self) -> bool:
        return any(other.is_leaving for other in self.heard.values())

    def _connect(self, now: float) -> None:
        """Find the head's address; a name that is not known may be known in a minute."""
        if self.socket is not None or now < self.next_resolve:
            return
        self.next_resolve = now + RESOLVE_EVERY_S
        with contextlib.suppress(OSError):
            rows = socket.getaddrinfo(self.spec.meet_host, self.spec.meet_port, type=socket.SOCK_DGRAM)
            family, kind, protocol, _, address = rows[0]
            speaker = socket.socket(family, kind, protocol)
            speaker.setblocking(False)
            speaker.connect(address)
            self.socket = speaker

    def _speak(self) -> None:
        """The head's agent to all that it has heard, each other one to the head's."""
        if not self.spec.leads:
            self._send(None)
        for other in self.heard.values() if self.spec.leads else ():
            self._send(other.address)

    def _send(self, address: Any) -> None:
        if self.socket is None:
            return
        said = self.said and asdict(Notice(self.said.label, self.said.reason[:MOST_REASON], self.said.is_forced))
        row = {"from": self.spec.label, "count": time.time_ns(), "notice": said, "is_leaving": self.is_leaving}
        packet = pack(self.spec.meet_key, row)
        try:
            self.socket.send(packet) if address is None else self.socket.sendto(packet, address)
        except ConnectionRefusedError:
            self._note_refusal()
        except OSError:
            return  # a cable that is out: it is said again

    def _note_refusal(self) -> None:
        """The head host lives, and nobody listens there."""
        if self.refused_since is None:
            self.refused_since = time.monotonic()

    def _listen(self) -> Notice | None:
        """Take all that has come; the head's agent answers each word."""
        told: Notice | None = None
        while self.socket is not None:
            try:
                packet, address = self.socket.recvfrom(MOST_BYTES)
            except ConnectionRefusedError:
                self._note_refusal()
                continue
            except OSError:
                break
            row = unpack(self.spec.meet_key, packet)
            known = self.heard.get(row["from"]) if row else None
            if row is None or (known is not None and row["count"] <= known.count):
                continue
            self.heard[row["from"]] = Heard(address, time.monotonic(), row["count"], row["is_leaving"])
            self.refused_since = None
            if row["notice"]:
                told = told or Notice(**row["notice"])
            if self.spec.leads and not row["is_leaving"]:
                self._send(address)
        return told
