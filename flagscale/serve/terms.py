"""What a planned service means on this machine: its router's settings, its seats, its threads."""

import os
from collections.abc import Mapping
from dataclasses import replace

from pydantic import SecretStr, ValidationError

from flagscale.errors import UserError
from flagscale.runner.plan.service import ServicePlan
from flagscale.serve.router.settings import RouterSettings


def make_settings(service: ServicePlan, environ: Mapping[str, str]) -> RouterSettings:
    """The router's settings, with the key of its callers.

    Raises:
        UserError: they cannot be right, as where an address beyond the loopback has no key.
    """
    key = environ.get(service.api_key_env, "") if service.api_key_env else ""
    keys = (SecretStr(key),) if key else ()
    token = environ.get(service.admin_token_env, "") if service.admin_token_env else ""
    admin = {"admin_token": SecretStr(token)} if token else {}
    try:
        return RouterSettings(host=service.host, port=service.port, api_keys=keys, **admin, **dict(service.router))
    except ValidationError as error:
        rows = error.errors(include_url=False, include_context=False, include_input=False)
        told = "\n".join(
            f"experiment.runner.deploy.{'.'.join(['router', *map(str, row['loc'])])}: {row['msg']}"
            if row["loc"]
            else f"experiment.runner.deploy: {row['msg'].removeprefix('Value error, ')}"
            for row in rows
        )
        raise UserError(told) from None


def limit_seats(service: ServicePlan) -> ServicePlan:
    """The service without seats whose chips this machine does not have: an update then knows that it has no room."""
    from flagscale.chips.probe import probe_host

    seats = [seat for model in service.models for seat in model.seats]
    if not any(thing.startswith("localhost/") for seat in seats for thing in seat.takes[1:]):
        return service
    present = {f"localhost/{device.index}" for device in probe_host().devices}
    models = (
        replace(
            model,
            seats=tuple(
                seat
                for seat in model.seats
                if all(thing in present or not thing.startswith("localhost/") for thing in seat.takes[1:])
            ),
        )
        for model in service.models
    )
    return replace(service, models=tuple(models))


def count_threads(service: ServicePlan) -> int:
    """How many threads a replica on this machine's CPU gets: all divided by the replicas that begin here."""
    firsts = sum(
        all(host.host.is_local for host in seat.job.hosts)
        for model in service.models
        for seat in model.seats[: model.scaling.initial]
    )
    return max(1, len(os.sched_getaffinity(0)) // max(1, firsts))
