"""From a process of a plan to the bash script that an agent runs.

This is the one place where a word is quoted for a shell. The only text that passes unquoted is the user's own shell
code, `cmds.before_start`; a failure in it ends the script before the process starts. A part of a word that only the
host knows, because a scheduler chose it, is read from the environment (`from_environment`), quoted like the rest.
"""

import re
import shlex
from collections.abc import Mapping

from flagscale.runner.plan.job import HostPlan, JobPlan, LaunchName, ProcessSpec
from flagscale.runner.render.argv import bind_word, render_argv

_FROM_ENVIRONMENT = re.compile("\0([A-Z][A-Z0-9_]*)\0")


def from_environment(name: str) -> str:
    """Stands in a word for the value that this variable has on the host. No other word can hold a NUL."""
    return f"\0{name}\0"


def quote_word(word: str) -> str:
    """The word as bash reads it back. A NUL makes shlex quote the word whole, so a mark is always inside of quotes."""
    return _FROM_ENVIRONMENT.sub(r"""'"${\1:?}"'""", shlex.quote(word))


def _quoted_argv(argv: tuple[str, ...]) -> str:
    """One option with its values a line, so that two scripts differ line by line."""
    lines: list[list[str]] = [[]]
    for word in argv:
        if word.startswith("--") and lines[-1]:
            lines.append([])
        lines[-1].append(quote_word(word))
    return " \\\n  ".join(" ".join(line) for line in lines)


def _prepend(name: str, folders: tuple[str, ...]) -> str:
    return f"export {name}={':'.join(map(shlex.quote, folders))}${{{name}:+:${name}}}"


def _exports(process: ProcessSpec, values: Mapping[LaunchName, str] | None) -> list[str]:
    """The environment; what the process needs on PATH and PYTHONPATH stays before what the user puts there."""
    lines = [f"export {name}={quote_word(bind_word(value, values))}" for name, value in process.env]
    named = {name for name, _ in process.env}
    if process.path_dirs:
        lines.append(_prepend("PYTHONPATH", process.path_dirs))
    if process.bin_dirs and "PATH" in named:
        lines.append(_prepend("PATH", process.bin_dirs))
    return lines


def render_script(
    plan: JobPlan, host: HostPlan, process: ProcessSpec, values: Mapping[LaunchName, str] | None = None
) -> str:
    """The whole script of one process.

    values: what was chosen at launch; None renders each such value as its name, as a dry run shows it.
    """
    lines = [
        "#!/usr/bin/env bash",
        f"# {process.name} on {host.label} of {plan.exp_name or plan.task}".replace("\n", " "),
        f"cd -- {shlex.quote(process.cwd)} || exit 1",
    ]
    if process.bin_dirs:
        lines.append(_prepend("PATH", process.bin_dirs))
    lines += [f"mkdir -p -- {shlex.quote(path)} || exit 1" for path in host.make_dirs]
    if host.before_start:
        lines += [
            host.before_start.rstrip("\n"),
            "",  # a backslash at the end of the user's code must not swallow the line that looks at its status
            'status=$?; [ "$status" -eq 0 ] || {',
            '  echo "before_start failed with exit code $status" >&2; exit "$status"',
            "}",
            f"cd -- {shlex.quote(process.cwd)} || exit 1",
        ]
    lines += _exports(process, values)
    lines.append(f"exec {_quoted_argv(render_argv(process, values))}")
    return "\n".join(lines) + "\n"
