"""A request's way to a replica and its answer's way back.

Until the first byte of an answer's body has come nothing has been promised to the caller, and the request may be tried
again at another replica: a generation leaves nothing behind at the one that failed. After it the answer is this
replica's. If that is lost, a stream of events ends with an error event that OpenAI's clients raise, and in every case
the connection is closed without the end of a body, so that nobody takes a part for the whole.

Pieces of an answer go on as they come, unparsed. Of a stream of events only whole events go on, which costs nothing (an
engine writes them whole) and keeps an error event from being glued to half of another.
"""

import asyncio
import io
import logging
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from dataclasses import dataclass, field

import aiohttp
from yarl import URL

from flagscale.serve.router.answers import HeaderList, Refusal, Send, send_refusal
from flagscale.serve.router.hold import HoldRefusedError
from flagscale.serve.router.metrics import Metrics, Record
from flagscale.serve.router.pool import Lease, Pool, Replica, Tried, UnknownModelError
from flagscale.serve.router.probe import describe
from flagscale.serve.router.request import Request, returned_headers
from flagscale.serve.router.settings import RouterSettings

log = logging.getLogger(__name__)

BROKEN_OFF = 599
"""the code under which an answer is counted that ended before its end"""

FAILED = (500, 502, 503, 504)
_RETRY_AFTER = {"Retry-After": "5"}
_ERROR_BYTES = 64 * 1024
_EVENT_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")
_LARGEST_EVENT = 1024 * 1024
_LARGE_BODY = 1024 * 1024
_IDLE_SLACK = 1.1


