"""The two requests that one becomes, byte for byte where they are not to differ: each way of handing a cache over."""

import json
import re
from typing import Any

import pytest

from flagscale.errors import UserError
from flagscale.serve.router.handover import WAYS, Legs, is_many
from flagscale.serve.router.replica import Replica
from flagscale.serve.router.request import USUAL_OUTPUT, Request
from flagscale.serve.router.settings import Handover, Role

HEADERS = (("x-request-id", "callers-own"), ("content-type", "application/json"))


def request(**body: Any) -> Request:
    tree = {"model": "m", "prompt": "hello", "max_tokens": 9, **body}
    return Request("/v1/completions", HEADERS, json.dumps(tree, indent=1).encode(), "m", None)


def half(role: Role, kind: Handover) -> Replica:
    port = 1 if role == "prefill" else 2
    return Replica(role, f"http://h{port}:80", "m", role=role, handover=kind, kv_address=f"10.0.0.{port}:700{port}")


def split(kind: Handover, **body: Any) -> Legs:
    return WAYS[kind].split(request(**body), half("prefill", kind), half("decode", kind))


def test_p2p_names_both_addresses_in_the_id_of_both() -> None:
    legs = split("p2p", stream=True, stream_options={"include_usage": True}, min_tokens=3)
    assert legs.prefill is not None
    ids = [[value for name, value in leg.headers if name == "x-request-id"] for leg in (legs.prefill, legs.decode)]
    assert ids[0] == ids[1]
    (name,) = ids[0]
    assert re.fullmatch(r"___prefill_addr_10\.0\.0\.1:7001___decode_addr_10\.0\.0\.2:7002_[0-9a-f]{32}", name)
    assert legs.prefill.tree == {"model": "m", "prompt": "hello", "max_tokens": 1, "stream": False}
    assert legs.decode.body == request(stream=True, stream_options={"include_usage": True}, min_tokens=3).body
    again = split("p2p")
    assert ("x-request-id", name) not in again.decode.headers


def test_nixl_passes_on_where_the_cache_lies() -> None:
    legs = split("nixl", max_completion_tokens=40)
    assert legs.prefill is not None
    assert legs.prefill.tree["max_completion_tokens"] == legs.prefill.tree["max_tokens"] == 1
    params = legs.prefill.tree["kv_transfer_params"]
    assert (params["do_remote_decode"], params["do_remote_prefill"]) == (True, False)
    given = {"do_remote_prefill": True, "remote_block_ids": [[3]], "remote_engine_id": "e"}
    answer = json.dumps({"choices": [], "kv_transfer_params": given}).encode()
    second = WAYS["nixl"].take_over(legs.decode, answer)
    assert second.tree == {**legs.decode.tree, "kv_transfer_params": given}
    nothing = json.dumps({"choices": [], "kv_transfer_params": None}).encode()
    assert WAYS["nixl"].take_over(legs.decode, nothing) is legs.decode


@pytest.mark.parametrize("body", [{"prompt": ["a", "b"]}, {"prompt": [[1], [2]]}, {"n": 2}, {"best_of": 3}])
def test_nixl_does_not_hand_over_what_has_several_caches_or_readers(body: dict[str, Any]) -> None:
    assert split("nixl", **body).prefill is None
    assert is_many(request(**body).tree)
    assert split("p2p", **body).prefill is not None


@pytest.mark.parametrize("body", [{"prompt": ["a"]}, {"prompt": [1, 2]}, {"n": 1}, {"n": None}, {"prompt": []}])
def test_one_prompt_once_is_not_many(body: dict[str, Any]) -> None:
    assert not is_many(request(**body).tree)


def test_store_sends_the_prompt_and_then_the_request() -> None:
    legs = split("store")
    assert legs.prefill is not None
    assert legs.prefill.tree["max_tokens"] == 1
    assert legs.decode == request()


def test_bootstrap_sends_both_to_one_room() -> None:
    legs = split("bootstrap", stream=True, stream_options={"include_usage": True})
    assert legs.prefill is not None
    first, second = legs.prefill.tree, legs.decode.tree
    assert (first["bootstrap_host"], first["bootstrap_port"]) == ("10.0.0.1", 7001)
    assert 0 <= first["bootstrap_room"] < 2**63
    assert first == {name: value for name, value in {**second, "stream": False}.items() if name != "stream_options"}
    assert second["stream_options"] == {"include_usage": True}
    assert split("bootstrap").decode.tree["bootstrap_room"] != second["bootstrap_room"]


@pytest.mark.parametrize(
    ("body", "prompt", "output"),
    [
        ({"prompt": "x" * 400}, 101, 9),
        ({"prompt": [5, 6, 7]}, 3, 9),
        ({"prompt": ["x" * 40, "y" * 40]}, 22, 9),
        ({"prompt": "é" * 4}, 3, 9),
        ({"max_tokens": None}, 2, USUAL_OUTPUT),
        ({"max_completion_tokens": 3}, 2, 3),
        ({"prompt": None, "messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 40}]}]}, 13, 9),
        ({"prompt": {"odd": 1}, "max_tokens": "many"}, 0, USUAL_OUTPUT),
    ],
)
def test_tokens_are_counted_without_a_tokenizer(body: dict[str, Any], prompt: int, output: int) -> None:
    size = request(**body).size
    assert (size.prompt, size.output) == (prompt, output)


def test_a_half_must_say_what_its_partner_needs() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"role": "prefill"}, "expected one of p2p, nixl"),
        ({"handover": "nixl"}, "expected none for a whole one"),
        ({"role": "decode", "handover": "p2p"}, "no kv_address"),
        ({"role": "prefill", "handover": "bootstrap"}, "no kv_address"),
        ({"role": "prefill", "handover": "bootstrap", "kv_address": "h"}, "expected host:port"),
    ]
    for fields, told in wrong:
        with pytest.raises(UserError, match=told):
            Replica("r", "http://h:1", "m", **fields)
    for fine in ({"role": "decode", "handover": "bootstrap"}, {"role": "prefill", "handover": "store"}):
        Replica("r", "http://h:1", "m", **fine)  # type: ignore[arg-type]
