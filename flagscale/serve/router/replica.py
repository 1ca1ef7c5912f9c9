"""An engine server behind the router: how it is named and reached, and what is told of it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args
from urllib.parse import urlsplit

from pydantic import SecretStr

from flagscale.errors import UserError
from flagscale.serve.router.breaker import BreakerState
from flagscale.serve.router.settings import Handover, Role

Phase = Literal["starting", "ready", "failing", "draining"]
NEED_ADDRESS: Mapping[str, tuple[Role, ...]] = {"p2p": ("prefill", "decode"), "bootstrap": ("prefill",)}
"""handover -> roles whose caches are reached at an address that the router must know"""
_ADDRESS = re.compile(r"[\w.:\[\]-]+:\d{1,5}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Replica:
    """One engine server that answers OpenAI's API for one model.

    `url` is its root, without `/v1` (`http://h1:8000`); `api_key` is the replica's own, never the caller's; `weight` is
    its capacity relative to the others'; `version` is free text that tells an update's replicas from the ones before.
    A prefill replica works in a pair with a decode replica of the same version and `handover`; `kv_address` is where
    its caches are reached, `host:port`. `is_registered` is one that was added from outside.
    Raises UserError where it cannot be right.
    """

    id: str
    url: str
    model: str
    api_key: SecretStr | None = None
    weight: float = 1.0
    version: str = ""
    role: Role = "whole"
    handover: Handover | None = None
    kv_address: str = ""
    is_registered: bool = False

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise UserError(f"replica {self.id}: url {self.url!r}; expected http://host:port")
        if not self.weight > 0:
            raise UserError(f"replica {self.id}: weight {self.weight}; expected more than 0")
        if (self.role == "whole") != (self.handover is None):
            expected = "none for a whole one" if self.role == "whole" else f"one of {', '.join(get_args(Handover))}"
            raise UserError(f"replica {self.id}: {self.role}, with handover {self.handover}; expected {expected}")
        if self.kv_address and not _ADDRESS.fullmatch(self.kv_address):
            raise UserError(f"replica {self.id}: kv_address {self.kv_address!r}; expected host:port")
        if not self.kv_address and self.role in NEED_ADDRESS.get(self.handover or "", ()):
            raise UserError(f"replica {self.id}: no kv_address; {self.handover} needs that of a {self.role} replica")

    def url_of(self, path: str) -> str:
        """The address of `path`, which starts with `/`."""
        return self.url.rstrip("/") + path


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """A replica at one moment.

    `phase` is `starting` until the first probe passed, `failing` while the breaker lets nothing through, `draining`
    once it takes no new requests. `reason` is what failed last, empty once it answers again. `first_byte_s` is a moving
    average over requests, None before the first.
    """

    id: str
    url: str
    model: str
    version: str
    weight: float
    phase: Phase
    breaker: BreakerState
    reason: str
    in_flight: int
    requests: int
    failures: int
    first_byte_s: float | None
    role: Role = "whole"
    kv_address: str = ""
    is_registered: bool = False

    @property
    def is_ready(self) -> bool:
        return self.phase == "ready"
