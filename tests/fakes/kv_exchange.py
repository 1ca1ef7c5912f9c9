"""How the fake engines hand caches over: strict about each protocol, over real connections between them.

    p2p        the prefill half pushes to the address in the request's id, and dies of an id without addresses
    nixl       the prefill half answers where its cache lies; the decode half pulls it there, once
    bootstrap  the decode half waits at the prefill half's room, for ever if the other never comes

A decode half that is asked for something whose prompt nobody computed refuses it, or waits for ever as a real one does.
"""

import asyncio
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp
from aiohttp import web

Kind = Literal["p2p", "nixl", "store", "bootstrap"]
_ID = re.compile(r"___prefill_addr_(\S+:\d+)___decode_addr_(\S+:\d+)_[0-9a-f]{32}$")
_NO_PARTNER = "2.2.2.2"


class ProtocolError(Exception):
    """What a real engine would die of, or answer with nonsense."""


@dataclass(slots=True, eq=False)
class KvExchange:
    """One half's side of it, listening at `address` once it has started."""

    role: Literal["prefill", "decode", "both"]
    """both: what a request asks for, where the engine itself has no role"""
    kind: Kind
    port: int = 0
    host: str = "127.0.0.1"
    caches: set[str] = field(default_factory=set)
    """what has been pushed here, or lies here to be pulled"""
    num_received: int = 0
    """requests whose prompt the other half computed"""
    num_alone: int = 0
    """requests without a partner"""
    rooms: dict[int, asyncio.Event] = field(default_factory=dict)
    """open once the decode half is there"""
    _runner: web.AppRunner | None = None

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/kv/{id}", self._push)
        app.router.add_get("/kv/{id}", self._pull)
        app.router.add_post("/rooms/{room}", self._meet)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.05)
        await self._runner.setup()
        await web.TCPSite(self._runner, self.host, self.port, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    # --- what the other half asks ------------------------------------------------------------------------------------

    async def _push(self, asked: web.Request) -> web.Response:
        self.caches.add(asked.match_info["id"])
        return web.Response()

    async def _pull(self, asked: web.Request) -> web.Response:
        name = asked.match_info["id"]
        if name not in self.caches:
            return web.Response(status=404)
        self.caches.remove(name)
        return web.Response()

    async def _meet(self, asked: web.Request) -> web.Response:
        """The answer comes when the prompt has been computed."""
        self._room(int(asked.match_info["room"])).set()
        while asked.match_info["room"] not in self.caches:
            await asyncio.sleep(0.005)
        self.caches.remove(asked.match_info["room"])
        return web.Response()

    def _room(self, room: int) -> asyncio.Event:
        return self.rooms.setdefault(room, asyncio.Event())

    # --- what a request needs ----------------------------------------------------------------------------------------

    async def begin(self, headers: Mapping[str, str], body: dict[str, Any]) -> dict[str, Any]:
        """Before a request is answered; what its answer has beside. Raises ProtocolError."""
        if self.kind == "store":
            return {}
        role = self.role
        if role == "both":
            role = "prefill" if (body.get("kv_transfer_params") or {}).get("do_remote_decode") else "decode"
        told = await getattr(self, f"_{role}_{self.kind}")(headers, body)
        return dict(told or {})

    def _check_short(self, body: dict[str, Any]) -> None:
        if body.get("max_tokens") != 1 or body.get("stream") or "stream_options" in body:
            raise ProtocolError(f"a prefill of more than one token: {body}")

    async def _prefill_p2p(self, headers: Mapping[str, str], body: dict[str, Any]) -> None:
        self._check_short(body)
        name, _, decode = _read_id(headers, own=self.address, place=1)
        async with aiohttp.ClientSession() as session, session.post(f"http://{decode}/kv/{name}") as pushed:
            if pushed.status != 200:
                raise ProtocolError("the other half takes nothing")

    async def _decode_p2p(self, headers: Mapping[str, str], body: dict[str, Any]) -> None:  # noqa: ARG002
        name, _, _ = _read_id(headers, own=self.address, place=2)
        if name not in self.caches:
            raise ProtocolError(f"no cache of {name}")
        self.caches.remove(name)
        self.num_received += 1

    async def _prefill_nixl(self, headers: Mapping[str, str], body: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        params = body.get("kv_transfer_params")
        if params is None:
            self.num_alone += 1
            return {}
        self._check_short(body)
        if params.get("do_remote_decode") is not True or params.get("do_remote_prefill") is not False:
            raise ProtocolError(f"no prefill's params: {params}")
        name = uuid.uuid4().hex
        self.caches.add(name)
        given = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [[1, 2]],
            "remote_engine_id": "fake",
            "remote_request_id": name,
            "remote_host": self.host,
            "remote_port": self.port,
            "tp_size": 1,
        }
        return {"kv_transfer_params": given}

    async def _decode_nixl(self, headers: Mapping[str, str], body: dict[str, Any]) -> None:  # noqa: ARG002
        params = body.get("kv_transfer_params")
        if params is None:
            self.num_alone += 1
            return
        if params.get("do_remote_prefill") is not True:
            raise ProtocolError(f"no decode's params: {params}")
        url = f"http://{params['remote_host']}:{params['remote_port']}/kv/{params['remote_request_id']}"
        async with aiohttp.ClientSession() as session, session.get(url) as pulled:
            if pulled.status != 200:
                raise ProtocolError("the cache is not there")
        self.num_received += 1

    async def _prefill_bootstrap(self, headers: Mapping[str, str], body: dict[str, Any]) -> None:  # noqa: ARG002
        if body["bootstrap_host"] == _NO_PARTNER:
            self.num_alone += 1
            return
        if f"{body['bootstrap_host']}:{body['bootstrap_port']}" != self.address:
            raise ProtocolError("another one's bootstrap server")
        await self._room(body["bootstrap_room"]).wait()
        self.caches.add(str(body["bootstrap_room"]))

    async def _decode_bootstrap(self, headers: Mapping[str, str], body: dict[str, Any]) -> None:  # noqa: ARG002
        if body["bootstrap_host"] == _NO_PARTNER:
            self.num_alone += 1
            return
        url = f"http://{body['bootstrap_host']}:{body['bootstrap_port']}/rooms/{body['bootstrap_room']}"
        async with aiohttp.ClientSession() as session, session.post(url) as met:
            if met.status != 200:
                raise ProtocolError("nobody is in the room")
        self.num_received += 1


def _read_id(headers: Mapping[str, str], own: str, place: int) -> tuple[str, str, str]:
    name = headers.get("X-Request-Id", "")
    found = _ID.match(name)
    if found is None:
        raise ProtocolError(f"a request id without addresses: {name!r}")
    if found[place] != own:
        raise ProtocolError(f"the id {name} means {found[place]}, not {own}")
    return name, found[1], found[2]
