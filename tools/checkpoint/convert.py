"""Turn a checkpoint of Megatron into a model folder of transformers, or the other way.

    python tools/checkpoint/convert.py --from megatron --to hf outputs/tiny/checkpoints models/tiny
    python tools/checkpoint/convert.py --from hf --to megatron models/qwen3 checkpoints/qwen3

The destination must not exist yet: it is written whole, or not at all.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from flagscale.errors import FlagScaleError
from flagscale.sync.checkpoint import convert


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Convert a checkpoint between Megatron and transformers.")
    say = parser.add_argument
    say("--from", dest="src_format", choices=("megatron", "hf"), required=True, help="the format of SRC")
    say("--to", dest="dst_format", choices=("megatron", "hf"), required=True, help="the format of DST")
    say("src", type=Path, help="a run's checkpoints or one iteration of them; or a model folder")
    say("dst", type=Path, help="a folder that does not exist yet")
    say("--iteration", type=int, help="which of a run's checkpoints (default: the latest)")
    say("--tokenizer", type=Path, help="folder with the tokenizer to put into a model folder")
    say("--keep-padding", action="store_true", help="keep rows of the embedding that belong to no token")
    say("--max-len", type=int, help="tokens of one text, where that shall differ from the training's")
    say("--padded-vocab-size", type=int, help="rows of Megatron's embedding (default: the next multiple of 128)")
    say("--transformer-impl", choices=("local", "transformer_engine"), default="local", help="layers to name them for")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.src_format == args.dst_format:
        parser.error(f"--from and --to are both {args.dst_format}: expected one of each")
    of_one_side = {"hf": ("padded_vocab_size",), "megatron": ("iteration", "tokenizer", "keep_padding", "max_len")}
    for name in of_one_side[args.dst_format]:
        if getattr(args, name):
            parser.error(f"--{name.replace('_', '-')} has no meaning for --to {args.dst_format}")
    try:
        convert(
            args.src,
            args.dst,
            to=args.dst_format,
            tokenizer=args.tokenizer,
            iteration=args.iteration,
            keep_padding=args.keep_padding,
            max_len=args.max_len,
            padded_vocab_size=args.padded_vocab_size,
            transformer_impl=args.transformer_impl,
        )
    except FlagScaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(args.dst)
    return 0


if __name__ == "__main__":
    sys.exit(main())
