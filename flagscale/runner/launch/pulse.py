"""The two questions that are asked most, in the shell of the host: does a run's agent live, and end it.

An errand in Python takes a host's processor some fifty times as long to start as this does to run, and a launcher asks
again and again, whole clusters at once. So what can be settled by a look into /proc is settled so: a process is the one
meant if it has the same number and start time, on the same start of the same machine, as `procs.is_same_alive` has it.
What the shell finds dead is asked again by an errand, which also looks for what lives on without its watchers.
"""

import signal
from collections.abc import Mapping
from typing import Any

_MEANT = """\
[ "$(cat /proc/sys/kernel/random/boot_id) $(readlink /proc/self/ns/pid)" = "$1" ] || { echo '{}'; exit 0; }
name=$2
shift 2
found=false
while [ $# -gt 1 ]; do
  pid=$1 start_time=$2
  shift 2
  stat=$(cat "/proc/$pid/stat" 2> /dev/null) || continue
  is_meant() { case $1 in [ZX]) return 1 ;; esac; [ "${20}" = "$start_time" ]; }
  is_meant ${stat##*) } || continue
  found=true
  [ -z "$name" ] || kill -s "$name" "$pid" 2> /dev/null
done
echo "{\\"is_watched\\": $found}"
"""


def render_pulse(watchers: Mapping[str, Any], signum: int | None = None) -> list[str]:
    """The words of a command that answers `{"is_watched": true}` if one of the processes lives, else `false` or `{}`.

    watchers: as of `reach.watchers_of`
    signum: sent to each of them that lives
    """
    pairs = [str(number) for pair in watchers["pids"] for number in pair]
    name = signal.Signals(signum).name.removeprefix("SIG") if signum else ""
    return ["sh", "-c", _MEANT, "pulse", str(watchers["machine"]), name, *pairs]
