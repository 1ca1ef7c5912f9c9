"""The controller of a service: one asyncio program that is its router, keeps its replicas, and obeys its owner.

It is started as a run of the launcher and every replica as a run of its own, so its death takes nothing with it: the
one that is started in its place reads `state.json`, looks what lives, and goes on. A service that is stopped on purpose
ends in order: the router lets requests finish, then the replicas end.
"""

import asyncio
import os
import secrets
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from flagscale.errors import FlagScaleError, UserError
from flagscale.runner.launch.folder import RunRef
from flagscale.runner.plan.service import ModelPlan, ServicePlan, decode_service, encode_service
from flagscale.serve.fleet import Fleet, Post
from flagscale.serve.folder import (
    Control,
    ServiceState,
    find_control,
    find_state,
    list_replica_runs,
    save_control,
    save_state,
)
from flagscale.serve.replicas import Origin, end_replica
from flagscale.serve.router.pool import Pool
from flagscale.serve.router.server import RouterServer, listen
from flagscale.serve.router.settings import RouterSettings
from flagscale.serve.scaling import Scaler
from flagscale.serve.terms import count_threads, limit_seats, make_settings
from flagscale.serve.update import Update, is_resize

Phase = Literal["starting", "ready", "degraded", "failed", "updating", "stopping"]
SCALE_EVERY_S = 0.5
FIRST_VERSION = 1


