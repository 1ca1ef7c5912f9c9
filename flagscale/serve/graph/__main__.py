"""`python -m flagscale.serve.graph <job.json> <address> ray start ..`: the program of a graph of models.

The words from the third on are the command of Ray's head, which will answer at the address.
"""

import json
import os
import sys
from pathlib import Path


def main(words: list[str]) -> int:
    from flagscale.errors import FlagScaleError
    from flagscale.serve.graph.program import run_program

    path, address, *head = words
    try:
        return run_program(json.loads(Path(path).read_text()), address, head)
    except FlagScaleError as error:
        print(f"error: {error}", flush=True)
        return error.exit_code


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # threads of Ray that wait for a head that has gone must not keep a service from ending
