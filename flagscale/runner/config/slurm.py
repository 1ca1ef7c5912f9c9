"""What a job asks of Slurm beside its nodes: `experiment.runner.slurm`.

Five options have keys of their own because nearly every cluster wants them; whatever else sbatch knows is passed under
its own long name. What the launcher must set itself to keep its word (how many nodes, where the output goes, that a
node bears one agent) is refused here.
"""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from flagscale.runner.config.section import Section

OURS = frozenset(
    {
        *("job-name", "nodes", "ntasks", "ntasks-per-node", "output", "error", "open-mode", "requeue", "no-requeue"),
        *("array", "chdir", "wrap", "parsable", "wait", "test-only", "export", "export-file", "input", "signal"),
    }
)
"""options of sbatch that the launcher sets, or that would make of one job several or none"""
_OWN_KEYS = frozenset({"partition", "account", "qos", "time", "nodelist"})
_NAME = re.compile(r"[a-z][a-z0-9-]*")
_TIME = re.compile(r"\d+|\d+:\d+|\d+:\d+:\d+|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)
_FORBIDDEN = re.compile(r"""[\x00-\x1f\x7f"'\\]""")


def _check_value(text: str) -> str:
    if not text or _FORBIDDEN.search(text):
        raise ValueError("a value of sbatch on one line, without quotes and backslashes")
    return text


def _read_time(value: Any) -> Any:
    """YAML reads 1:30:00 as the number 5400, which Slurm would take for minutes: only text is unmistakable."""
    if not isinstance(value, str) or not _TIME.fullmatch(value):
        raise ValueError('a time in quotes: "minutes", "hours:minutes:seconds" or "days-hours:minutes:seconds"')
    return value


def _read_option(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _check_options(options: dict[str, str | bool]) -> dict[str, str | bool]:
    """Under sbatch's spelling: dashes."""
    spelled = {name.replace("_", "-"): value for name, value in options.items()}
    for name in spelled:
        if not _NAME.fullmatch(name):
            raise ValueError(f"long names of sbatch's options, without the dashes before them; `{name}` is none")
        if name in OURS:
            raise ValueError(f"options that the launcher does not set itself; `{name}` is one that it does")
        if name in _OWN_KEYS:
            raise ValueError(f"`{name}` under its own key, `experiment.runner.slurm.{name}`")
    return spelled


Value = Annotated[str, AfterValidator(_check_value)]
Option = Annotated[Value | bool, BeforeValidator(_read_option)]


class Slurm(Section):
    """What a job asks of Slurm. Nodes and ranks are `runner.nnodes` and `runner.nproc_per_node`."""

    partition: Value | None = None
    account: Value | None = None
    qos: Value | None = None
    time: Annotated[str, BeforeValidator(_read_time)] | None = None
    nodelist: Value | None = None
    options: Annotated[dict[str, Option], AfterValidator(_check_options)] = Field(default_factory=dict)
    """further options of sbatch by their long names: `gres: gpu:8`, `cpus-per-task: 32`, `exclusive: true`"""

    def list_options(self) -> tuple[tuple[str, str], ...]:
        """(name, value) as sbatch takes them, the value empty for a switch."""
        named = {"partition": self.partition, "account": self.account, "qos": self.qos, "time": self.time}
        rows: dict[str, str | bool | None] = {**named, "nodelist": self.nodelist, **self.options}
        return tuple(
            (name, "" if value is True else str(value)) for name, value in rows.items() if value not in (None, False)
        )
