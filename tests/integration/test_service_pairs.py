"""A service whose prompts are computed apart, by the fake vLLM: roles, deaths under load, updates, registration."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from services import Bench, wait_for

PAIRED = "experiment__runner__deploy__"


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench.make(tmp_path)
    made.write_model("model", token_s=0.02)
    yield made
    made.serve("stop", str(made.exp_dir), "--force")
    assert made.list_left() == []


def write(bench: Bench, num_prefill: int = 1, num_decode: int = 1, **deploy: Any) -> Path:
    words = {"prefill_decode_disaggregation": True, "prefill_num": num_prefill, "decode_num": num_decode, **deploy}
    return bench.write(**{PAIRED + name: value for name, value in words.items()})


def test_a_service_of_pairs_shows_its_roles_and_takes_replicas_from_outside(bench: Bench) -> None:
    write(bench, 1, 2, admin_token_env="ADMIN", prefill_decode_log_dir=str(bench.base / "halves"))
    bench.start(ADMIN="for-admins")
    assert bench.complete() == "w0 w1 w2"
    status = bench.status()
    assert [(row["name"], row["role"], row["ready"]) for row in status["models"]] == [
        ("m-prefill", "prefill", 1),
        ("m-decode", "decode", 2),
    ]
    assert {row["name"]: row["requests"] for row in status["replicas"]}["m-prefill-0"] >= 2
    for name in ("prefill_0", "decode_0", "decode_1"):
        assert "Loading weights" in (bench.base / "halves" / name / "host_0_localhost.output").read_text()
    words = {"url": "http://127.0.0.1:1", "model": "m", "role": "prefill", "handover": "p2p", "kv_address": "h:1"}
    where, token = f"{bench.url}/replicas/outside", {"Authorization": "Bearer for-admins"}
    assert httpx.put(where, json=words).status_code == 401
    assert httpx.put(where, json=words, headers=token).status_code == 201
    shown = bench.serve("status").stdout
    assert [line.split()[:4] for line in shown.splitlines() if line.startswith("outside")] == [
        ["outside", "m", "prefill", "starting"]
    ]
    assert [line.split()[:4] for line in shown.splitlines() if line.startswith("m ")] == [
        ["m", "prefill", "vllm", "1"],
        ["m", "decode", "vllm", "2"],
    ]
    assert httpx.delete(where, headers=token).status_code == 200
    assert bench.serve("doctor").returncode == 0
    assert bench.serve("stop").stdout.endswith("stopped\n")


@pytest.mark.parametrize("connector", ["P2pNcclConnector", pytest.param("NixlConnector", marks=pytest.mark.slow)])
def test_halves_that_die_under_load_cost_only_requests_that_had_begun(bench: Bench, connector: str) -> None:
    write(bench, 2, 2, prefill_decode_connector=connector)
    bench.start()
    with bench.load(num_callers=6) as load:
        for name in ("m-prefill-0", "m-decode-1"):
            before = load.num_good
            wait_for(lambda: load.num_good > before + 15)  # noqa: B023
            os.kill(bench.find_pid(name), signal.SIGKILL)
            wait_for(lambda: f"{name}: ended: m died of SIGKILL" in bench.read_log())  # noqa: B023
            wait_for(lambda: bench.look()["state"] == "ready")
    assert len(load.faults) == load.num_begun <= 6, load.faults
    assert {row["name"]: row["starts"] for row in bench.look()["replicas"]} == {
        "m-prefill-0": 2, "m-prefill-1": 1, "m-decode-0": 1, "m-decode-1": 2,
    }  # fmt: skip


def test_the_only_pair_may_die_and_be_replaced_while_requests_wait(bench: Bench) -> None:
    write(bench)
    bench.start()
    os.kill(bench.find_pid("m-prefill-0"), signal.SIGKILL)
    assert bench.complete() == "w0 w1 w2"
    wait_for(lambda: bench.look()["state"] == "ready")


def test_an_update_changes_both_halves_in_step_and_loses_no_request(bench: Bench) -> None:
    config = write(bench, 1, 2)
    bench.start()
    bench.write_model("newer", token_s=0.01)
    with bench.load(num_callers=3) as load:
        wait_for(lambda: load.num_good > 5)
        done = bench.serve("update", str(bench.exp_dir), "--model-path", "./newer")
        assert done.returncode == 0, done.stderr + bench.read_log()
        before = load.num_good
        wait_for(lambda: load.num_good > before + 5)
    assert load.faults == []
    status = bench.look()
    assert {(row["role"], row["version"]) for row in status["replicas"]} == {("prefill", 2), ("decode", 2)}
    assert [row["ready"] for row in status["models"]] == [1, 2]

    config.write_text(config.read_text().replace("prefill_num: 1", "prefill_num: 2"))
    done = bench.serve("update", str(bench.exp_dir), str(config))
    assert done.returncode == 0, done.stderr + bench.read_log()
    assert [row["ready"] for row in bench.look()["models"]] == [2, 2]
    config.write_text(config.read_text().replace("disaggregation: true", "disaggregation: false"))
    done = bench.serve("update", str(bench.exp_dir), str(config))
    assert (done.returncode, "cannot change `prefill_decode_disaggregation`" in done.stderr) == (2, True)


def test_a_half_that_does_not_start_ends_the_service_with_its_cause(bench: Bench) -> None:
    """As vLLM 0.32, which has no P2pNcclConnector any more."""
    said = "ValueError: Unsupported connector type: P2pNcclConnector"
    bench.write_model("model", last_words=said)
    write(bench, prefill_decode_log_dir=str(bench.base / "halves"))
    done = bench.serve(str(bench.base / "conf" / "serve.yaml"))
    assert done.returncode == 1
    assert "this vLLM has no KV connector P2pNcclConnector; name one that it has" in done.stderr
    assert said in done.stderr
