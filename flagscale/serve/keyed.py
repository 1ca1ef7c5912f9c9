"""Run a server whose only way to be told its key is an option: `python -m flagscale.serve.keyed <module> <words>`.

An option of a process can be read by everybody on its machine. The key is therefore taken from the environment and
joined to the words inside the process, after its command line is fixed.
"""

import os
import runpy
import sys

from flagscale.errors import UserError
from flagscale.runner.plan.service import ENGINE_KEY


def main(words: list[str]) -> None:
    """Run the module that the first word names, as `python -m` does, with `--api-key` behind the other words.

    Raises:
        UserError: there is no module, or no key.
    """
    key = os.environ.get(ENGINE_KEY)
    if not words or not key:
        raise UserError(f"keyed: needs the name of a module, and a key in ${ENGINE_KEY}")
    sys.argv[1:] = [*words[1:], "--api-key", key]
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
