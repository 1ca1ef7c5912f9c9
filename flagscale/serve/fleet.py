"""The replicas of a service: which seats are filled, each kept filled until it is to be empty.

One task a post does one thing after the other: start a run, let it into the pool, watch it until it ends, learn why,
wait a little, start again. A replica that ended stays in the pool until its successor stands there, so that requests
wait for it and are not told that there is no such model. Nothing is ended before its requests are, unless it died.

The trade-off: looking at a run is reading its files, some times a second, in threads. That finds an end a moment late,
but it finds the same truth as `flagscale status`, also for runs that an earlier controller started.
"""

import asyncio
import time
import traceback
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import SecretStr

from flagscale.errors import FlagScaleError
from flagscale.runner.launch.folder import RunRef, find_current
from flagscale.runner.launch.reach import Look
from flagscale.runner.plan.job import JobPlan
from flagscale.runner.plan.service import ENGINE_KEY, ModelPlan, ServicePlan
from flagscale.serve.causes import FINAL, Cause
from flagscale.serve.folder import is_run_alive
from flagscale.serve.replicas import (
    Origin,
    blame_hosts,
    clear_seat,
    end_replica,
    find_unreachable,
    is_run_of,
    look_at,
    start_replica,
    url_of,
)
from flagscale.serve.router.pool import Pool
from flagscale.serve.router.replica import Replica, ReplicaState

PostState = Literal["starting", "ready", "silent", "waiting", "failed", "lost", "draining", "gone"]
"""silent: it lives and was ready, the router does not reach it; waiting: it died, and is started again later; lost: its
host cannot be reached, and its seat is used again once that is back and what it left there has been ended"""
T = TypeVar("T")

LOOK_EVERY_S = 0.3
LOOK_AT_READY_EVERY_S = 1.0
STABLE_S = 60.0
"""A replica that was ready for so long has paid for its earlier deaths."""
HANG_S = 120.0
"""One that lives and answers nothing for so long is ended and started again."""
REFUSES_S = 20.0
"""One that answers every probe with a refusal for so long will not be ready later either."""
LONGEST_PAUSE_S = 60.0
MOST_DEATHS = 5
"""in a row; then a post has failed"""
LOOK_AT_LOST_EVERY_S = 10.0
MOST_THREADS = 64


@dataclass(slots=True, eq=False)
class Post:
    """A seat that is to be filled, and the replica in it.

    number: how many runs have been started here by this controller; since: when its state began, seconds since 1970
    lost_hosts: those of its hosts that cannot be reached, once it is lost
    """

    model: ModelPlan
    seat: int
    version: int
    number: int = 0
    run: RunRef | None = None
    pool_id: str = ""
    state: PostState = "starting"
    since: float = field(default_factory=time.time)
    was_ready: bool = False
    deaths: int = 0
    cause: Cause | None = None
    lost_hosts: tuple[str, ...] = ()
    progress: str = ""
    keeper: asyncio.Task[None] | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def job(self) -> JobPlan:
        return self.model.seats[self.seat].job

    @property
    def name(self) -> str:
        return self.job.exp_name

    @property
    def is_filled(self) -> bool:
        """Whether it counts for its model: it is, or is coming."""
        return self.state not in ("lost", "draining", "gone")

    def enter(self, state: PostState) -> None:
        if state != self.state:
            self.state, self.since = state, time.time()
            self.changed.set()


