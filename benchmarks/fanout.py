"""What 64 hosts cost beyond one: launching, querying and stopping a trivial job over SSH, each a whole command.

    python benchmarks/fanout.py [--hosts 64] [--runs 3]         as root: it makes test hosts (tools/testhosts)

Three command lines are timed in turn, on one host, on all hosts, and as the shell loop that a user would write without
a launcher: `ssh` to one host after another, to start the bare program with its output in a file and see that it is up,
look whether it lives, and end it. The medians give two ratios a verb:

    all hosts / one host                      promised: at most 4
    one ssh after another / all hosts         promised: at least 8

All hosts are processes of this one machine. What they do at once on machines of their own, they do here in turn on
its cores, so the line `machine` says how many processor seconds launcher and hosts used, and how long the cores would
take for that if they were never idle: no launcher that does the same work can be faster here. On a machine with
enough cores for all the hosts the two ratios are those of the launcher alone. On one that has other work too, wall
times say little, and the loop's, which mostly waits, least: `chrt -r 1 python benchmarks/fanout.py` goes before it.
"""

import argparse
import contextlib
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from testhosts.hosts import HostSet, hosts_up  # noqa: E402

MOST_TIMES_ONE = 4.0
LEAST_GAIN = 8.0
VERBS = ("launch", "query", "stop")
MAIN = "import sys; from flagscale.cli import main; sys.exit(main())"
TRIVIAL = """\
#!/bin/sh
while [ "$1" != --node-rank ]; do shift; done
RANK=$2 LOCAL_RANK=0 sleep 1000000 &
: > "$FLAGSCALE_RANK_DIR/rank_$2.up"
wait
"""
"""In torchrun's place: one rank that is up at once."""


@dataclass(frozen=True, slots=True)
class Cost:
    """wall_s: of the command; cpu_s: of the command and of all hosts, while it ran; hosts_s: of the hosts alone"""

    wall_s: float
    cpu_s: float
    hosts_s: float


@dataclass(frozen=True, slots=True)
class Bench:
    """The hosts, and a folder with a configuration for each number of them."""

    hosts: HostSet
    base: Path

    def write(self, num_hosts: int) -> None:
        folder = self.base / f"of_{num_hosts}"
        (folder / "train").mkdir(parents=True)
        entry = folder / "flagscale" / "train" / "train_gpt.py"
        entry.parent.mkdir(parents=True)
        entry.touch()
        program = folder / "trivial"
        program.write_text(TRIVIAL)
        program.chmod(0o755)
        (folder / "hostfile").write_text("".join(f"h{number} slots=1\n" for number in range(1, num_hosts + 1)))
        runner = {"backend": str(program), "hostfile": str(folder / "hostfile"), "nnodes": num_hosts}
        task = {"type": "train", "backend": "pi0", "entrypoint": str(entry)}
        experiment = {"exp_name": "trivial", "exp_dir": str(folder / "exp"), "task": task, "runner": runner}
        config = {"defaults": ["_self_", {"train": "none"}], "experiment": experiment, "action": "run"}
        (folder / "job.yaml").write_text(json.dumps(config))
        (folder / "train" / "none.yaml").write_text(json.dumps({"system": {}, "model": {}, "data": {}}))

    def verb(self, name: str, num_hosts: int) -> Cost:
        folder = self.base / f"of_{num_hosts}"
        exp_dir = str(folder / "exp")
        words = {"launch": ["run", str(folder / "job.yaml")], "query": ["status", exp_dir], "stop": ["stop", exp_dir]}
        # a user's Python keeps what it compiles
        settings = ["-u", "PYTHONDONTWRITEBYTECODE", f"FLAGSCALE_STATE_DIR={self.base / 'state'}", f"PYTHONPATH={ROOT}"]
        return self.time(["env", *settings, sys.executable, "-c", MAIN, *words[name]])

    def loop(self, name: str, num_hosts: int) -> Cost:
        """The same by hand: the bare program on one host after another, its number and its output in files a host."""
        pid = f"{self.base}/$host.pid"
        commands = {
            "launch": f"setsid sleep 1000000 < /dev/null > {self.base}/$host.log 2>&1 & echo $! > {pid}; kill -0 $!",
            "query": f"kill -0 $(cat {pid})",
            "stop": f"kill $(cat {pid})",
        }
        hosts = " ".join(f"h{number}" for number in range(1, num_hosts + 1))
        script = f'for host in {hosts}; do ssh -o BatchMode=yes $host "host=$host; "{shlex.quote(commands[name])}; done'
        return self.time(["bash", "-c", script])

    def time(self, command: Sequence[str]) -> Cost:
        """Run a command where launchers run.

        Raises:
            CalledProcessError: it failed; what it said is on standard error.
        """
        of_hosts, of_us, start = self._cpu_of_hosts(), _cpu_of_children(), time.perf_counter()
        done = subprocess.run(self.hosts.command(command), capture_output=True, text=True)
        wall_s = time.perf_counter() - start
        if done.returncode != 0:
            print(done.stderr, file=sys.stderr)
            done.check_returncode()
        hosts_s = self._cpu_of_hosts() - of_hosts
        return Cost(wall_s, hosts_s + _cpu_of_children() - of_us, hosts_s)

    def _cpu_of_hosts(self) -> float:
        """Processor seconds of all processes of the hosts, those included that have ended and were waited for."""
        network = {str(member.namespace): member.name for member in self.hosts.layout.hosts}
        known = {Path(f"/run/netns/{name}").stat().st_ino for name in network}
        ticks = 0
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (folder / "ns" / "net").stat().st_ino in known:
                    text = (folder / "stat").read_text()
                    ticks += sum(map(int, text[text.rindex(")") + 2 :].split()[11:15]))
        return ticks / os.sysconf("SC_CLK_TCK")


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def median(costs: Sequence[Cost]) -> Cost:
    return Cost(*map(statistics.median, zip(*((cost.wall_s, cost.cpu_s, cost.hosts_s) for cost in costs), strict=True)))


