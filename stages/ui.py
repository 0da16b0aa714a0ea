"""Open the MLflow UI on loopback, at the comparison of the variants: `python -m stages.ui [port]`."""

from __future__ import annotations

import os
import sys

from stages import ROOT


def ui(port: str) -> None:
    from quantline.tracking_store import resolve_uri

    # MLflow would start half a dozen job runners beside the UI.
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    uri = resolve_uri(None, ROOT)
    if not uri.startswith("sqlite:"):
        sys.exit("MLFLOW_TRACKING_URI names a tracking server of its own: open that one")
    print(f"MLflow on http://127.0.0.1:{port} (stop it with Ctrl-C)", file=sys.stderr, flush=True)
    arguments = ["ui", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", port, "--workers", "1"]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", *arguments])  # noqa: S606 (no shell wanted)


if __name__ == "__main__":
    ui(sys.argv[1] if len(sys.argv) > 1 else "5000")
