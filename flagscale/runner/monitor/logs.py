"""Showing what a job wrote: the output of its hosts, or torchrun's own files of one rank."""

import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flagscale.errors import RunError
from flagscale.runner.launch.folder import RunRef
from flagscale.runner.launch.reach import Look
from flagscale.runner.launch.record import HostRecord, load_records

POLL_S = 0.3
_ATTEMPT = re.compile(r"attempt_(\d+)")


@dataclass(slots=True)
class Tail:
    """Reads whole lines of a file that grows, from byte `position` on, up to `end` where a later run's part begins."""

    path: Path
    position: int = 0
    end: int | None = None
    name: str = ""
    _rest: bytes = field(default=b"", repr=False)

    def read_lines(self) -> Iterator[str]:
        """The lines that were finished since the last call."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.position)
                fresh = file.read() if self.end is None else file.read(max(0, self.end - self.position))
        except OSError:
            return
        self.position += len(fresh)
        *lines, self._rest = (self._rest + fresh).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)

    def read_last(self, count: int | None) -> Iterable[str]:
        """As `read_lines`, of them only so many last ones; None for all."""
        return self.read_lines() if count is None else deque(self.read_lines(), maxlen=count)

    def read_rest(self) -> Iterator[str]:
        """The last line, where the writer ended without finishing it."""
        if self._rest:
            rest, self._rest = self._rest, b""
            yield rest.decode(errors="replace")


def find_output_tails(run: RunRef) -> list[Tail]:
    """One a host: the part of its output that this run wrote."""
    return [Tail(record.output, record.output_start, record.output_end, record.label) for record in load_records(run)]


def check_outputs_left(run: RunRef) -> None:
    """
    Raises:
        RunError: what the run wrote was deleted.
    """
    for record in load_records(run):
        if record.find("agent_started") and not record.output.exists():
            raise RunError(f"run {run.run_id}: its output {record.output} is gone; someone deleted it")


def _locate(run: RunRef, rank: int, records: Sequence[HostRecord]) -> tuple[HostRecord, int]:
    for record in records:
        for entry in record.spec.processes:
            first_rank = record.find_first_rank(entry)
            if first_rank <= rank < first_rank + entry.num_ranks:
                return record, rank - first_rank
    num_ranks = sum(record.num_ranks for record in records)
    if num_ranks == 0:
        raise RunError(f"run {run.run_id} has no ranks; leave out --rank")
    raise RunError(f"run {run.run_id} has no rank {rank}; expected 0 to {num_ranks - 1}")


def find_rank_tails(run: RunRef, rank: int) -> list[Tail]:
    """torchrun's stdout and stderr of one rank, those of its last attempt.

    Raises:
        RunError: there is no such rank, or torchrun kept no files of it.
    """
    record, local_rank = _locate(run, rank, load_records(run))
    details = Path(record.spec.details_dir, run.run_id)
    tails: list[Tail] = []
    for stream in ("stdout", "stderr"):
        paths = details.glob(f"**/attempt_*/{local_rank}/{stream}.log")
        if last := max(paths, key=_order, default=None):
            tails.append(Tail(last, name=stream))
    if not tails:
        raise RunError(f"no file of rank {rank} below {details}; torchrun writes them with `redirects: 3`")
    return tails


def _order(path: Path) -> tuple[float, int]:
    attempt = _ATTEMPT.search(str(path))
    return path.parent.parent.stat().st_mtime, int(attempt[1]) if attempt else 0


def follow_lines(tails: Sequence[Tail], has_ended: Callable[[], bool]) -> Iterator[tuple[Tail, str]]:
    """Every line of every tail as it comes, until `has_ended` and nothing more is there."""
    while True:
        is_last = has_ended()
        for tail in tails:
            yield from ((tail, line) for line in tail.read_lines())
            if is_last:
                yield from ((tail, line) for line in tail.read_rest())
        if is_last:
            return
        time.sleep(POLL_S)


def print_logs(
    run: RunRef,
    write: Callable[[str], object],
    *,
    rank: int | None = None,
    num_lines: int | None = None,
    follow: bool = False,
) -> None:
    """Write a run's lines as they are; with several sources, each behind the name of its own.

    num_lines: only so many last ones of each source
    follow: go on until the run ends

    Raises:
        RunError: there is no such rank, or the output was deleted.
    """
    if rank is None:
        check_outputs_left(run)
    tails = find_output_tails(run) if rank is None else find_rank_tails(run, rank)
    width = max(len(tail.name) for tail in tails)

    def show(tail: Tail, line: str) -> None:
        write(f"{tail.name:{width}} | {line}\n" if len(tails) > 1 else f"{line}\n")

    for tail in tails:
        for line in tail.read_last(num_lines):
            show(tail, line)
    if not follow:
        for tail in tails:
            for line in tail.read_rest():
                show(tail, line)
        return
    look = Look(run)
    for tail, line in follow_lines(tails, lambda: not any(record.is_alive for record in look.load_records())):
        show(tail, line)
