"""A stand-in for docker: containers that are a namespace of processes and of mounts, and a `docker` that enters them.

It knows `docker exec -i NAME CMD ..` alone, and what docker says of a container that is not there.
"""

from collections.abc import Callable
from pathlib import Path

PROGRAM = """#!/bin/sh
[ "$1 $2" = "exec -i" ] || { echo "docker: unknown command $1 $2" >&2; exit 125; }
pid=$(cat "@FOLDER@/$3" 2>/dev/null) || { echo "Error response from daemon: No such container: $3" >&2; exit 1; }
shift 3
exec nsenter --target "$pid" --pid --mount env -i PATH=/usr/bin:/bin INSIDE=yes "$@"
"""
START = """
unshare --pid --fork --mount --mount-proc sleep 100000 > /dev/null 2>&1 < /dev/null &
outer=$!
for _ in $(seq 200); do
  sleep 0.05
  read -r inner rest < "/proc/$outer/task/$outer/children"
  [ -n "$inner" ] && [ "$(cat "/proc/$inner/comm")" = sleep ] && break
done
echo "$inner" > "$1"
echo "$outer"
"""


def write_docker(folder: Path) -> Path:
    """The program, whose containers stand in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "docker"
    program.write_text(PROGRAM.replace("@FOLDER@", str(folder)))
    program.chmod(0o755)
    return program


def start_container(run: Callable[[list[str]], str], folder: Path, name: str) -> int:
    """Start a container where `run` runs commands; returns the process that ends it when it is killed."""
    return int(run(["bash", "-c", START, "start", str(folder / name)]))
