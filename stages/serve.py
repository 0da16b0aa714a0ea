"""Serve a variant with vLLM until Ctrl-C, by the options that serve_smoke proved.

It answers at http://127.0.0.1:8000/v1, as OpenAI's API does. A folder is served as it is, with the options of conf/serve.

Examples:
    python -m stages.serve variant=awq-w4-g128
    python -m stages.serve alias=production port=8001
    python -m stages.serve models/production serve.process.max_num_seqs=8
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from quantline.pipeline.command_line import Option
from stages import ROOT, main

OPTIONS = [
    Option("folder", "DIR", "the folder of any checkpoint; `folder=` may be left out", bare=True),
    Option("variant", "NAME", "a variant of params.yaml, float for the float model, or by-hand/NAME for a manual run"),
    Option("alias", "production", "a promoted variant, fetched and verified"),
    Option("model", "NAME", "the registered model, where several have the alias"),
    Option("port", "8000", "to listen on; 0 takes a free one"),
]

if TYPE_CHECKING:
    from omegaconf import DictConfig


def serve(cfg: DictConfig, arguments: dict[str, str | None]) -> None:
    import logging

    from hydra.core.hydra_config import HydraConfig

    from quantline.lifecycle import serve as serving
    from quantline.pipeline.hydra_values import plain
    from quantline.pipeline.run import StageRun
    from quantline.pipeline.server import server_of
    from quantline.serving import server as vllm_server
    from quantline.serving.command import served_line, title_of

    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs a line for each request
    typed = serving.Typed(plain(cfg), HydraConfig.get().overrides.task)
    subject = serving.subject_of(ROOT, arguments, typed)
    run = StageRun("serve", subject.config, ROOT, tuple(typed.overrides))
    port, vllm = serving.port_of(arguments["port"], subject.config), server_of(run, subject.folder)
    options, note = serving.options_for(subject, vllm.version, run.device, port)
    if note:
        print(f"  note: {note}", file=sys.stderr)
    log = ROOT / serving.HOME / f"{subject.name.replace('/', '-')}-{port}.log"
    say(
        f"{subject.name} from {subject.folder}, by {title_of(options.runtime)} {vllm.version} on {run.device}; log: {log}"
    )
    with vllm_server.serve(vllm.python, subject.folder, options, log=log) as server:
        say(f"ready: {server.url}/v1 model {subject.name}, {server.max_model_len} tokens of prompt and answer")
        say(f"  ask it: {serving.curl_line(server.url, subject)}")
        say(f"  the same elsewhere: {served_line(str(subject.folder), options)}")
        say("  Ctrl-C ends it")
        try:
            server.process.wait()
        except KeyboardInterrupt:
            say("ending")
        else:
            server.require_alive("serving")
    say("ended, no process is left")


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main(serve, __file__, OPTIONS, __doc__, reads=("serve", "device", "toolchains", "tracking"))
