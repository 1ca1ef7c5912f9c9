"""What hosts without a shared folder wrote, fetched into the run's folder here: journals, and logs where asked for.

A mirror holds a file under its whole path, each byte at its own place: what an output held of earlier runs stays a
hole. So two commands that fetch at once write the same bytes twice, nothing is locked, and whatever reads a run on a
shared folder reads it here by the same numbers. The price is that what was fetched is there twice.
"""

import base64
import os
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagscale.errors import RunError
from flagscale.runner.launch.journal import write_small
from flagscale.runner.launch.record import TAIL, HostRecord

if TYPE_CHECKING:
    from flagscale.runner.launch.reach import Links, Reply

REPORT_LIMIT_S = 20.0
READ_LIMIT_S = 60.0


def find_away(records: Iterable[HostRecord]) -> list[HostRecord]:
    """The hosts whose files are elsewhere."""
    return [record for record in records if record.mirror is not None]


def write_at(path: Path, start: int, data: bytes) -> None:
    """
    Raises:
        RunError: the disk is full, or the folder is not ours to write.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600), "wb", buffering=0) as file:
            file.seek(start)
            while data:
                data = data[file.write(data) or 0 :]
    except OSError as error:
        raise RunError(f"cannot keep here what was fetched: {path}: {error.strerror}") from None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def fetch_reports(records: Sequence[HostRecord], links: "Links") -> "dict[str, Reply]":
    """What each of these hosts says of its part, all at once; their journals and the ends of their logs are kept.

    Raises:
        RunError: they cannot be written here.
    """
    offsets = {record.label: _size(record.locate(record.spec.events)) for record in records}
    requests = {
        record.label: {
            "events": record.spec.events,
            "offset": offsets[record.label],
            "heartbeat": record.spec.heartbeat,
            "output": record.spec.output,
            "token": record.spec.token,
        }
        for record in records
    }
    replies = links.call("report", requests, REPORT_LIMIT_S)
    for record in records:
        if not replies[record.label].fault:
            _keep_report(record, offsets[record.label], replies[record.label].answer)
    return replies


def _keep_report(record: HostRecord, offset: int, answer: Mapping[str, Any]) -> None:
    """The journal last: whoever sees its end finds the rest."""
    for source, text in answer["tails"].items():
        tail = record.locate(source + TAIL)
        write_at(tail, 0, b"")
        write_small(str(tail), text)
    if answer["beat_age_s"] is not None:
        beat = record.locate(record.spec.heartbeat)
        write_at(beat, 0, b"")
        then = time.time() - answer["beat_age_s"]
        os.utime(beat, (then, then))
    write_at(record.locate(record.spec.events), offset, answer["events"].encode("latin-1"))


def fetch_file(record: HostRecord, links: "Links", path: str, start: int = 0, end: int | None = None) -> str | None:
    """Bring one of the host's files up to date here, from byte `start` on; returns why that cannot be done, or None."""
    kept = record.locate(path)
    while True:
        first = max(start, _size(kept))
        if end is not None and first >= end:
            return None
        request = {"path": path, "start": first, "end": end}
        reply = links.call("read", {record.label: request}, READ_LIMIT_S)[record.label]
        if reply.fault:
            return reply.fault
        if reply.answer.get("fault"):
            return f"{path}: {reply.answer['fault']}"
        write_at(kept, first, zlib.decompress(base64.b64decode(reply.answer["data"])))
        if reply.answer["is_all"]:
            return None


def fetch_outputs(records: Sequence[HostRecord], links: "Links") -> dict[str, str]:
    """Bring the outputs of hosts that have begun up to date here, all at once; label -> why one is not."""
    begun = {record.label: record for record in find_away(records) if record.find("agent_started")}

    def fetch(label: str) -> str | None:
        record = begun[label]
        return fetch_file(record, links, record.spec.output, record.output_start, record.output_end)

    return {label: fault for label, fault in links.each(begun, fetch).items() if fault}


def fetch_rank_files(record: HostRecord, links: "Links", local_rank: int) -> None:
    """Bring torchrun's files of a rank, those of its last attempt, up to date here."""
    details = str(Path(record.spec.details_dir, record.spec.run_id))
    request = {record.label: {"details": details, "local_rank": local_rank}}
    for path in links.call("ranks", request)[record.label].answer.get("paths", []):
        fetch_file(record, links, path)
