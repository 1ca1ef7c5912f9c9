"""Why an engine died, in one line: from the last part of what it printed.

An engine ends with a page of traceback whose last line is seldom the reason. The usual reasons are few, and each engine
says them in words of its own; a table of these words gives the kind of the fault and a line that a person can act on.
What the table does not know is told by the last line that looks like an error.
"""

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["model", "port", "argument", "chips", "memory", "module", "killed", "ray", "host", "other"]
"""host: a host of the replica cannot be reached"""
FINAL: frozenset[Kind] = frozenset({"model", "argument", "chips", "module"})
"""kinds that another start cannot mend"""


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a replica ended. line: what to tell, without a full stop."""

    kind: Kind
    line: str

    def __str__(self) -> str:
        return self.line


def _rows(kind: Kind, *rows: tuple[str, str]) -> list[tuple[Kind, re.Pattern[str], str]]:
    return [(kind, re.compile(pattern, re.MULTILINE), line) for pattern, line in rows]


_KNOWN: list[tuple[Kind, re.Pattern[str], str]] = [
    *_rows(
        "argument",
        (r"error: unrecognized arguments: (.+)$", "the engine does not know the argument {0}"),
        (r"error: (argument -\S+: .+)$", "{0}"),
        (r"error: (the following arguments are required: .+)$", "{0}"),
        (r"error: invalid argument: (\S+)", "the engine does not know the argument {0}"),
        (r'error while handling argument "(\S+)": (.+)$', "argument {0}: {1}"),
    ),
    *_rows(
        "module",
        (r"ModuleNotFoundError: No module named '([\w.]+)'", "the Python module `{0}` is not installed"),
        (r"No module named ([\w.]+)$", "the Python module `{0}` is not installed"),
        (r"exec: (\S+): (?:cannot execute: )?[Nn]ot? (?:found|such file)", "the program `{0}` is not on the PATH"),
        (r"ImportError: (\S+\.so[\d.]*): cannot open shared object", "the library {0} is missing"),
        (r"ImportError: (.+)$", "a module cannot be imported: {0}"),
    ),
    *_rows(
        "port",
        (r"\[Errno 98\].*?address.*? already in use", "its port is taken"),
        (r"Address already in use", "its port is taken"),
        (r"couldn't bind HTTP server socket, hostname: \S+, port: (\d+)", "its port {0} is taken"),
    ),
    *_rows(
        "model",
        (r"Invalid repository ID or local directory specified: '?([^'\s]+)", "there is no model at {0}"),
        (r"(?:OSError|ValueError): (\S+) is not a local folder and is not a valid model", "there is no model at {0}"),
        (r"HFValidationError: .*?: '([^']+)'", "there is no model at {0}"),
        (r"Cannot find any model weights with `([^`]+)`", "{0} holds no weights"),
        (r"failed to open GGUF file '?([^'\n]+?)'?(?: \(.*)?$", "there is no model at {0}"),
        (r"failed to load model,? '([^']+)'", "the model {0} cannot be loaded"),
        (r"(?:error|OSError): (\S+ does not appear to have a file named \S+)", "{0}"),
        (r"Model architectures \[?(.+?)\]? are not supported", "the engine does not know the architecture {0}"),
    ),
    *_rows(
        "chips",
        (r"World size \((\d+)\) is larger than the number of available GPUs \((\d+)\)", "needs {0} chips and sees {1}"),
        (r"The number of required \w+ \w*\s*exceeds the total number of available", "needs more chips than Ray has"),
        (r"(Failed to infer device type)", "sees no chip that it knows: {0}"),
        (r"CUDA error: invalid device ordinal", "was given a chip that this machine does not have"),
        (r"No CUDA GPUs are available", "sees no chip"),
        (r"(?:no CUDA-capable device is detected|Found no NVIDIA driver)", "sees no chip"),
    ),
    *_rows(
        "memory",
        (r"(?:OutOfMemoryError|out of memory).*?Tried to allocate ([\d.]+ \w+)", "out of memory: {0} more asked for"),
        (r"(Free memory on device .+?) is less than desired", "too little free memory: {0}"),
        (r"(No available memory for the cache blocks)", "{0}: raise gpu_memory_utilization, or lower max_model_len"),
        (r"(KV cache is needed, which is larger than the available KV cache[^.]*)", "{0}: lower max_model_len"),
        (r"cache is needed, which is larger than the available KV", "the cache does not fit: lower max_model_len"),
        (r"Not enough memory\. Please try to increase --mem-frac", "out of memory: raise mem_fraction_static"),
        (r"(?:\bMemoryError|Cannot allocate memory|unable to allocate \S+ buffer|DefaultCPUAllocator: can't allocate)",
         "out of memory"),
        (r"[Oo]ut of memory(?!.*Tried to allocate)", "out of memory"),
    ),
    *_rows(
        "ray",
        (r"Waiting for creating a placement group of specs for (\d+) seconds", "waits for Ray workers since {0} s"),
        (r"(?:Could not connect to|Failed to connect to) (?:Ray|GCS)", "cannot reach the head of its Ray cluster"),
    ),
]  # fmt: skip
_ORDER: tuple[Kind, ...] = ("argument", "module", "port", "model", "chips", "memory")
"""kinds by which a death is explained; `ray` is only told of one that waits"""
_ERROR_LINE = re.compile(r"(?:\b[A-Z]\w*(?:Error|Exception)\b|^error): .*\S", re.MULTILINE)
_NOISE = re.compile(
    r"^(?:\(\w+[^)]*\)\s*)?(?:(?:INFO|WARNING|ERROR|DEBUG)\b\s*)?"
    r"(?:\[?[\d-]+[ T][\d:,.]+(?: [A-Z]+\d+)*\]?\s*)?(?:\[[^\]]*\]\s*)*"
)
"""who speaks, how loud, when and from where, as vLLM, SGLang and Python's logging put it before a line"""
_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
LONGEST_LINE = 300


def find_cause(text: str, kinds: tuple[Kind, ...] = _ORDER) -> Cause | None:
    """The last known cause in an engine's output, None where it says nothing that looks like an error."""
    text = _COLOURS.sub("", text)
    found: list[tuple[int, Cause]] = []
    for kind, pattern, line in _KNOWN:
        if kind in kinds and (matches := list(pattern.finditer(text))):
            told = " ".join(line.format(*matches[-1].groups()).split())
            found.append((matches[-1].start(), Cause(kind, told[:LONGEST_LINE])))
    if found:  # what came last: engines warn of this and that before they meet what ends them
        return max(found, key=lambda row: row[0])[1]
    lines = _ERROR_LINE.findall(text)
    return Cause("other", lines[-1].strip().removeprefix("error: ")[:LONGEST_LINE]) if lines else None


def explain_end(text: str, reason: str | None) -> Cause:
    """Why a run ended: by its output, else by what its agent says of its end (`main died of SIGKILL`)."""
    if reason and "SIGKILL" in reason:
        return Cause("killed", f"{reason}: killed from outside, or by the kernel for lack of memory")
    return find_cause(text) or Cause("other", reason or "it ended without a word")


def find_progress(text: str) -> str:
    """The last line with something to say, without time stamps and colours, cut to a width that a screen has."""
    for line in reversed(_COLOURS.sub("", text).replace("\r", "\n").splitlines()):
        told = _NOISE.sub("", line).strip()
        if any(letter.isalpha() for letter in told):
            return told[:120]
    return ""
