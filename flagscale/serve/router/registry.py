"""Replicas from outside: whoever has the token adds engines that nobody here started, and takes them out again.

    PUT    /replicas/{id}    {"url", "model", "role", "handover", "kv_address", "api_key", "weight", "version"}
    DELETE /replicas/{id}    lets its requests finish, then forgets it

A registered replica is as any other: it gets requests once it passes a probe and none while it fails. It is removed for
good when it has failed every probe for `registered_timeout_s`. Nothing is written down, so one that is to outlive the
router repeats its PUT now and then, which changes nothing while it is there. Those that were not registered are not
touched: whoever keeps them knows better.
"""

import hmac
import re
from typing import cast

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from starlette.requests import Request as Asked
from starlette.responses import JSONResponse, Response

from flagscale.errors import UserError
from flagscale.serve.router.answers import Refusal
from flagscale.serve.router.pool import Pool
from flagscale.serve.router.replica import Replica
from flagscale.serve.router.request import CallerLeftError, Receive, parse_body, read_body
from flagscale.serve.router.settings import Handover, Role, RouterSettings

_NAME = re.compile(r"[\w.-]{1,100}", re.ASCII)


class Registration(BaseModel):
    """The body of a PUT: what `Replica` has."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    url: str
    model: str = Field(min_length=1)
    role: Role = "whole"
    handover: Handover | None = None
    kv_address: str = ""
    api_key: SecretStr | None = None
    weight: float = Field(default=1.0, gt=0, le=1e6)
    version: str | None = None
    """only replicas of one version work in pairs; default that of the model's newest replica"""


class Registry:
    """The desk for replicas from outside."""

    def __init__(self, pool: Pool, settings: RouterSettings) -> None:
        self._pool = pool
        self._settings = settings

    async def answer(self, asked: Asked) -> Response:
        """Raises Refusal."""
        self._check_token(asked)
        name = asked.path_params["id"]
        return await (self._register(name, asked) if asked.method == "PUT" else self._unregister(name))

    async def _register(self, name: str, asked: Asked) -> Response:
        """201 for a new one, 200 for one that is there already with these very words, else 409."""
        if not _NAME.fullmatch(name):
            raise Refusal(
                400, "the id of a replica: up to 100 letters, digits, `_`, `.` and `-`", "invalid_replica", "id"
            )
        try:
            body = await read_body(asked.headers.raw, cast(Receive, asked.receive), self._settings)
        except CallerLeftError:
            raise Refusal(400, "the body did not come", "invalid_json") from None
        tree = parse_body(body)
        try:
            replica = self._make_replica(name, Registration.model_validate(tree))
        except ValidationError as error:
            row = error.errors(include_url=False, include_context=False, include_input=False)[0]
            param = ".".join(map(str, row["loc"]))
            raise Refusal(400, f"`{param}`: {row['msg']}", "invalid_replica", param) from None
        except (UserError, ValueError) as error:
            raise Refusal(400, str(error), "invalid_replica") from None
        known = self._pool.find_replica(name)
        if known is None:
            try:
                self._pool.add(replica)
            except UserError as error:
                raise Refusal(409, str(error), "conflict") from None
        elif known != replica:
            told = f"replica {name} is there with other words; DELETE it first"
            raise Refusal(409, told, "conflict")
        return JSONResponse({"id": name, "version": replica.version}, 201 if known is None else 200)

    async def _unregister(self, name: str) -> Response:
        """200 with the number of requests that had to be cut."""
        known = self._pool.find_replica(name)
        if known is None:
            raise Refusal(404, f"no replica {name[:100]}", "replica_not_found")
        if not known.is_registered:
            raise Refusal(409, f"replica {name} was not registered: it is not to be removed from outside", "conflict")
        cut = await self._pool.drain(name, self._settings.drain_timeout_s)
        if self._pool.find_replica(name) is known:
            self._pool.remove(name)
        return JSONResponse({"id": name, "cut": cut})

    def _check_token(self, asked: Asked) -> None:
        token = self._settings.admin_token
        if token is None:
            raise Refusal(403, "replicas cannot be added here: this router has no `admin_token`", "no_registration")
        scheme, _, shown = asked.headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(shown.strip().encode(), token.get_secret_value().encode())
        if scheme.lower() != "bearer" or not is_right:
            told = "this wants the token of who adds replicas: `Authorization: Bearer <token>`"
            raise Refusal(401, told, "invalid_token", headers={"WWW-Authenticate": "Bearer"})

    def _make_replica(self, name: str, given: Registration) -> Replica:
        """Raises UserError, and ValueError for a URL that is none."""
        others = self._pool.find_replicas(given.model)
        version = given.version
        if version is None:
            version = next((other.version for other in reversed(others) if not other.is_registered), "")
        return Replica(
            id=name,
            url=given.url,
            model=given.model,
            api_key=given.api_key,
            weight=given.weight,
            version=version,
            role=given.role,
            handover=given.handover,
            kv_address=given.kv_address,
            is_registered=True,
        )