class ReplicaFault(Exception):  # noqa: N818 (it never leaves this module)
    """A replica failed before the first byte. `answer` is what it said about it, if it said anything."""

    def __init__(
        self,
        reason: str,
        lease: Lease,
        may_retry: bool = True,
        status: int = 502,
        answer: "Answer | None" = None,
    ) -> None:
        super().__init__(reason)
        self.lease = lease
        self.may_retry = may_retry
        self.status = status
        self.answer = answer


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer; its headers as they go on to a caller, without the length."""

    status: int
    headers: HeaderList
    body: bytes


@dataclass(slots=True)
class Exchange:
    """One request at one replica; `is_sending` tells whose silence it is when the time is over.

    partner: the lease on another replica that this one needs until its first byte
    """

    request: Request
    lease: Lease
    send: Send
    record: Record
    partner: Lease | None = None
    has_begun: bool = False
    is_sending: bool = False
    is_stream: bool = False
    is_abandoned: bool = False
    limit: asyncio.Timeout = field(init=False)

    @property
    def is_cut(self) -> bool:
        is_partner_cut = self.partner is not None and self.partner.is_cut
        return self.lease.is_cut or ((is_partner_cut or self.is_abandoned) and not self.has_begun)

    def abandon(self) -> None:
        """What this needed until its first byte will not come."""
        if not self.has_begun:
            self.is_abandoned = True
            self.end_now()

    def begin(self, first_byte_s: float) -> None:
        """The first byte has come."""
        self.lease.answered(first_byte_s)
        self.has_begun = True
        if self.partner is not None:
            self.partner.release()

    def end_now(self) -> None:
        if not self.limit.expired():
            self.limit.reschedule(asyncio.get_running_loop().time())


class Forwarder:
    """Sends requests to the pool's replicas over connections that it keeps."""

    def __init__(self, pool: Pool, settings: RouterSettings, metrics: Metrics) -> None:
        self._pool = pool
        self._settings = settings
        self._metrics = metrics
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def forward(self, request: Request, send: Send, record: Record) -> None:
        """Answer a request by a replica, or by an error. Raises Refusal while nothing has been sent."""
        tried: Tried = frozenset()
        retries_left = self._settings.retries
        fault: ReplicaFault | None = None
        while True:
            route = await self._find_route(request, tried, fault)
            if not route:
                break
            record.model, record.replica = request.model, route[-1].replica.id
            try:
                await self._try(request, route, send, record)
                return
            except ReplicaFault as found:
                fault, lease = found, found.lease
                tried |= {(lease.replica.id, lease.epoch)}
                log.warning("replica %s failed a request: %s", lease.replica.id, found)
                if not found.may_retry or not (retries_left or lease.is_cut):
                    break
                retries_left -= not lease.is_cut
                self._metrics.count_retry(request.model, lease.replica.id)
            finally:
                for held in route:
                    held.release()
        assert fault is not None
        await _send_fault(fault, request, record, send)

    async def _try(self, request: Request, route: tuple[Lease, ...], send: Send, record: Record) -> None:
        """Raises ReplicaFault before the first byte."""
        (lease,) = route
        await self._exchange(Exchange(request, lease, send, record))

    async def _find_route(self, request: Request, tried: Tried, fault: ReplicaFault | None) -> tuple[Lease, ...]:
        """Replicas for the next try; none where the last one's own answer is better than to wait for another."""
        try:
            if fault is not None and (fault.answer or fault.status == 504):
                return self._pool.find_route(request, tried)
            until = asyncio.get_running_loop().time() + self._settings.hold_timeout_s
            return await self._pool.acquire(request, tried, until)
        except UnknownModelError as error:
            raise Refusal(404, str(error), "model_not_found", "model") from None
        except HoldRefusedError as error:
            raise Refusal(
                503, f"{_no_replica(request, fault)}, and {error}", "overloaded", None, _RETRY_AFTER
            ) from None
        except TimeoutError:
            waited = f"{_no_replica(request, fault)} within {self._settings.hold_timeout_s:g} s"
            raise Refusal(503, waited, "no_replica_ready", None, _RETRY_AFTER) from None

    async def _exchange(self, it: Exchange) -> None:
        """Raises ReplicaFault before the first byte; what fails after it ends the answer here."""
        try:
            async with asyncio.timeout(self._settings.first_byte_timeout_s) as it.limit, AsyncExitStack() as stack:
                for lease in filter(None, (it.lease, it.partner)):
                    lease.on_cut = it.end_now
                    stack.callback(setattr, lease, "on_cut", None)
                response = await stack.enter_async_context(self._post(it.request, it.lease.replica))
                stack.callback(response.close)
                await self._answer(it, response)
        except (aiohttp.ClientError, OSError) as error:
            # OSError includes TimeoutError, of a connection or of the limit.
            reason, status = self._tell(it, error)
            is_to_blame = not (it.is_cut or it.is_sending)
            if is_to_blame:
                it.lease.failed(reason)
            if not it.has_begun:
                lost = it.partner if it.partner is not None and it.partner.is_cut else it.lease
                raise ReplicaFault(reason, lost, status != 504 or self._settings.retry_timeouts, status) from None
            it.record.code = BROKEN_OFF if is_to_blame or it.is_cut else 499
            log.warning("an answer of replica %s was broken off: %s", it.lease.replica.id, reason)
            if it.is_stream and not it.is_sending:
                event = Refusal(status, f"the answer broke off: {reason}", "replica_lost").event()
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._settings.idle_timeout_s):
                        await it.send({"type": "http.response.body", "body": event, "more_body": True})

    def _post(self, request: Request, replica: Replica) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # The replica's end closes idle connections after 5 s (uvicorn); ours must do so earlier.
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._settings.connect_timeout_s),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                skip_auto_headers=("User-Agent", "Accept"),
            )
        headers = list(request.headers)
        if replica.api_key is not None:
            headers = [pair for pair in headers if pair[0] != "authorization"]
            headers.append(("authorization", f"Bearer {replica.api_key.get_secret_value()}"))
        url = URL(replica.url_of(request.target), encoded=True)
        body = request.body
        # A large body goes in pieces, so that other requests have their turn between them.
        data = body if len(body) <= _LARGE_BODY else io.BytesIO(body)
        return self._session.post(url, data=data, headers=headers, allow_redirects=False)

    async def _answer(self, it: Exchange, response: aiohttp.ClientResponse) -> None:
        status, headers = response.status, returned_headers(response.raw_headers)
        if status in FAILED:
            body = await response.content.read(_ERROR_BYTES)
            headers = [pair for pair in headers if pair[0] != b"content-length"]
            reason = f"status {status}"
            it.lease.failed(reason)
            raise ReplicaFault(reason, it.lease, status=status, answer=Answer(status, headers, body))
        chunk = await response.content.readany()
        it.record.code = status
        it.record.first_byte_s = asyncio.get_running_loop().time() - it.record.started
        it.begin(it.record.first_byte_s)
        it.is_stream = response.content_type == "text/event-stream"
        if it.is_stream:
            headers = [pair for pair in headers if pair[0] != b"content-length"]
        headers.append((b"x-flagscale-replica", it.lease.replica.id.encode("latin-1", "replace")))
        it.is_sending = True
        await it.send({"type": "http.response.start", "status": status, "headers": headers})
        it.is_sending = False
        await self._pass_on(it, response.content, chunk)

    async def _pass_on(self, it: Exchange, content: aiohttp.StreamReader, chunk: bytes) -> None:
        """Every byte from the first `chunk` to the last; of a stream of events only whole ones."""
        time, idle_s = asyncio.get_running_loop().time, self._settings.idle_timeout_s
        rest, more, renew_at = b"", True, 0.0
        while more:
            more = not content.at_eof()
            if it.is_stream and more:
                chunk, rest = split_events(rest + chunk)
            else:
                chunk, rest = rest + chunk, b""
            if b'"usage"' in chunk:
                it.record.usage = chunk
            now = time()
            it.lease.alive(now)
            if now >= renew_at:  # a timer for each piece would be a tenth of the router's work
                it.limit.reschedule(now + idle_s * _IDLE_SLACK)
                renew_at = now + idle_s * (_IDLE_SLACK - 1)
            if chunk or not more:
                it.is_sending = True
                await it.send({"type": "http.response.body", "body": chunk, "more_body": more})
                it.is_sending = False
            if more:
                chunk = await content.readany()

    def _tell(self, it: Exchange, error: Exception) -> tuple[str, int]:
        """What happened, and the status for it."""
        if isinstance(error, TimeoutError) and it.has_begun and not it.is_cut:
            if it.is_sending:
                return f"the caller took nothing for {self._settings.idle_timeout_s:g} s", 408
            return f"silence for {self._settings.idle_timeout_s:g} s", 504
        return self._tell_early(error, it.is_cut)

    def _tell_early(self, error: Exception, is_cut: bool) -> tuple[str, int]:
        """As `_tell`, before the first byte."""
        if is_cut:
            return "its replica was taken out of service", 503
        if not isinstance(error, TimeoutError):
            return describe(error), 502
        if isinstance(error, aiohttp.ConnectionTimeoutError):
            return f"no connection within {self._settings.connect_timeout_s:g} s", 502
        return f"no first byte within {self._settings.first_byte_timeout_s:g} s", 504


def split_events(data: bytes) -> tuple[bytes, bytes]:
    """The whole events at the beginning of `data`, and the rest; one that is absurdly long counts as whole."""
    end = max(data.rfind(mark) + len(mark) if mark in data else 0 for mark in _EVENT_ENDS)
    return (data, b"") if len(data) - end > _LARGEST_EVENT else (data[:end], data[end:])


async def _send_fault(fault: ReplicaFault, request: Request, record: Record, send: Send) -> None:
    """A replica's own words about its failure, or ours."""
    if fault.answer is None:
        code = "timeout" if fault.status == 504 else "replica_unavailable"
        refusal = Refusal(fault.status, f"no replica of `{request.model}` could answer: {fault}", code)
        record.code = refusal.status
        await send_refusal(refusal, send)
        return
    await send_answer(fault.answer, send, record)


async def send_answer(answer: Answer, send: Send, record: Record) -> None:
    """What a replica said, whole, and without a further try."""
    record.code = answer.status
    await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
    await send({"type": "http.response.body", "body": answer.body})


def _no_replica(request: Request, fault: ReplicaFault | None) -> str:
    return f"no replica of `{request.model}` is ready" + (f" (the last one failed: {fault})" if fault else "")
