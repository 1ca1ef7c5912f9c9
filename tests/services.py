"""Services for tests: the command as a user types it, a fake engine on its PATH, load, and looking for what is left."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from factories import ROOT, serve_model, serve_tree, write_config

from flagscale.runner.launch.folder import find_current
from flagscale.runner.launch.ports import find_free_port
from flagscale.runner.launch.procs import find_ours
from flagscale.serve.control import ask_controller
from flagscale.serve.folder import list_replica_runs

PATIENCE_S = 60.0
FAKE = ROOT / "tests" / "fakes" / "vllm_server.py"


def wait_for(what: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
    deadline = time.monotonic() + patience_s
    while not (found := what()):
        assert time.monotonic() < deadline, f"waited {patience_s} s in vain"
        time.sleep(0.05)
    return found


@dataclass(slots=True)
class Load:
    """What came of requests that were sent all the time, by as many callers as there are threads."""

    num_good: int = 0
    faults: list[str] = field(default_factory=list)
    patience_s: float = PATIENCE_S
    num_begun: int = 0
    """of the faults, those whose first byte had come"""


@dataclass(slots=True)
class Bench:
    """A folder with a model for the fake engine, its YAML files, and the command typed in it."""

    base: Path
    port: int

    @classmethod
    def make(cls, base: Path) -> "Bench":
        port = find_free_port()
        assert port is not None
        bench = cls(base, port)
        bench.write_model("model")
        script = base / "bin" / "vllm"
        script.parent.mkdir()
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
        script.chmod(0o755)
        return bench

    def write_model(self, name: str, **behaviour: Any) -> Path:
        folder = self.base / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(behaviour))
        return folder

    def write(
        self, engine: str = "vllm", resources: dict[str, Any] | None = None, start_timeout_s: float = 60, **changes: Any
    ) -> Path:
        """The configuration of a service of one model, called `m`."""
        args = {"model": str(self.base / "model"), "served_model_name": "m"}
        model = serve_model(engine, serve_id="m", engine_args=args, resources=resources or {})
        runner = {
            "device_type": "cpu",
            "bin_dir": str(self.base / "bin"),
            "start_timeout_s": start_timeout_s,
            "deploy": {"port": self.port, "router": {"drain_timeout_s": 10}},
        }
        tree = serve_tree(model, experiment__exp_dir=str(self.exp_dir), experiment__runner=runner, **changes)
        return write_config(self.base / "conf", tree, "serve")

    @property
    def exp_dir(self) -> Path:
        return self.base / "exp"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def env(self) -> dict[str, str]:
        state = str(self.base / "state")
        return {**os.environ, "PYTHONPATH": str(ROOT), "FLAGSCALE_STATE_DIR": state, "OMP_NUM_THREADS": "1"}

    def popen(self, *words: str, **env: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", "import sys; from flagscale.cli import main; sys.exit(main())", *words]
        return subprocess.Popen(
            command,
            env=self.env() | env,
            cwd=self.base,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def call(self, *words: str, timeout_s: float = 120.0, **env: str) -> subprocess.CompletedProcess[str]:
        """`flagscale <words>` in a process of its own."""
        with self.popen(*words, **env) as process:
            try:
                out, err = process.communicate(timeout=timeout_s)
            finally:
                process.kill()
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def serve(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self.call("serve", *words, **env)

    def start(self, *words: str, **env: str) -> None:
        done = self.serve(str(self.base / "conf" / "serve.yaml"), *words, **env)
        assert done.returncode == 0, done.stderr + self.read_log()

    def status(self) -> dict[str, Any]:
        done = self.serve("status", "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def look(self) -> dict[str, Any]:
        """As `status`, asked of the controller without a process in between."""
        return ask_controller(self.exp_dir, "/status")

    def read_log(self) -> str:
        log = self.exp_dir / "serve_logs" / "host_0_localhost.output"
        return log.read_text() if log.exists() else ""

    def complete(self, prompt: str = "hi", **body: Any) -> str:
        """One completion through the router."""
        asked = {"model": "m", "prompt": prompt, "max_tokens": 3, **body}
        answer = httpx.post(f"{self.url}/v1/completions", json=asked, timeout=PATIENCE_S)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    def find_pid(self, replica: str) -> int:
        """The engine's process of a replica."""
        run = find_current(self.exp_dir / "serve" / replica)
        assert run is not None
        token = run.load_spec(run.labels[0]).token
        return next(proc.pid for proc in find_ours(token) if _is_engine(proc.pid))

    def list_left(self) -> list[str]:
        """Command lines of processes that bear a token of this service's runs."""
        runs = [*([run] if (run := find_current(self.exp_dir)) else []), *list_replica_runs(self.exp_dir)]
        tokens = {run.load_spec(label).token for run in runs for label in run.labels}
        return [_command_of(proc.pid) for token in tokens for proc in find_ours(token)]

    @contextmanager
    def load(self, num_callers: int = 4, num_tokens: int = 5, patience_s: float = PATIENCE_S) -> Iterator[Load]:
        """Send streams all the time until the block ends, and wait for their ends."""
        load, is_over = Load(patience_s=patience_s), threading.Event()
        callers = [threading.Thread(target=self._ask_on, args=(load, is_over, num_tokens)) for _ in range(num_callers)]
        for caller in callers:
            caller.start()
        try:
            yield load
        finally:
            is_over.set()
            for caller in callers:
                caller.join(PATIENCE_S)

    def _ask_on(self, load: Load, is_over: threading.Event, num_tokens: int) -> None:
        body = {"model": "m", "prompt": "hi", "max_tokens": num_tokens, "stream": True}
        with httpx.Client(verify=False, timeout=load.patience_s) as client:
            while not is_over.is_set():
                text = ""
                try:
                    with client.stream("POST", f"{self.url}/v1/completions", json=body) as answer:
                        for piece in answer.iter_text():
                            text += piece
                        fault = "" if answer.status_code == 200 else f"{answer.status_code} {text}"
                except httpx.HTTPError as error:
                    fault = repr(error)
                if not fault and text.rstrip().endswith("data: [DONE]"):
                    load.num_good += 1
                    continue
                load.faults.append(fault or text)
                load.num_begun += '"text"' in text


def _command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def _is_engine(pid: int) -> bool:
    words = _command_of(pid)
    return any(name in words for name in ("vllm_server.py", "inference.server", "launch_server", "vllm serve"))
