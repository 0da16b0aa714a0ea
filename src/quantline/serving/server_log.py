"""Read vLLM's log: why the server ended, how much memory its weights take, and which kernels run."""

from __future__ import annotations

import re
from pathlib import Path


def ending(code: int) -> str:
    """How a server with this exit code ended."""
    if code in (137, -9):
        return "was killed (out of memory?)"
    return f"ended with code {code}"


# Lines of vLLM's log start with `(EngineCore pid=123) ERROR 11-21 23:27:11 [core.py:133] `, or with a part of it.
_PREFIX = re.compile(r"^(\(\w[^)]*\)\s)?((DEBUG|INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:]+ (\[[^\]]*\] ?)?)?")
_RAISED = re.compile(r"^([A-Za-z_][\w.]*\.)?[A-Z]\w*(Error|Exception|Exit|Interrupt|NotFound|Failure)\w*(: .*|$)")
_REFUSED = re.compile(r"^(\S+ serve|api_server\.py|usage\S*|\S*main\S*): error: .*|^\S*python\S*: .+")


def failure_reason(log: Path, longest: int = 600) -> str:
    """The message of the exception that ended a server, from its log; if there is none, the last line.

    Each parent process raises a worker's exception again as `... See root cause above`; these are skipped.
    """
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "it left no log"
    lines = [_PREFIX.sub("", line.rstrip()) for line in text.splitlines()]
    reason = ""
    for index, line in enumerate(lines):
        if (_RAISED.match(line) or _REFUSED.match(line)) and "root cause" not in line and "SystemExit" not in line:
            reason = line
            for more in lines[index + 1 : index + 6]:
                # A message of several lines, as pydantic writes, is indented.
                if not more.startswith("  ") or more.lstrip().startswith(("File ", "For further")):
                    break
                reason += " " + more.strip()
    if not reason:
        reason = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
    return reason if len(reason) <= longest else reason[:longest] + " ..."


def weights_bytes(text: str) -> int | None:
    """Memory of the weights as vLLM reports it, summed over its workers; None for the CPU build, which reports none."""
    sizes = re.findall(r"Model loading took ([\d.]+) GiB", text)
    return round(sum(float(size) for size in sizes) * 1024**3) if sizes else None


def kernels(text: str) -> list[str]:
    """The kernels that quantized layers run on, such as `CPUWNA16LinearKernel`; none for a float model."""
    return sorted(set(re.findall(r"Using (\w+) for \w*(?:LinearMethod|linear)\b", text)))
