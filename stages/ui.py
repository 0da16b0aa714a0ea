"""Start the MLflow UI on loopback and print the address of the variants' comparison.

Examples:
    python -m stages.ui
    python -m stages.ui 5001
"""

from __future__ import annotations

import os
import sys

from quantline.pipeline.command_line import Option
from stages import ROOT, command

OPTIONS = [Option("port", "5000", "a free port; `port=` is optional", default="5000", bare=True)]


def ui(arguments: dict[str, str | None]) -> None:
    from quantline.core.errors import UserError
    from quantline.core.secrets import Scrubber
    from quantline.lifecycle.tracking.store import experiment_name, resolve_uri
    from quantline.lifecycle.tracking.writer import comparison_path
    from quantline.pipeline.config import parse
    from quantline.pipeline.records import pipeline_records
    from quantline.serving.ports import require_free

    port = str(arguments["port"])
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"{port}: is not a port; give a number from 1 to 65535")
    records = pipeline_records(ROOT)
    config = parse(records[0].config) if records else None
    uri = resolve_uri(config.tracking.uri if config else None, ROOT)
    if not uri.startswith("sqlite:"):
        raise UserError(
            f"the variants are published to {Scrubber(uri)(uri)}, a server with its own UI; open that address"
        )
    require_free("127.0.0.1", int(port), "give port=NUMBER")
    path = comparison_path(uri, experiment_name(config.tracking, config.model)) if config else "/"
    # Otherwise MLflow starts several job runners beside the UI.
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    print(f"MLflow on http://127.0.0.1:{port}/#{path} (stop it with Ctrl-C)", file=sys.stderr, flush=True)
    ui_arguments = ["ui", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", port, "--workers", "1"]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", *ui_arguments])  # noqa: S606 (no shell wanted)


if __name__ == "__main__":
    command(ui, OPTIONS, __doc__)
