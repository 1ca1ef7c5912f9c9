"""The router's own description of its API, held against it by schemathesis: a router and a fake engine, each in a
process of its own, as they are run by hand."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from factories import ROOT
from hypothesis import HealthCheck, settings
from schemathesis.generation import GenerationMode

from flagscale.serve.router.openapi import describe_api

KEY = "a-key-for-callers"
FAKE = ROOT / "tests" / "fakes" / "openai_replica.py"


@pytest.fixture(scope="module")
def router_url() -> Iterator[str]:
    fake = subprocess.Popen([sys.executable, str(FAKE), "--api-key", "own"], stdout=subprocess.PIPE, text=True)
    router = subprocess.Popen(
        [sys.executable, "-m", "flagscale.serve.router", "-"],
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        assert fake.stdout is not None
        assert router.stdin is not None
        assert router.stderr is not None
        entry = {"id": "r0", "url": fake.stdout.readline().strip(), "model": "tiny", "api_key": "own"}
        settings = {"port": 0, "api_keys": [KEY], "admin_token": KEY, "drain_timeout_s": 1}
        router.stdin.write(json.dumps({"settings": settings, "replicas": [entry]}))
        router.stdin.close()
        url = next(line for line in router.stderr if "listens" in line).rpartition(" ")[2].strip()
        while "is ready" not in router.stderr.readline():
            assert router.poll() is None
        yield url
        metrics = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
        for code in (200, 400, 401, 404):
            assert f'requests_total{{code="{code}"' in metrics, "schemathesis did not try what it should have"
        router.send_signal(signal.SIGTERM)
        told = router.stderr.read()
        assert "router has ended" in told
        assert "Traceback" not in told
        assert router.wait(10) == -signal.SIGTERM
    finally:
        for process in (router, fake):
            process.kill()
            process.wait()
        for pipe in (fake.stdout, router.stderr):
            assert pipe is not None
            pipe.close()


schema = schemathesis.openapi.from_dict(describe_api(wants_key=True))
schema.config.generation.update(modes=list(GenerationMode))


@schema.parametrize()
@settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_the_router_keeps_to_its_description(case: schemathesis.Case, router_url: str) -> None:
    """Valid and invalid requests to every path; half of those that name a model name the one that is there."""
    body = case.body
    if isinstance(body, dict) and isinstance(body.get("model"), str) and len(body["model"]) % 2:
        body["model"] = "tiny"
    case.call_and_validate(base_url=router_url, headers={"Authorization": f"Bearer {KEY}"})
