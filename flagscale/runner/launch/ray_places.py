"""The launcher's side of places in a Ray cluster: asking the cluster at its door, and every place through it.

The door is a machine that belongs to the cluster: this one, or a host that SSH reaches. What runs there is
`ray_place.py`, so that the launcher itself needs no Ray. `PlaceLinks` asks the places as `Links` asks hosts, so that a
place is checked by the same errands as a host of the hostfile.
"""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flagscale.chips import find_chip
from flagscale.errors import LaunchError
from flagscale.runner.launch.archive import RAY_ERRANDS, build_archive
from flagscale.runner.launch.errands import BOOT
from flagscale.runner.launch.folder import Remote
from flagscale.runner.launch.reach import ASK_LIMIT_S, Links, Reply, pack_archive, pack_request, read_reply
from flagscale.runner.plan.job import HostPlan

MARGIN_S = 60.0


@dataclass(frozen=True, slots=True)
class Door:
    """How a Ray cluster is asked. remote: None for this machine

    env: what lets one in (RAY_AUTH_MODE, ..)
    connect_s: given to the cluster to come up, seconds
    """

    address: str
    name: str
    links: Links
    remote: Remote | None
    env: Mapping[str, str]
    connect_s: float

    def ask(self, act: str, limit_s: float, **request: object) -> dict[str, Any]:
        """
        Raises:
            LaunchError: the cluster cannot be asked, or does not do it, and why.
        """
        row = {
            "act": act,
            "address": self.address,
            "name": self.name,
            "env": dict(self.env),
            "connect_s": self.connect_s,
        }
        text = pack_archive(build_archive(RAY_ERRANDS)) + pack_request("ray", {**row, **request})
        words = [self.remote.python if self.remote else sys.executable, "-I", "-c", BOOT.format(module="ray_errands")]
        limit_s += self.connect_s + MARGIN_S
        if self.remote is not None:
            reply = self.links.run_all({self.remote.label: (words, text)}, limit_s)[self.remote.label]
        else:
            reply = _run_here(words, text, limit_s)
        if fault := reply.fault or reply.answer.get("fault"):
            where = self.remote.name if self.remote else "this machine"
            raise LaunchError(f"Ray, asked on {where}: {fault}")
        return dict(reply.answer)


def _run_here(words: list[str], text: bytes, limit_s: float) -> Reply:
    try:
        done = subprocess.run(
            words, input=text, capture_output=True, timeout=limit_s, check=False, cwd="/", start_new_session=True
        )
    except subprocess.TimeoutExpired:
        return Reply({}, f"no answer within {limit_s:g} s")
    except OSError as error:
        return Reply({}, str(error))
    return read_reply(
        words, done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    )


def describe_place(host: HostPlan, pin: str | None) -> dict[str, Any]:
    """What one host of a plan asks for (`ray_place.choose_bundle`).

    pin: a resource that only its node has; None leaves the node to the name of a hostfile, or to Ray
    """
    chip = find_chip(host.host.chip) if host.host.chip else None
    names = [host.host.chip] if host.host.chip else []
    names += [chip.name] if chip else []  # and none of its aliases: an A800 is no H100
    is_named = pin is None and not host.host.is_placeholder
    return {
        "slots": host.host.slots,
        "chip": list(dict.fromkeys(names)) or ["slot"],
        "device": chip.device if chip else "cuda" if host.host.chip in (None, "gpu") else "",
        "pin": pin,
        "host": host.host.name if is_named else None,
        "visible": list(chip.visible_devices) if chip else ["CUDA_VISIBLE_DEVICES"],
    }


class PlaceLinks(Links):
    """`Links` to places: every question to all of them is one to the door."""

    def __init__(self, hosts: Sequence[HostPlan], places: Sequence[Mapping[str, str]], door: Door) -> None:
        pairs = zip(hosts, places, strict=True)
        super().__init__(
            [Remote(host.label, at["hostname"], None, None, host.python or sys.executable) for host, at in pairs]
        )
        self.door = door

    def call(
        self, errand: str, requests: Mapping[str, Mapping[str, Any]], limit_s: float = ASK_LIMIT_S
    ) -> dict[str, Reply]:
        packed = {
            label: (
                [self.remotes[label].python, *self.flags, "-c", self.boot],
                pack_archive(self.archive) + pack_request(errand, request),
            )
            for label, request in requests.items()
        }
        return self.run_all(packed, limit_s)

    def run_all(self, commands: Mapping[str, tuple[list[str], bytes]], limit_s: float) -> dict[str, Reply]:
        rows = [
            [commands[label][0], commands[label][1].decode("latin-1")] if label in commands else []
            for label in self.remotes
        ]
        answer = self.door.ask("call", limit_s, commands=rows, command_limit_s=limit_s)
        asked = [label for label in self.remotes if label in commands]
        return {
            label: read_reply(commands[label][0], *result)
            for label, result in zip(asked, answer["results"], strict=True)
        }
