"""A stand-in for `vllm serve`, started as the launcher starts the real one: it loads for a while, then answers counted
words, and does on demand what makes real engines die.

    vllm serve <folder> --host H --port P [--served-model-name NAME] [--seed N]

The folder's `config.json` says how it behaves (`Behaviour`); the key comes from $VLLM_API_KEY, as vLLM's does.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kv_exchange import KvExchange
from openai_replica import FakeReplica, serve_until_ended


@dataclass(frozen=True, slots=True)
class Behaviour:
    """load_s: until it answers; last_words: it prints them and dies in place of answering; token_s: pace of a stream;
    once: a file that a failing start leaves, so that the next one goes well; model_type: unused, as in a real config"""

    load_s: float = 0.0
    last_words: str = ""
    exit_code: int = 1
    token_s: float = 0.0
    once: str = ""
    model_type: str = "fake"


def main() -> None:
    parser = argparse.ArgumentParser(prog="vllm")
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--served-model-name")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--gpu-memory-utilization", type=float)
    parser.add_argument("--kv-transfer-config", type=json.loads)
    args = parser.parse_args()
    behaviour = Behaviour(**json.loads((args.model / "config.json").read_text()))
    print("INFO 11-21 02:00:00 [default_loader.py:1] Loading weights", flush=True)
    time.sleep(behaviour.load_s)
    if behaviour.last_words and not (behaviour.once and Path(behaviour.once).exists()):
        if behaviour.once:
            Path(behaviour.once).touch()
        print(behaviour.last_words, file=sys.stderr, flush=True)
        sys.exit(behaviour.exit_code)
    name = args.served_model_name or str(args.model)
    told = f"{os.environ.get('CUDA_VISIBLE_DEVICES', '-')}/{os.environ.get('OMP_NUM_THREADS', '-')}/{args.seed}"
    fake = FakeReplica(
        name, os.environ.get("VLLM_API_KEY"), name=told, token_s=behaviour.token_s, port=args.port, host=args.host
    )
    if args.kv_transfer_config:
        fake.kv = make_exchange(args.kv_transfer_config, os.environ)
    asyncio.run(serve_until_ended(fake))


def make_exchange(config: dict[str, Any], env: Mapping[str, str]) -> KvExchange:
    """Where this half is reached, as the real connectors find it."""
    role: Literal["prefill", "decode"] = "prefill" if config["kv_role"] == "kv_producer" else "decode"
    if config["kv_connector"] == "P2pNcclConnector":
        assert float(config["kv_buffer_size"]) == (10 if role == "prefill" else 8e9)
        assert env["VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"] == "1"
        return KvExchange(role, "p2p", int(config["kv_port"]), env["VLLM_HOST_IP"])
    host, port = env["VLLM_NIXL_SIDE_CHANNEL_HOST"], int(env["VLLM_NIXL_SIDE_CHANNEL_PORT"])
    return KvExchange("both", "nixl", port, host)


if __name__ == "__main__":
    main()
