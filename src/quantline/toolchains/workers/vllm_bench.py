"""Runs vLLM's own benchmark commands, one after another, in one process of vLLM's environment.

Each command is run by vLLM's own command line, as `vllm bench serve ...`, so the measurement is that command's. Only the
import, 10 s or more on a busy machine, happens once instead of once per command.

Job: `runs`, each with `arguments` (those after `vllm`), `result` (the JSON file that the command writes) and `label`.
Data: `results`, the content of those files, in order.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantline.toolchains.protocol import JobError, Reporter, worker_main


def run(job: dict[str, Any], report: Reporter) -> Mapping[str, Any]:
    """Run all commands; the first failure ends the job with its message."""
    from vllm.entrypoints.cli.main import main  # type: ignore[import-not-found]

    # Without this its HTTP client would send even local requests to a proxy from the environment.
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost,::1"
    results = []
    for done, each in enumerate(job["runs"]):
        report(done, len(job["runs"]), each["label"])
        sys.argv = ["vllm", *each["arguments"]]
        try:
            main()
        except SystemExit as error:
            if error.code:
                command = " ".join(["vllm", *each["arguments"]])
                raise JobError(
                    f"`{command}` exited with code {error.code}; this vLLM may take other arguments"
                ) from error
        results.append(json.loads(Path(each["result"]).read_text(encoding="utf-8")))
    report(len(job["runs"]), len(job["runs"]), "done")
    return {"results": results}


if __name__ == "__main__":
    worker_main(run)
