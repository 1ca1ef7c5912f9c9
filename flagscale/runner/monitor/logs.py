"""Showing what a job wrote: the output of its hosts, or torchrun's own files of one rank."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from flagscale.errors import RunError, find_nearest
from flagscale.runner.launch.folder import RunRef
from flagscale.runner.launch.journal import find_rank_files
from flagscale.runner.launch.mirror import fetch_outputs, fetch_rank_files
from flagscale.runner.launch.reach import Links, Look
from flagscale.runner.launch.record import HostRecord, load_records

POLL_S = 0.3


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


def find_output_tails(run: RunRef, host: str | None = None) -> list[Tail]:
    """One a host: the part of its output that this run wrote.

    host: only this one, by its name or its label

    Raises:
        RunError: the run has no such host.
    """
    records = [record for record in load_records(run) if host is None or host in _names_of(record)]
    if not records:
        names = [_names_of(record)[0] for record in load_records(run)]
        near = find_nearest(host or "", names)
        hint = f"did you mean `{near}`?" if near else f"expected one of {', '.join(names)}"
        raise RunError(f"run {run.run_id} has no host `{host}`; {hint}")
    known = (record for record in records if record.mirror is None or record.find("agent_started"))
    return [Tail(record.output, record.output_start, record.output_end, record.label) for record in known]


def _names_of(record: HostRecord) -> tuple[str, str]:
    return record.label.removeprefix(f"host_{record.spec.node_rank}_"), record.label


def check_outputs_left(run: RunRef) -> None:
    """
    Raises:
        RunError: what the run wrote was deleted.
    """
    for record in load_records(run):
        if record.find("agent_started") and record.mirror is None and not record.output.exists():
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
    paths = find_rank_files(record.locate(str(details)), local_rank)
    if not paths:
        raise RunError(f"no file of rank {rank} below {details}; torchrun writes them with `redirects: 3`")
    return [Tail(path, name=path.stem) for path in paths]


def _fetch_rank(run: RunRef, rank: int, records: Sequence[HostRecord], links: Links) -> dict[str, str]:
    record, local_rank = _locate(run, rank, load_records(run))
    if record.mirror is not None and any(record.label == reached.label for reached in records):
        fetch_rank_files(record, links, local_rank)
    return {}


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
    host: str | None = None,
    rank: int | None = None,
    num_lines: int | None = None,
    follow: bool = False,
) -> None:
    """Write a run's lines as they are; with several sources, each behind the name of its own.

    host: only this host's, by its name or its label
    num_lines: only so many last ones of each source
    follow: go on until the run ends

    Raises:
        RunError: there is no such host or rank, or the output was deleted.
    """
    fetch_rank = None if rank is None else partial(_fetch_rank, run, rank)
    with Links(run.remotes) as links:
        look = Look(run, links, also=fetch_rank or fetch_outputs)
        tell_unread(look.fetch())
        if rank is None:
            check_outputs_left(run)
            tails = find_output_tails(run, host)
        else:
            tails = find_rank_tails(run, rank)
        width = max((len(tail.name) for tail in tails), default=0)

        def show(tail: Tail, line: str) -> None:
            write(f"{tail.name:{width}} | {line}\n" if len(tails) > 1 else f"{line}\n")

        def has_ended() -> bool:
            is_over = not any(record.is_alive for record in look.load_records())
            if is_over:
                look.fetch()
            return is_over

        for tail in tails:
            for line in tail.read_last(num_lines):
                show(tail, line)
        if not follow:
            for tail in tails:
                for line in tail.read_rest():
                    show(tail, line)
            return
        for tail, line in follow_lines(tails, has_ended):
            show(tail, line)


def tell_unread(unread: Mapping[str, str]) -> None:
    for label, why in unread.items():
        print(f"{label} {why}; shown is what was fetched before", file=sys.stderr)