def compare(verb: str, one: Cost, many: Cost, loop: Cost, num_hosts: int) -> bool:
    """Print a verb's ratios; returns whether both promises are kept."""
    times, gain = many.wall_s / one.wall_s, loop.wall_s / many.wall_s
    cores = os.cpu_count() or 1
    floor_s = many.cpu_s / cores
    verdict = "kept" if times <= MOST_TIMES_ONE and gain >= LEAST_GAIN else "BROKEN"
    print(
        f"{verb}: {num_hosts} hosts take {times:.2f} times what one takes (promised at most {MOST_TIMES_ONE:g}), and"
        f" {gain:.2f} times less than one ssh after another (at least {LEAST_GAIN:g}): {verdict}"
    )
    print(
        f"  one {one.wall_s:.2f} s, {num_hosts} hosts {many.wall_s:.2f} s, one ssh after another {loop.wall_s:.2f} s"
        f" ({loop.cpu_s:.2f} processor seconds); machine: {many.cpu_s:.2f} processor seconds"
        f" ({1000 * many.hosts_s / num_hosts:.0f} ms a host), {floor_s:.2f} s of all {cores} cores"
    )
    return verdict == "kept"


def measure(bench: Bench, num_hosts: int, runs: int) -> bool:
    rows: dict[tuple[str, str], list[Cost]] = {}
    for _ in range(runs):
        for count, name in ((1, "one"), (num_hosts, "many")):
            for verb in VERBS:
                rows.setdefault((name, verb), []).append(bench.verb(verb, count))
        for verb in VERBS:
            rows.setdefault(("loop", verb), []).append(bench.loop(verb, num_hosts))
    kept = [compare(verb, *(median(rows[name, verb]) for name in ("one", "many", "loop")), num_hosts) for verb in VERBS]
    return all(kept)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=64, help="default: 64")
    parser.add_argument("--runs", type=int, default=3, help="counted rounds (default: 3)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        with hosts_up(args.hosts, f"fan{os.getpid()}", state_dir=base / "hosts") as hosts:
            bench = Bench(hosts, base)
            for count in {1, args.hosts}:
                bench.write(count)
            kept = measure(bench, args.hosts, args.runs)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
