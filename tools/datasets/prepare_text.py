"""Turn text files into the `.bin` and `.idx` files that Megatron trains on, one token for each byte.

    python tools/datasets/prepare_text.py --output outputs/tiny/data/text examples/tiny/data/text.txt

Train on them with `tokenizer_type: NullTokenizer` and `vocab_size: 257`: 256 bytes, and the end of a document, which
in the text is two empty lines. What is already prepared from the same text is left alone.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from flagscale.errors import FlagScaleError
from flagscale.train.token_files import prepare_text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Turn text files into Megatron's .bin and .idx files, byte by byte.")
    parser.add_argument("text", nargs="+", type=Path, help="UTF-8 text; two empty lines end a document")
    parser.add_argument("--output", required=True, type=Path, help="path prefix: OUTPUT.bin and OUTPUT.idx")
    args = parser.parse_args(argv)
    try:
        written = prepare_text(args.text, args.output)
    except FlagScaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{args.output}: {'prepared' if written else 'already prepared'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
