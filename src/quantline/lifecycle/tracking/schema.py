"""What a registered version takes and gives, as MLflow's registry shows it: the file `MLmodel` beside its files."""

from __future__ import annotations

import json

import yaml

FILE = "MLmodel"
# Of OpenAI's completions API, which vLLM serves; its chat API takes messages in the place of the prompt.
_INPUTS = (("prompt", "string", True), ("max_tokens", "long", False), ("temperature", "double", False))
_OUTPUTS = (("text", "string", True), ("finish_reason", "string", True))


def mlmodel(variant: str, run_id: str, line: str | None) -> str:
    """The content of `MLmodel`, YAML: the schema of a request and its answer, and how it is served.

    line: that of a shell that serves the folder of the version's files; None if it was not served.
    """
    served = {
        "server": "vllm" if (line or "").startswith("vllm") else "llama.cpp",
        "api": "OpenAI: /v1/completions, /v1/chat/completions",
        "serve": line,
    }
    return yaml.safe_dump({
        "artifact_path": "model", "run_id": run_id,
        "flavors": {"quantline": {"variant": variant, **(served if line else {})}},
        "signature": {"inputs": _columns(_INPUTS), "outputs": _columns(_OUTPUTS), "params": None},
    }, sort_keys=False)  # fmt: skip


def about(model: str) -> str:
    """The description of a registered model, Markdown: how to fetch, serve and ask a version of it."""
    return (
        "Quantized variants, promoted by Quantline.\n\n"
        f"- **Fetch** one, verified: `python -m stages.fetch model={model} alias=production out=DIR`\n"
        f"- **Serve** one: `python -m stages.serve model={model} alias=production`\n"
        "- **Ask** it as OpenAI's API: `/v1/completions` with a `prompt`, or `/v1/chat/completions` with `messages`"
    )


def _columns(known: tuple[tuple[str, str, bool], ...]) -> str:
    return json.dumps([{"type": kind, "name": name, "required": required} for name, kind, required in known])
