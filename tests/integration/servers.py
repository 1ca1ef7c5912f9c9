"""Real servers of our own engine for tests: a tiny random model in a folder, and a process that serves it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factories import ROOT
from local_jobs import wait_for

PATIENCE_S = 120.0
KEY = "open-sesame"


def make_folder(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A folder with a random Qwen3 over bytes, its tokenizer and its chat template."""
    from engine_models import make_model

    from flagscale.inference.byte_tokenizer import write_byte_tokenizer

    model = make_model("qwen3", seed, **{"vocab_size": 257, "eos_token_id": 256, **changes})
    model.save_pretrained(folder)
    write_byte_tokenizer(folder, 512)
    return folder


@dataclass(frozen=True)
class ServerProcess:
    """A server that was started, and what it printed so far."""

    process: "subprocess.Popen[str]"
    log: Path

    @property
    def printed(self) -> str:
        return self.log.read_text()

    @property
    def url(self) -> str:
        return self.printed.partition("listening on ")[2].split()[0]

    def wait_until(self, text: str) -> None:
        wait_for(lambda: text in self.printed or self.process.poll() is not None, PATIENCE_S)
        assert text in self.printed, self.printed


def start_server(log: Path, model: Path, *words: str | Path, **env: str) -> ServerProcess:
    """It listens on a free port as soon as `listening on` was printed, and answers once `serving` was."""
    argv = [sys.executable, "-m", "flagscale.inference.server", "--model", model, "--port", "0", "--threads", "1"]
    around = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **env}
    with log.open("w") as out:
        process = subprocess.Popen([*argv, *words], cwd=ROOT, env=around, stdout=out, stderr=out, text=True)
    return ServerProcess(process, log)


@contextmanager
def serving(log: Path, model: Path, *words: str | Path, **env: str) -> Iterator[ServerProcess]:
    """A server that answers, ended afterwards."""
    server = start_server(log, model, *words, **env)
    try:
        server.wait_until("serving ")
        yield server
    finally:
        server.process.terminate()
        try:
            server.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.wait()
