"""How the two replicas of a pair are told of each other: one small object for each way in which engines hand a prompt's
cache over. All of them are pure; who sends what when is `paired`.

    p2p        vLLM's P2pNcclConnector: the request's id has both addresses, and the prefill replica pushes
    nixl       vLLM's NixlConnector: the prefill replica answers with where its cache lies, and the other pulls
    store      vLLM's ExampleConnector: the cache is found in a store by the prompt itself
    bootstrap  SGLang: both get the request at once and meet at the prefill replica's bootstrap server

Sources: P2pNcclConnector and its engine in vLLM 0.16, nixl/pull_scheduler.py and example_connector.py in vLLM 0.32;
`bootstrap_*` of SGLang 0.5.23's OpenAI requests, and its health check, whose made-up host needs no partner.
"""

import json
import secrets
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from flagscale.serve.router.probe import LONGER_PROMPT, ProbeResult, probe_alive, probe_completion
from flagscale.serve.router.replica import Replica
from flagscale.serve.router.request import Request, parse_body
from flagscale.serve.router.settings import Handover, RouterSettings

PAIRED_PATHS = ("/v1/completions", "/v1/chat/completions")
"""what a pair can answer: both halves generate"""
Tree = dict[str, Any]
ProbeKind = Literal["completion", "alive", "bootstrap"]
"""what a half is asked for to show that it is well: a token; whether it lives and has the model; one without partner"""

_REQUEST_ID = "x-request-id"
_NO_PARTNER: Tree = {"bootstrap_host": "2.2.2.2", "bootstrap_room": 0}
PROBE_EXTRA: Mapping[ProbeKind, Tree] = {
    "completion": {"prompt": LONGER_PROMPT},
    "alive": {},
    "bootstrap": _NO_PARTNER,
}


@dataclass(frozen=True, slots=True)
class Legs:
    """The two requests that one becomes. Where `prefill` is None the decode replica does all of it."""

    prefill: Request | None
    decode: Request


class Way:
    """One way of handing over. Each request gets a fresh pair of `Legs` for each try."""

    is_at_once: bool = False
    """both legs go out together; else the second when the first has been answered"""
    is_fetched: bool = False
    """the cache is fetched after the first answer, so that its replica is needed until the second begins"""
    probe: ProbeKind = "completion"

    def split(self, request: Request, prefill: Replica, decode: Replica) -> Legs:
        raise NotImplementedError

    def take_over(self, decode: Request, answer: bytes) -> Request:  # noqa: ARG002
        """The second leg with what the first one's answer says."""
        return decode


class PeerToPeer(Way):
    probe = "alive"  # an ordinary request, whose id has no addresses, would end the engine

    def split(self, request: Request, prefill: Replica, decode: Replica) -> Legs:
        name = f"___prefill_addr_{prefill.kv_address}___decode_addr_{decode.kv_address}_{uuid.uuid4().hex}"
        headers = (*(pair for pair in request.headers if pair[0] != _REQUEST_ID), (_REQUEST_ID, name))
        return Legs(shorten(request, headers=headers), replace(request, headers=headers))


class Nixl(Way):
    is_fetched = True

    def split(self, request: Request, prefill: Replica, decode: Replica) -> Legs:  # noqa: ARG002
        if is_many(request.tree):
            return Legs(None, request)  # the answer has the place of one cache, and it may be pulled once
        asked = {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            **dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")),
        }
        return Legs(shorten(request, kv_transfer_params=asked), request)

    def take_over(self, decode: Request, answer: bytes) -> Request:
        params = parse_body(answer).get("kv_transfer_params")
        return rewrite(decode, {**decode.tree, "kv_transfer_params": params}) if params else decode


class Store(Way):
    def split(self, request: Request, prefill: Replica, decode: Replica) -> Legs:  # noqa: ARG002
        return Legs(shorten(request), request)


class Bootstrap(Way):
    is_at_once = True
    probe = "bootstrap"

    def split(self, request: Request, prefill: Replica, decode: Replica) -> Legs:  # noqa: ARG002
        host, _, port = prefill.kv_address.rpartition(":")
        meeting = {"bootstrap_host": host, "bootstrap_port": int(port), "bootstrap_room": secrets.randbits(63)}
        both = {**request.tree, **meeting}
        whole = {name: value for name, value in both.items() if name != "stream_options"}
        return Legs(rewrite(request, {**whole, "stream": False}), rewrite(request, both))


WAYS: Mapping[Handover, Way] = {"p2p": PeerToPeer(), "nixl": Nixl(), "store": Store(), "bootstrap": Bootstrap()}


async def probe_replica(replica: Replica, settings: RouterSettings) -> ProbeResult:
    """Ask a replica what one of its kind can answer without a partner."""
    kind = WAYS[replica.handover].probe if replica.handover else None
    extra = PROBE_EXTRA[kind] if kind else {}
    probe = probe_alive if kind == "alive" else partial(probe_completion, extra=extra)
    return await probe(
        replica.url, replica.model, replica.api_key, settings.probe_timeout_s, settings.connect_timeout_s
    )


def shorten(request: Request, headers: tuple[tuple[str, str], ...] | None = None, **more: Any) -> Request:
    """The request for its prompt only: one token, whole."""
    tree = {name: value for name, value in request.tree.items() if name not in ("stream_options", "min_tokens")}
    tree |= {"max_tokens": 1, "stream": False, **more}
    if "max_completion_tokens" in tree:
        tree["max_completion_tokens"] = 1
    return rewrite(replace(request, headers=headers or request.headers), tree)


def rewrite(request: Request, tree: Tree) -> Request:
    return replace(request, body=json.dumps(tree).encode())


def is_many(tree: Tree) -> bool:
    """Whether a request asks for several answers: by several prompts, or several times."""
    prompt = tree.get("prompt")
    has_prompts = isinstance(prompt, list) and len(prompt) > 1 and isinstance(prompt[0], str | list)
    return has_prompts or any(tree.get(name) not in (None, 1) for name in ("n", "best_of"))
