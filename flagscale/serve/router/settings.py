"""What can be set about a router: one frozen model, each field with its unit and what happens beyond it.

The defaults suit large models: a first byte may take minutes (long prompts, full queues), silence in a stream may not.
"""

import ipaddress
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

PolicyName = Literal["round_robin", "least_load", "power_of_two", "prefix_aware", "session"]
PairPolicyName = Literal["slo", "robin", "random"]
Role = Literal["whole", "prefill", "decode"]
"""what a replica does of a request: all of it, or its prompt, or what follows the prompt"""
Handover = Literal["p2p", "nixl", "store", "bootstrap"]
"""how a prompt's cache gets from one replica to another, see `handover.py`"""

_KIB = 1024


class RouterSettings(BaseModel):
    """Everything that can be set about a router."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    host: str = "127.0.0.1"
    """Address to listen on. One beyond loopback needs `api_keys`."""

    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one, which is told at the start."""

    api_keys: tuple[SecretStr, ...] = ()
    """Keys that a caller may present as `Authorization: Bearer …`; with none, callers need no key and a key that
    they send goes on to the replica, unless that has one of its own."""

    admin_token: SecretStr | None = None
    """What who adds and removes replicas from outside shows as `Authorization: Bearer …`; without it nobody may."""

    registered_timeout_s: float = Field(300, gt=0)
    """How long a replica that was added from outside may fail every probe, in seconds; then it is removed."""

    policy: PolicyName = "least_load"
    """How a replica is chosen. `prefix_aware` sends prompts that begin alike to the same replica, whose cache then
    has them; `session` does it by `session_header` or the request's `user`; both fall back to `least_load`."""

    pair_policy: PairPolicyName = "slo"
    """How the prefill and the decode replica of a request are chosen, where a model is served by such pairs: `slo` by
    the fewest tokens in flight, `robin` by the fewest requests, `random` by chance."""

    prefix_chars: int = Field(1024, ge=1)
    """`prefix_aware`: how many characters of a prompt's beginning decide."""

    session_header: str = "x-session-id"
    """`session`: the request header that names a session; it goes before the body's `user`."""

    load_bound: float = Field(1.25, gt=1)
    """`prefix_aware`: a replica takes at most this many times its fair share of the requests in flight."""

    connect_timeout_s: float = Field(5, gt=0)
    """How long a connection to a replica may take, in seconds."""

    first_byte_timeout_s: float = Field(600, gt=0)
    """How long a replica may take until the first byte of an answer's body, in seconds."""

    idle_timeout_s: float = Field(60, gt=0)
    """How long an answer that has begun may stand still, at the replica or at the caller, in seconds."""

    header_timeout_s: float = Field(10, gt=0)
    """How long a caller may take from the connection to the end of its request's headers, in seconds."""

    body_timeout_s: float = Field(60, gt=0)
    """How long a caller may take to send a request's body, in seconds; 408 beyond."""

    max_header_bytes: int = Field(64 * _KIB, ge=1 * _KIB)
    """The largest request line with headers."""

    max_body_bytes: int = Field(32 * _KIB * _KIB, ge=1)
    """The largest request body; 413 beyond."""

    retries: int = Field(2, ge=0)
    """How often a request is tried again, on other replicas, while no byte of an answer has come."""

    retry_timeouts: bool = True
    """Whether a request whose first byte did not come in time counts among those: some work may then be done twice."""

    hold_requests: int = Field(256, ge=0)
    """How many requests may wait while no replica of their model is ready; 503 beyond."""

    hold_timeout_s: float = Field(60, ge=0)
    """How long a request may wait for a ready replica, in seconds; 503 beyond."""

    drain_timeout_s: float = Field(30, ge=0)
    """How long requests in flight may go on after SIGTERM, in seconds; then they are cut, with an error."""

    breaker_failures: int = Field(3, ge=1)
    """How many failures in a row take a replica out; answers below 500 are none."""

    breaker_open_s: float = Field(1, gt=0)
    """How long a replica is left alone before it is probed again, in seconds; doubles with each failed probe."""

    breaker_open_max_s: float = Field(10, gt=0)
    """The longest that it is left alone, in seconds."""

    probe_interval_s: float = Field(10, gt=0)
    """How often a ready replica is probed that has answered nobody in the meantime, in seconds."""

    probe_timeout_s: float = Field(30, gt=0)
    """How long a probe's one token may take, in seconds."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.breaker_open_max_s < self.breaker_open_s:
            raise ValueError(
                f"breaker_open_max_s: {self.breaker_open_max_s} is less than breaker_open_s: {self.breaker_open_s}"
            )
        if not self.api_keys and not is_loopback(self.host):
            raise ValueError(
                f"host: {self.host} is reached from other machines, so `api_keys` needs at least one key"
                "; or listen on 127.0.0.1"
            )
        if any(not key.get_secret_value().strip() for key in self.api_keys):
            raise ValueError("api_keys: an empty key would let everybody in")
        if self.admin_token is not None and not self.admin_token.get_secret_value().strip():
            raise ValueError("admin_token: an empty token would let everybody add replicas")
        return self


def is_loopback(host: str) -> bool:
    """Whether `host` names this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
