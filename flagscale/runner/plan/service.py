"""A service as a value: its models, and for each the places that replicas of it can take.

A seat is a whole plan of one replica. There are more seats than replicas, as far as chips go, so that a service can
grow and so that an update can start a new replica before it ends an old one. Two seats that take the same thing, a chip
or a folder, are never filled at the same time; which ones are filled is known to the controller alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flagscale.runner.plan.job import JobPlan, decode_plan, encode_plan

ENGINE_KEY = "FLAGSCALE_ENGINE_KEY"
"""The variable under which the controller hands the key of its own engines to a launch."""
REPLICA_TASK = "replica"
"""`JobPlan.task` of a replica: its run belongs to a service and stands in no list of its own."""


@dataclass(frozen=True, slots=True)
class Seat:
    """A place for one replica.

    takes: what no other replica may have at that time: its folder, and `host/device` for each chip
    """

    job: JobPlan
    takes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Scaling:
    """How many replicas there are. The delays are seconds; target is of requests in flight and waiting, a replica."""

    initial: int = 1
    lowest: int = 1
    highest: int = 1
    target: float = 2.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """One model of a service.

    name: its serve_id; served_name: what a request calls it
    """

    name: str
    engine: str
    served_name: str
    scaling: Scaling
    seats: tuple[Seat, ...]


@dataclass(frozen=True, slots=True)
class ServicePlan:
    """A whole service.

    api_key_env: the environment variable that holds the key of its callers; empty where they need none
    router: further settings of the router, by name
    """

    name: str
    exp_dir: str
    host: str
    port: int
    api_key_env: str
    models: tuple[ModelPlan, ...]
    router: tuple[tuple[str, Any], ...] = ()
    start_timeout_s: float = 1800.0
    host_lost_after_s: float = 120.0

    @property
    def url(self) -> str:
        """Where this machine reaches it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


def list_first_jobs(service: ServicePlan) -> list[JobPlan]:
    """The replicas that a service begins with."""
    return [seat.job for model in service.models for seat in model.seats[: model.scaling.initial]]


def encode_service(service: ServicePlan) -> dict[str, Any]:
    """The service as JSON values."""
    models = [
        {
            "name": model.name,
            "engine": model.engine,
            "served_name": model.served_name,
            "scaling": {name: getattr(model.scaling, name) for name in Scaling.__dataclass_fields__},
            "seats": [{"job": encode_plan(seat.job), "takes": list(seat.takes)} for seat in model.seats],
        }
        for model in service.models
    ]
    fields = {name: getattr(service, name) for name in ServicePlan.__dataclass_fields__}
    return {**fields, "models": models, "router": dict(service.router)}


def decode_service(row: Mapping[str, Any]) -> ServicePlan:
    """The inverse of `encode_service`.

    Raises:
        UserError: it was written by a version of this toolkit that this one cannot read.
    """
    models = tuple(
        ModelPlan(
            **{
                **model,
                "scaling": Scaling(**model["scaling"]),
                "seats": tuple(Seat(decode_plan(seat["job"]), tuple(seat["takes"])) for seat in model["seats"]),
            }
        )
        for model in row["models"]
    )
    return ServicePlan(**{**row, "models": models, "router": tuple(row["router"].items())})
