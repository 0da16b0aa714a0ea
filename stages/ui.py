"""Open the MLflow UI on loopback, at the comparison of the variants: `python -m stages.ui [port]`."""

from __future__ import annotations

import os
import sys

from stages import ROOT


def ui(given: str) -> None:
    from quantline.core.errors import QuantlineError
    from quantline.core.secrets import Scrubber
    from quantline.lifecycle.tracking.store import experiment_name, resolve_uri
    from quantline.lifecycle.tracking.writer import comparison_path
    from quantline.pipeline.config import parse
    from quantline.pipeline.records import pipeline_records
    from quantline.serving.ports import require_free

    if not given.isdecimal() or not 0 < int(given) < 65536:
        sys.exit(f"error: {given}: is no port; give a number from 1 to 65535")
    try:
        records = pipeline_records(ROOT)
        config = parse(records[0].config) if records else None
        uri = resolve_uri(config.tracking.uri if config else None, ROOT)
        if not uri.startswith("sqlite:"):
            sys.exit(f"the variants are published to {Scrubber(uri)(uri)}, a server with a UI of its own: open that")
        require_free("127.0.0.1", int(given))
        path = comparison_path(uri, experiment_name(config.tracking, config.model)) if config else "/"
    except QuantlineError as error:
        sys.exit(f"error: {error}")
    # MLflow would start half a dozen job runners beside the UI.
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    print(f"MLflow on http://127.0.0.1:{given}/#{path} (stop it with Ctrl-C)", file=sys.stderr, flush=True)
    arguments = ["ui", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", given, "--workers", "1"]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", *arguments])  # noqa: S606 (no shell wanted)


if __name__ == "__main__":
    ui(sys.argv[1] if len(sys.argv) > 1 else "5000")