def tell(line: str) -> None:
    """To the controller's output, which is the service's log."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


@dataclass(slots=True)
class Controller:
    """A running service."""

    service: ServicePlan
    run_id: str
    origin: Origin
    settings: RouterSettings
    token: str
    version: int = FIRST_VERSION
    update: Update | None = None
    is_stopping: bool = False
    pool: Pool = field(init=False)
    fleet: Fleet = field(init=False)
    server: RouterServer = field(init=False)
    scalers: dict[str, Scaler] = field(default_factory=dict)
    updating: asyncio.Task[None] | None = None
    retiring: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.pool = Pool(self.settings)
        self.fleet = Fleet(self.pool, self.origin, self.service, tell)
        self.server = RouterServer(self.pool, self.settings)

    @property
    def exp_dir(self) -> Path:
        return Path(self.service.exp_dir)

    # --- the start ---------------------------------------------------------------------------------------------------

    async def restore(self) -> list[RunRef]:
        """Take over what lives of this very service; returns the runs in its folder that do not belong to it."""
        state = find_state(self.exp_dir)
        if state is not None and state.run_id == self.run_id:
            self.service, self.version = decode_service(state.service), state.version
            self.fleet.was_ready = state.was_ready
            self.origin = self.fleet.origin = replace(self.origin, config=state.config)
        self.pool.expect(model.served_name for model in self.service.models)
        for model in self.service.models:
            wanted = model.scaling.initial
            if state is not None and state.run_id == self.run_id:
                wanted = min(max(state.wanted.get(model.name, wanted), model.scaling.lowest), model.scaling.highest)
            self.scalers[model.name] = Scaler(model.scaling, wanted)
        kept: set[str] = set()
        for model in self.service.models:
            for seat in range(len(model.seats)):
                is_room = len(self.fleet.list_posts(model.name)) < self.scalers[model.name].wanted
                if is_room and (run := await self.fleet.call(self.fleet.find_living, model, seat)):
                    self.fleet.fill(model, seat, self.version, run)
                    kept.add(str(run.exp_dir))
        runs = await self.fleet.call(list_replica_runs, self.exp_dir)
        return [run for run in runs if str(run.exp_dir) not in kept]

    async def clear(self, strays: list[RunRef]) -> None:
        """End runs that nobody is to have; the seat of one whose host is silent is lost until that is back."""
        faults = await asyncio.gather(*(self.fleet.call(end_replica, run) for run in strays))
        left = {str(run.exp_dir): fault for run, fault in zip(strays, faults, strict=True) if fault}
        for model in self.service.models:
            for seat, place in enumerate(model.seats):
                if fault := left.get(place.job.exp_dir):
                    self.fleet.lose(model, seat, self.version, fault)

    def fit_all(self) -> None:
        for model in self.service.models:
            self.fit(model)
        self.save()

    def fit(self, model: ModelPlan) -> None:
        """Begin to start or to end replicas of a model until there are as many as are wanted."""
        wanted = self.scalers[model.name].wanted
        posts = self.fleet.list_posts(model.name)
        while len(posts) < wanted and (seat := self.fleet.find_seat(model)) is not None:
            posts.append(self.fleet.fill(model, seat, self.version))
        for post in posts[wanted:]:
            tell(f"{post.name}: is not needed any more")
            post.enter("draining")
            self.retiring.add(asyncio.create_task(self.fleet.retire(post, self.settings.drain_timeout_s)))

    def save(self) -> None:
        wanted = {name: scaler.wanted for name, scaler in self.scalers.items()}
        service = encode_service(self.service)
        state = ServiceState(self.run_id, self.version, service, self.origin.config, wanted, self.fleet.was_ready)
        save_state(self.exp_dir, state)

    # --- while it runs -----------------------------------------------------------------------------------------------

    async def scale(self) -> None:
        """Follow the load, fill seats in place of lost ones, and note when all is ready for the first time."""
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(SCALE_EVERY_S)
            self.retiring = {task for task in self.retiring if not task.done()}
            if not self.fleet.was_ready and self.phase == "ready":
                self.fleet.was_ready = True
                self.save()
            if self.update is not None and self.update.state == "running":
                continue
            for model in self.service.models:
                self.fit(model)
                scaler = self.scalers[model.name]
                if model.scaling.lowest == model.scaling.highest or model.name not in self.fleet.first_ready:
                    continue
                before, after = scaler.wanted, scaler.decide(clock(), self.count_requests(model.served_name))
                if after != before:
                    tell(f"{model.name}: {before} replicas are to be {after}")
                    self.fit(model)
                    self.save()

    def count_requests(self, served_name: str) -> int:
        """In flight and waiting."""
        states = (state for state in self.pool.states() if state.model == served_name)
        return sum(state.in_flight for state in states) + self.pool.held(served_name)

    def begin_update(self, service: ServicePlan, config: Mapping[str, Any]) -> Update:
        """Begin to put another version of the service in place of this one.

        Raises:
            UserError: it cannot be changed in this way, or is being changed.
        """
        if self.update is not None and self.update.state == "running":
            raise UserError(f"an update to version {self.update.version} is running; try again when it is done")
        if self.is_stopping or not self.fleet.was_ready:
            raise UserError(f"the service is {self.phase}; an update needs one that has been ready")
        halved = [
            {(it.served_name, it.role != "whole") for it in version.models} for version in (self.service, service)
        ]
        if any((name, not is_half) in halved[1] for name, is_half in halved[0]):
            raise UserError(
                "an update cannot change `prefill_decode_disaggregation`; stop the service and start it anew"
            )
        for name in ("exp_dir", "host", "port", "api_key_env", "admin_token_env", "router"):
            old, new = getattr(self.service, name), getattr(service, name)
            if old != new:
                raise UserError(
                    f"an update cannot change `{name}` ({old} to {new}); stop the service and start it anew"
                )
        origin = replace(self.origin, config=config, num_threads=count_threads(service))
        staying = [post for it in service.models for post in self.fleet.list_posts(it.name)[: self._count_wanted(it)]]
        is_same = is_resize(self.service, service, staying, self.origin.num_threads, origin.num_threads)
        self.update = Update(self.version if is_same else self.version + 1)
        self.updating = asyncio.create_task(self._update(service, origin, self.update))
        return self.update

    async def _update(self, service: ServicePlan, origin: Origin, update: Update) -> None:
        version = update.version
        before = list(self.fleet.posts)
        told = f"update to version {version}" if version != self.version else "another number of replicas"
        tell(f"{told}: begins")
        self.fleet.origin = origin
        try:
            if version == self.version:
                await self._grow(service, version)
            else:
                await self._replace_all(service, version)
        except FlagScaleError as error:
            update.state, update.message = "failed", str(error)
            tell(f"{told}: failed: {error}; version {self.version} stays")
            for post in [post for post in self.fleet.posts if post not in before and post.is_filled]:
                await self.fleet.retire(post, self.settings.drain_timeout_s)
            self.fleet.origin = self.origin
            self.fit_all()
            return
        self.service, self.version, self.origin = service, version, origin
        self.pool.expect(model.served_name for model in service.models)
        gone = [post for post in self.fleet.posts if post.version != version and post.is_filled]
        await asyncio.gather(*(self.fleet.retire(post, self.settings.drain_timeout_s) for post in gone))
        self.scalers = {model.name: Scaler(model.scaling, self._count_wanted(model)) for model in service.models}
        self.fit_all()
        await asyncio.gather(*self.retiring)
        update.state, update.message = "done", f"version {version} serves"
        tell(f"{told}: is done")

    async def _grow(self, service: ServicePlan, version: int) -> None:
        """Start what is wanted of a version beyond the replicas that it has, all of it at once."""
        begun = []
        for model in service.models:
            for _ in range(self._count_wanted(model) - len(self.fleet.list_posts(model.name))):
                begun.append(self._fill_free(model, version))
        for post in begun:
            await self.fleet.wait_ready(post)

    def _fill_free(self, model: ModelPlan, version: int) -> Post:
        seat = self.fleet.find_seat(model)
        if seat is None:
            raise UserError(f"{model.name}: there are no free chips for a new replica")
        return self.fleet.fill(model, seat, version)

    async def _replace_all(self, service: ServicePlan, version: int) -> None:
        for served_name in dict.fromkeys(model.served_name for model in service.models):
            pools = [model for model in service.models if model.served_name == served_name]
            for number in range(max(map(self._count_wanted, pools))):
                await self._replace([pool for pool in pools if number < self._count_wanted(pool)], version)

    def _count_wanted(self, model: ModelPlan) -> int:
        """As many as there are, where the new version allows it."""
        before = self.scalers.get(model.name)
        wanted = model.scaling.initial
        if before is not None and model.scaling.lowest != model.scaling.highest:
            wanted = before.wanted
        return min(max(wanted, model.scaling.lowest), model.scaling.highest)

    async def _replace(self, pools: list[ModelPlan], version: int) -> None:
        """One replica of each pool: start the new, wait for its answer, end an old one.

        Where no seat is free an old one has to go first; its requests wait at the router if it was the last. The pools
        of one model change in step, since replicas of different versions do not work together.
        """
        retiring, begun = [], []
        for pool in pools:
            old = [post for post in self.fleet.list_posts(pool.name) if post.version != version]
            if self.fleet.find_seat(pool) is None and old:
                tell(f"{pool.name}: no chips are free for a new replica, so {old[0].name} ends first")
                await self.fleet.retire(old.pop(0), self.settings.drain_timeout_s)
            begun.append(self._fill_free(pool, version))
            retiring += old[:1]
        for post in begun:
            await self.fleet.wait_ready(post)
        for post in retiring:
            await self.fleet.retire(post, self.settings.drain_timeout_s)

    # --- what it is asked ---------------------------------------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        if self.is_stopping:
            return "stopping"
        if self.update is not None and self.update.state == "running":
            return "updating"
        posts = [post for post in self.fleet.posts if post.is_filled]
        is_full = all(len(self._ready_posts(name)) >= scaler.wanted for name, scaler in self.scalers.items())
        if is_full:
            return "ready"
        if not self.fleet.was_ready:
            return "failed" if any(post.state == "failed" for post in posts) else "starting"
        return "degraded"

    def _ready_posts(self, model: str) -> list[Post]:
        return [post for post in self.fleet.list_posts(model) if post.state == "ready"]

    def describe(self) -> dict[str, Any]:
        """The service as JSON values. Keys are only ever added."""
        faulty = [post for post in self.fleet.posts if post.state in ("failed", "lost")]
        return {
            "name": self.service.name,
            "run_id": self.run_id,
            "url": self.service.url,
            "state": self.phase,
            "why": f"{faulty[0].name}: {faulty[0].cause}" if faulty and self.phase != "ready" else None,
            "version": self.version,
            "needs_key": bool(self.settings.api_keys),
            "api_key_env": self.service.api_key_env,
            "models": [
                {
                    "name": model.name,
                    "engine": model.engine,
                    "served_name": model.served_name,
                    "role": model.role,
                    "handover": model.handover,
                    "wanted": self.scalers[model.name].wanted,
                    "ready": len(self._ready_posts(model.name)),
                    "lowest": model.scaling.lowest,
                    "highest": model.scaling.highest,
                    "waiting": self.pool.held(model.served_name),
                }
                for model in self.service.models
            ],
            "replicas": [self.fleet.describe(post) for post in self.fleet.posts],
            "registered": [asdict(state) for state in self.pool.states() if state.is_registered],
            "update": None
            if self.update is None
            else {"version": self.update.version, "state": self.update.state, "message": self.update.message},
        }

    def stop(self) -> None:
        """Begin to end in order."""
        self.is_stopping = True
        self.server.should_exit = True

    # --- its life -----------------------------------------------------------------------------------------------------

    async def run(self, control_socket: socket.socket) -> None:
        """Until it is asked to end."""
        from flagscale.serve.control import build_control, serve_quietly

        with listen(self.settings) as listener:
            tell(f"{self.service.name}: listens on {self.service.url}")
            control = asyncio.create_task(serve_quietly(build_control(self), control_socket))
            strays = await self.restore()  # first, so that nobody is told that there is no such model
            serving = asyncio.create_task(self.server.serve(sockets=[listener]))
            try:
                await self.clear(strays)
                self.fit_all()
                scaling = asyncio.create_task(self.scale())
                await serving
                scaling.cancel()
            finally:
                self.is_stopping = True
                if self.updating is not None:
                    self.updating.cancel()
                    await asyncio.wait([self.updating])
                tell("ends its replicas")
                await asyncio.gather(*self.retiring)
                await self.fleet.stop_all(0.0)
                tell("has ended")
                control.cancel()
                await asyncio.wait([control])


def run_controller(job: Mapping[str, Any]) -> None:
    """Be the controller of a service until it is stopped.

    job: the run's job.json

    Raises:
        UserError: the router's settings cannot be right, or its address is taken.
    """
    service = limit_seats(decode_service(job["plan"]["service"]))
    exp_dir = Path(service.exp_dir)
    before = find_control(exp_dir)
    with socket.create_server(("127.0.0.1", 0)) as control_socket:
        key = before.engine_key if before else secrets.token_urlsafe(24)
        control = Control(control_socket.getsockname()[1], secrets.token_urlsafe(24), key, os.getpid())
        save_control(exp_dir, control)
        origin = Origin(job["config"], job["command"], key, count_threads(service))
        settings = make_settings(service, os.environ)
        controller = Controller(service, job["run_id"], origin, settings, control.token)

        def end(_signum: int, _frame: FrameType | None) -> None:
            controller.stop()

        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, end)
        asyncio.run(controller.run(control_socket))
