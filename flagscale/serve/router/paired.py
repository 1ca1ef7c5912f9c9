"""A request at a pair: its prompt at one replica, what follows at another, as one answer with one fate.

Either half may fail, and the other must not be left behind: where both have the request at once the failure of one
cancels the other, and where they have it in turn the second is asked only when the first has answered. A caller who
leaves cancels whichever is at work. Until the first byte of the second half nothing has been promised, and another pair
may try; until then the first half's replica keeps its lease where its cache is fetched from it.

An answer of the first half that is no success is the answer: the second half would refuse it too, or wait in vain.
"""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace

import aiohttp

from flagscale.serve.router.answers import Refusal, Send
from flagscale.serve.router.forward import FAILED, Answer, Exchange, Forwarder, ReplicaFault, send_answer
from flagscale.serve.router.handover import PAIRED_PATHS, WAYS, Way
from flagscale.serve.router.metrics import Record
from flagscale.serve.router.pool import Lease
from flagscale.serve.router.request import Request, returned_headers


class PairForwarder(Forwarder):
    """Sends requests to replicas, and to pairs of them."""

    async def _try(self, request: Request, route: tuple[Lease, ...], send: Send, record: Record) -> None:
        if len(route) == 1:
            await super()._try(request, route, send, record)
            return
        prefill, decode = route
        path = request.target.partition("?")[0]
        if path not in PAIRED_PATHS:
            told = f"`{request.model}` is served by pairs of replicas, which answer {' and '.join(PAIRED_PATHS)} only"
            raise Refusal(400, told, "unsupported_path", "model")
        assert prefill.replica.handover is not None
        way = WAYS[prefill.replica.handover]
        legs = way.split(request, prefill.replica, decode.replica)
        it = Exchange(legs.decode, decode, send, record, prefill)
        if legs.prefill is None:
            prefill.release()
            await self._exchange(replace(it, partner=None))
        elif way.is_at_once:
            await self._ask_both(legs.prefill, it)
        else:
            await self._ask_in_turn(way, legs.prefill, it)

    async def _ask_in_turn(self, way: Way, first: Request, it: Exchange) -> None:
        """The second half once the first has answered, with what it said."""
        assert it.partner is not None
        answer = await self._fetch(first, it.partner)
        if answer.status != 200:
            await send_answer(answer, it.send, it.record)
            return
        try:
            second = way.take_over(it.request, answer.body)
        except Refusal as error:
            reason = f"its answer to a prompt cannot be read: {error}"
            it.partner.failed(reason)
            raise ReplicaFault(reason, it.partner) from None
        if it.lease.is_cut:
            raise ReplicaFault("its replica was taken out of service", it.lease, status=503)
        if not way.is_fetched:
            it.partner.release()
        await self._exchange(replace(it, request=second, partner=it.partner if way.is_fetched else None))

    async def _ask_both(self, first: Request, it: Exchange) -> None:
        """Both halves at once; the first that fails takes the other with it, and the end of the second is the end."""
        assert it.partner is not None
        fetching = asyncio.create_task(self._fetch(first, it.partner, is_alone=False))
        fetching.add_done_callback(lambda task: it.abandon() if _has_failed(task) else None)
        try:
            await self._exchange(it)
        except ReplicaFault:
            if not it.is_abandoned:
                raise
            await send_answer(fetching.result(), it.send, it.record)
        finally:
            fetching.cancel()

    async def _fetch(self, request: Request, lease: Lease, is_alone: bool = True) -> Answer:
        """The whole answer of a first half. Raises ReplicaFault.

        is_alone: else the second half is on its way, and heeds that this lease is cut
        """
        clock = asyncio.get_running_loop().time
        begun = clock()
        try:
            async with asyncio.timeout(self._settings.first_byte_timeout_s) as limit, AsyncExitStack() as stack:
                if is_alone:
                    lease.on_cut = lambda: None if limit.expired() else limit.reschedule(clock())
                    stack.callback(setattr, lease, "on_cut", None)
                response = await stack.enter_async_context(self._post(request, lease.replica))
                stack.callback(response.close)
                body = await response.read()
        except (aiohttp.ClientError, OSError) as error:
            reason, status = self._tell_early(error, lease.is_cut)
            if not lease.is_cut:
                lease.failed(reason)
            raise ReplicaFault(reason, lease, status != 504 or self._settings.retry_timeouts, status) from None
        headers = [pair for pair in returned_headers(response.raw_headers) if pair[0] != b"content-length"]
        if response.status in FAILED:
            reason = f"status {response.status}"
            lease.failed(reason)
            raise ReplicaFault(reason, lease, status=response.status, answer=Answer(response.status, headers, body))
        lease.computed()
        lease.answered(clock() - begun)
        lease.alive(clock())
        headers.append((b"x-flagscale-replica", lease.replica.id.encode("latin-1", "replace")))
        return Answer(response.status, headers, body)


def _has_failed(fetching: "asyncio.Task[Answer]") -> bool:
    return not fetching.cancelled() and (fetching.exception() is not None or fetching.result().status != 200)