class Fleet:
    """Owns the posts of a service, and a pool that has their replicas."""

    def __init__(self, pool: Pool, origin: Origin, service: ServicePlan, tell: Callable[[str], None]) -> None:
        self.pool = pool
        self.origin = origin
        self.start_timeout_s = service.start_timeout_s
        self.host_lost_after_s = service.host_lost_after_s
        self.tell = tell
        self.was_ready = False
        """whether the whole service has been: from then on a host that is not there is no fault of the service"""
        self.posts: list[Post] = []
        self.threads = ThreadPoolExecutor(MOST_THREADS, thread_name_prefix="fleet")
        self.first_ready: set[str] = set()
        """models that have been ready once"""

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        """A function in a thread. It is never left alone: being cancelled waits for its end."""
        work = asyncio.get_running_loop().run_in_executor(self.threads, function, *args)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait([work])
            raise

    # --- seats -------------------------------------------------------------------------------------------------------

    def find_seat(self, model: ModelPlan) -> int | None:
        """A seat that takes nothing that any replica has, or may have, and whose hosts can be reached."""
        taken = {thing for post in self.posts for thing in post.model.seats[post.seat].takes}
        lost = {name for post in self.posts if post.state == "lost" for name in post.lost_hosts}
        for number, seat in enumerate(model.seats):
            if taken.isdisjoint(seat.takes) and lost.isdisjoint(host.host.name for host in seat.job.hosts):
                return number
        return None

    def list_posts(self, model: str, version: int | None = None) -> list[Post]:
        """Of one model, those that count; of any version where none is named."""
        return [
            post
            for post in self.posts
            if post.model.name == model and post.is_filled and version in (None, post.version)
        ]

    def fill(self, model: ModelPlan, seat: int, version: int, run: RunRef | None = None) -> Post:
        """Fill a seat, with the replica that `run` already is or with a new one."""
        post = Post(model, seat, version, run=run)
        self._begin(post, self._keep(post))
        return post

    def lose(self, model: ModelPlan, seat: int, version: int, fault: str) -> None:
        """Have a seat wait for its hosts, on which something of an earlier run may live."""
        post = Post(model, seat, version, state="lost", cause=Cause("host", fault))
        post.lost_hosts = tuple(host.host.name for host in post.job.hosts)
        self._begin(post, self._wait_for_hosts(post))

    def _begin(self, post: Post, work: Coroutine[Any, Any, None]) -> None:
        self.posts.append(post)
        post.keeper = asyncio.create_task(work, name=post.name)
        post.keeper.add_done_callback(lambda task: self._note_mistake(post, task))

    def _note_mistake(self, post: Post, task: "asyncio.Task[None]") -> None:
        """A keeper that ends by an exception of its own leaves a post that says so."""
        if not task.cancelled() and (error := task.exception()):
            post.cause = Cause("other", f"the controller made a mistake: {error!r}")
            post.enter("failed")
            self.tell(f"{post.name}: {post.cause}\n{''.join(traceback.format_exception(error))}")

    async def retire(self, post: Post, drain_s: float) -> None:
        """Empty a seat: no new requests, wait for those in flight, end the run."""
        post.enter("draining")
        if post.keeper is not None:
            post.keeper.cancel()
            await asyncio.wait([post.keeper])
        if post.pool_id:
            num_cut = await self.pool.drain(post.pool_id, drain_s)
            self.pool.remove(post.pool_id)
            self.tell(f"{post.name}: drained" + f", {num_cut} requests were cut after {drain_s:g} s" * bool(num_cut))
        run = post.run or find_current(Path(post.job.exp_dir))
        if run is not None and (fault := await self.call(end_replica, run)):
            self.tell(f"{post.name}: {fault}")
        post.enter("gone")
        self.posts.remove(post)

    async def stop_all(self, drain_s: float) -> None:
        ending = [post for post in self.posts if post.is_filled or post.state == "lost"]
        await asyncio.gather(*(self.retire(post, drain_s) for post in ending))
        self.threads.shutdown(wait=False)

    # --- one post ----------------------------------------------------------------------------------------------------

    async def _keep(self, post: Post) -> None:
        while True:
            post.enter("starting")
            post.cause = cause = await self._run_once(post)
            if cause.kind == "host" and (post.was_ready or self.was_ready):
                await self._wait_for_hosts(post)
                return
            post.run = None
            post.deaths += 1
            most = MOST_DEATHS
            if not post.was_ready:
                is_known = post.model.name in self.first_ready
                most = 3 if (is_known and cause.kind not in FINAL) or cause.kind == "port" else 1
            self.tell(f"{post.name}: ended: {cause}")
            if post.deaths >= most:
                post.enter("failed")
                self.tell(f"{post.name}: is not started again after {post.deaths} deaths in a row")
                return
            post.enter("waiting")
            await asyncio.sleep(min(LONGEST_PAUSE_S, 2.0 ** (post.deaths - 1)))

    async def _run_once(self, post: Post) -> Cause:
        """From a start, or a run that lives already, to its end."""
        try:
            if post.run is None:
                post.run = await self.call(self._start, post)
            else:
                self.tell(f"{post.name}: run {post.run.run_id} lives, and is taken over")
            self._let_in(post, post.run)
            self.tell(f"{post.name}: run {post.run.run_id} is at {url_of(post.run, post.job)}")
            return await self._watch(post, post.run)
        except (FlagScaleError, OSError) as error:
            post.lost_hosts = tuple(await self.call(find_unreachable, post.job))
            return Cause("host" if post.lost_hosts else "other", str(error))

    async def _wait_for_hosts(self, post: Post) -> None:
        """Give a seat up until its hosts are back and nothing of its last run is left on them.

        Till then its chips and its folder are taken, so that no two replicas can ever have them.
        """
        self.tell(f"{post.name}: {post.cause}; its seat is given up until that is back")
        if post.pool_id:
            self.pool.remove(post.pool_id)
            post.pool_id = ""
        post.enter("lost")
        while silent := await self.call(clear_seat, post.job):
            post.lost_hosts, post.cause = tuple(silent), blame_hosts(silent)
            await asyncio.sleep(LOOK_AT_LOST_EVERY_S)
        self.tell(f"{post.name}: {', '.join(post.lost_hosts)} can be reached again, and nothing runs there in its seat")
        post.enter("gone")
        self.posts.remove(post)

    def _start(self, post: Post) -> RunRef:
        """In a thread: clear the seat of what an earlier controller left there, and start."""
        old = find_current(Path(post.job.exp_dir))
        if old is not None and is_run_alive(old):
            end_replica(old)
        post.run = run = start_replica(post.job, self.origin)
        return run

    def _let_in(self, post: Post, run: RunRef) -> None:
        """Show the replica to the pool, which gives it requests once it answers a probe."""
        post.number += 1
        has_key = any(source == ENGINE_KEY for _, source in post.job.secrets)
        replica = Replica(
            id=f"{post.name}.{post.version}.{post.number}",
            url=url_of(run, post.job),
            model=post.model.served_name,
            api_key=SecretStr(self.origin.engine_key) if has_key else None,
            version=str(post.version),
        )
        self.pool.add(replica)
        if post.pool_id:
            self.pool.remove(post.pool_id)
        post.pool_id = replica.id

    async def _watch(self, post: Post, run: RunRef) -> Cause:
        look, clock = Look(run), asyncio.get_running_loop().time
        begun = last_ready = clock()
        ready_since: float | None = None
        while (health := await self.call(look_at, look)).is_alive:
            now, seen = clock(), self.find_state(post)
            post.progress = health.progress
            if seen is not None and seen.is_ready:
                last_ready = now
                ready_since = now if ready_since is None else ready_since
                self._note_ready(post, now - begun)
                if now - ready_since > STABLE_S:
                    post.deaths = 0
            else:
                if post.state == "ready":
                    post.enter("silent")
                if health.silent:
                    post.lost_hosts = tuple(health.silent)
                    if min(health.silent_s, now - (last_ready if ready_since else begun)) > self.host_lost_after_s:
                        return blame_hosts(health.silent)
                elif fault := self._find_fault(post, seen, now - (last_ready if ready_since else begun)):
                    await self.call(end_replica, run)
                    return fault
            await asyncio.sleep(LOOK_AT_READY_EVERY_S if post.state == "ready" else LOOK_EVERY_S)
        return health.cause or Cause("other", "it ended")

    def _note_ready(self, post: Post, took_s: float) -> None:
        if post.state != "ready":
            self.tell(
                f"{post.name}: answers again" if post.state == "silent" else f"{post.name}: ready after {took_s:.0f} s"
            )
        post.was_ready, post.cause = True, None
        self.first_ready.add(post.model.name)
        post.enter("ready")

    def _find_fault(self, post: Post, seen: ReplicaState | None, silent_s: float) -> Cause | None:
        """Why a replica that lives and is not ready has to be ended."""
        reason = seen.reason if seen else ""
        if post.state == "silent":
            return Cause("other", f"did not answer for {HANG_S:g} s: {reason}") if silent_s > HANG_S else None
        if reason[:1] == "4" and reason[:3].isdigit() and silent_s > REFUSES_S:
            return Cause("argument", f"it answers, but refuses: {reason}")
        if silent_s > self.start_timeout_s:
            return Cause("other", f"was not ready after {self.start_timeout_s:g} s; it last said: {post.progress}")
        return None

    def find_state(self, post: Post) -> ReplicaState | None:
        return next((state for state in self.pool.states() if state.id == post.pool_id), None)

    async def wait_ready(self, post: Post) -> None:
        """Return when a replica answers.

        Raises:
            FlagScaleError: it failed, with the cause.
        """
        while post.state != "ready":
            if post.state in ("failed", "lost", "draining", "gone"):
                raise FlagScaleError(f"{post.name}: {post.cause or 'was ended'}")
            post.changed.clear()
            await post.changed.wait()

    def find_living(self, model: ModelPlan, seat: int) -> RunRef | None:
        """In a thread: the run in a seat's folder, where it lives and is of the seat's very plan."""
        run = find_current(Path(model.seats[seat].job.exp_dir))
        if run is None or not is_run_alive(run):
            return None
        return run if is_run_of(run, model.seats[seat].job, self.origin.num_threads) else None

    def describe(self, post: Post) -> dict[str, Any]:
        """A post as JSON values."""
        seen = self.find_state(post)
        return {
            "name": post.name,
            "id": post.pool_id,
            "model": post.model.name,
            "version": post.version,
            "state": post.state,
            "since": post.since,
            "hosts": [host.host.name for host in post.job.hosts],
            "takes": list(post.model.seats[post.seat].takes[1:]),
            "url": seen.url if seen else None,
            "phase": seen.phase if seen else None,
            "reason": seen.reason if seen else "",
            "in_flight": seen.in_flight if seen else 0,
            "requests": seen.requests if seen else 0,
            "failures": seen.failures if seen else 0,
            "starts": post.number,
            "run_id": post.run.run_id if post.run else None,
            "exp_dir": post.job.exp_dir,
            "progress": post.progress if post.state == "starting" else "",
            "cause": str(post.cause) if post.cause else None,
        }
