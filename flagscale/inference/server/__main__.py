"""`python -m flagscale.inference.server`: options to a server, and a server's end to an exit code."""

import argparse
import asyncio
import sys
from pathlib import Path

from flagscale.cli.voice import guard
from flagscale.inference.engine.config import EngineConfig
from flagscale.inference.server.options import ServerOptions, load_keys, parse_bytes

DTYPES = ("auto", "float32", "bfloat16", "float16")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flagscale.inference.server", description="Serve one model by OpenAI's HTTP interface."
    )
    say = parser.add_argument
    say("--model", type=Path, required=True, help="folder with a model in the format of transformers")
    say("--served-model-name", nargs="+", metavar="NAME", help="its names in requests (default: the folder's name)")
    say("--host", default="127.0.0.1", help="address to bind (default: %(default)s)")
    say("--port", type=int, default=8000, help="port to bind; 0: a free one (default: %(default)s)")
    say("--api-key-env", metavar="NAME", help="environment variable that holds the key that clients must send")
    say("--api-key-file", type=Path, metavar="FILE", help="file of such keys, one in a line")
    say("--dtype", choices=DTYPES, default="auto", help="of weights and cache; auto: as in the folder")
    say("--quantization", choices=("int8",), help="number format of linear layers (default: as --dtype)")
    say("--device", default="cpu", help="where torch runs it (default: %(default)s)")
    say("--threads", type=int, help="threads of torch (default: torch's own choice)")
    say("--max-model-len", type=int, help="tokens of prompt and output together (default: the model's)")
    say("--kv-cache-bytes", default="512MiB", help="memory for keys and values (default: %(default)s)")
    say("--adapter-bytes", default="256MiB", help="memory for LoRA adapters (default: %(default)s)")
    say("--page-size", type=int, default=16, help="tokens in a page of it (default: %(default)s)")
    say("--max-running", type=int, default=64, help="samples computed at once (default: %(default)s)")
    say("--max-tokens-per-step", type=int, default=512, help="tokens in one run of the model (default: %(default)s)")
    say("--no-prefix-caching", action="store_true", help="compute every prompt anew")
    say("--seed", type=int, help="for requests without a seed (default: the system's)")
    say("--drain-s", type=float, default=30.0, help="seconds for running requests after SIGTERM (default: %(default)s)")
    say("--max-body-bytes", default="32MiB", help="largest request (default: %(default)s)")
    return parser


def parse_options(argv: list[str] | None = None) -> ServerOptions:
    """
    Raises:
        UserError: an option cannot be right.
    """
    args = make_parser().parse_args(argv)
    return ServerOptions(
        model=args.model,
        names=tuple(args.served_model_name or [args.model.resolve().name]),
        host=args.host,
        port=args.port,
        keys=load_keys(args.api_key_env, args.api_key_file),
        dtype=args.dtype,
        device=args.device,
        threads=args.threads,
        drain_s=args.drain_s,
        max_body_bytes=parse_bytes(args.max_body_bytes),
        engine=EngineConfig(
            kv_cache_bytes=parse_bytes(args.kv_cache_bytes),
            quantization=args.quantization,
            adapter_bytes=parse_bytes(args.adapter_bytes),
            page_size=args.page_size,
            max_running=args.max_running,
            max_tokens_per_step=args.max_tokens_per_step,
            max_model_len=args.max_model_len,
            prefix_caching=not args.no_prefix_caching,
            seed=args.seed,
        ),
    )


def main(argv: list[str] | None = None) -> int:
    def run() -> int:
        options = parse_options(argv)
        from flagscale.inference.server.lifecycle import serve

        asyncio.run(serve(options))
        return 0

    return guard(run)


if __name__ == "__main__":
    sys.exit(main())
