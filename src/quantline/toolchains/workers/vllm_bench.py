"""Runs vLLM's own benchmark commands, one after another, in one process of vLLM's environment.

Each is given to vLLM's command line as it stands, `vllm bench serve ...`, so what is measured is what that command
measures; only the import, 10 s and more on a busy machine, is paid once and not for each.

Job: `runs`, each with `arguments` (what follows `vllm`), `result` (the JSON file that they make it write) and `label`.
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
    """Run them all; the first that fails ends the job with its message."""
    from vllm.entrypoints.cli.main import main  # type: ignore[import-not-found]

    # Its HTTP client would send even what stays on this machine to a proxy that the environment names.
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
                raise JobError(f"`{command}` ended with {error.code}; this vLLM may know other arguments") from error
        results.append(json.loads(Path(each["result"]).read_text(encoding="utf-8")))
    report(len(job["runs"]), len(job["runs"]), "done")
    return {"results": results}


if __name__ == "__main__":
    worker_main(run)
