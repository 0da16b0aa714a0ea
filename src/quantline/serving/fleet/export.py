"""A fleet for those who keep it running: a unit of systemd, a compose file, or plain manifests for Kubernetes.

systemd runs `stages.fleet up` itself, with gauge, restarts and canary commands. The other two run the servers and the router
in containers, without the gauge: the router asks the servers themselves, and a canary is changed by writing the files again.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from quantline.core.errors import UserError
from quantline.serving import llamacpp
from quantline.serving.command import flags_of
from quantline.serving.fleet import envoy as router
from quantline.serving.fleet.servers import Start
from quantline.serving.fleet.spec import Fleet, Key

FORMS = ("systemd", "compose", "kubernetes")
# The versions that this project's locks have; their images are built by the projects themselves.
VLLM_IMAGE, ENVOY_IMAGE = "vllm/vllm-openai:v0.32.0", "envoyproxy/envoy:v1.40.0"
SERVER_PORT, ADMIN_PORT, PLACE, MODEL = 8000, 9901, "/etc/fleet", "/model"


def systemd(root: Path, python: Path, overrides: Sequence[str], name: str) -> str:
    """A unit of systemd. root: the checkout, which it runs in; python: of its environment."""
    command = [str(python), "-m", "stages.fleet", "up", *overrides]
    # systemd reads % and $ itself, and knows quotes and backslashes of C.
    line = " ".join(_quoted(part) if shlex.quote(part) != part else part for part in command)
    line = line.replace("%", "%%").replace("$", "$$")
    return f"""[Unit]
Description=Quantline fleet {name}
After=network.target
StartLimitIntervalSec=600
StartLimitBurst=5

[Service]
Type=exec
WorkingDirectory={root}
ExecStart={line}
# Ctrl-C: what has begun is answered, then every process is ended.
KillSignal=SIGINT
KillMode=mixed
TimeoutStopSec=120
Restart=on-failure
RestartSec=10
NoNewPrivileges=true
PrivateTmp=true
ProtectSystem=full
UMask=0077

[Install]
WantedBy=default.target
"""


def _quoted(part: str) -> str:
    escaped = part.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _elsewhere(fleet: Fleet) -> Fleet:
    """The fleet as a router in a container sees it: servers by name, files in `PLACE`, no gauge."""
    variants = [one.model_copy(update={"host": service_name(one.name), "port": SERVER_PORT}) for one in fleet.variants]
    end = fleet.endpoint.model_copy(update={"host": "0.0.0.0", "certificate": None, "private_key": None})  # noqa: S104
    keys = f"{PLACE}/keys.yaml" if fleet.keys_file else None
    changes = {"variants": tuple(variants), "endpoint": end, "folder": PLACE, "gauge_port": None, "keys_file": keys}
    return fleet.model_copy(update={**changes, "admin_port": ADMIN_PORT, "capture_share": 0.0})


def service_name(variant: str) -> str:
    """A variant's name as a host: letters, digits and dashes."""
    return "variant-" + "".join(sign if sign.isalnum() else "-" for sign in variant.lower()).strip("-")


def refuse_alike(fleet: Fleet) -> None:
    """Refuse variants whose names differ only in case or in signs that a host's name cannot have.

    Raises:
        UserError: two of them would be one service.
    """
    names: dict[str, list[str]] = {}
    for variant in fleet.variants:
        names.setdefault(service_name(variant.name), []).append(variant.name)
    if alike := [
        f"{' and '.join(own)} would both be the service {name}" for name, own in names.items() if len(own) > 1
    ]:
        raise UserError(f"{'; '.join(alike)}: rename one of them in params.yaml, or take form=systemd")


def refuse_llamacpp(fleet: Fleet, form: str) -> None:
    """Refuse variants that llama.cpp serves: their server is in no image that was tried.

    Raises:
        UserError: there is one.
    """
    if names := [variant.name for variant in fleet.variants if variant.runtime == llamacpp.NAME]:
        raise UserError(
            f"form={form}: {', '.join(names)} is served by llama.cpp, and only servers of vLLM are written for containers; "
            "leave it out, or take form=systemd"
        )


def documents(fleet: Fleet, keys: Sequence[Key]) -> dict[str, str]:
    """The router's files by name. Its logs go to the container's output."""
    made = router.documents(_elsewhere(fleet), keys)
    texts = {router.BOOT: made.boot, router.CLUSTERS: made.clusters, router.ROUTES: made.routes}
    found = {name: json.dumps(value, indent=1) for name, value in texts.items()}
    for log in (router.ACCESS_LOG, router.ATTEMPTS_LOG):
        found[router.BOOT] = found[router.BOOT].replace(f'"{PLACE}/{log}"', '"/dev/stdout"')
    return found


def arguments(start: Start) -> list[str]:
    """What follows `vllm serve` in a container."""
    flags = list(flags_of(start.options()))
    return [MODEL, "--host", "0.0.0.0", "--port", str(SERVER_PORT), *flags]  # noqa: S104


def compose(fleet: Fleet, starts: Sequence[Start], folder: Path) -> dict[str, Any]:
    """A compose file. folder: of the router's documents, beside it. The endpoint is published on the fleet's own address."""
    services: dict[str, Any] = {}
    for start in starts:
        services[service_name(start.names[0])] = {
            "image": VLLM_IMAGE, "command": arguments(start), "restart": "unless-stopped", "ipc": "host",
            "volumes": [f"{start.folder}:{MODEL}:ro"], "environment": {**_server_environment(), **start.server.environment},
            "healthcheck": {
                "test": ["CMD", "curl", "-sf", f"http://127.0.0.1:{SERVER_PORT}/health"], "interval": "10s",
                "timeout": "5s", "retries": 3, "start_period": "600s",
            },
            **_compose_gpus(start),
        }  # fmt: skip
    port = fleet.endpoint.port
    services["router"] = {
        "user": f"{os.getuid()}:{os.getgid()}",  # who alone may read the documents, since keys may be in them
        "image": ENVOY_IMAGE, "restart": "unless-stopped",
        "command": ["envoy", "-c", f"{PLACE}/{router.BOOT}", "--concurrency", "1", "-l", "warning"],
        "volumes": [f"{folder}:{PLACE}:ro"], "ports": [f"{fleet.endpoint.host}:{port}:{port}"],
        "depends_on": {name: {"condition": "service_started"} for name in services},
    }  # fmt: skip
    return {"name": f"quantline-{Path(fleet.folder).name}", "services": services}


def _compose_gpus(start: Start) -> Mapping[str, Any]:
    if start.server.device != "cuda":
        return {}
    ids = start.server.environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")
    device = {"driver": "nvidia", "device_ids": ids, "capabilities": ["gpu"]}
    return {"deploy": {"resources": {"reservations": {"devices": [device]}}}}


def _server_environment() -> dict[str, str]:
    return {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}


def kubernetes(fleet: Fleet, starts: Sequence[Start], keys: Sequence[Key]) -> list[dict[str, Any]]:
    """Manifests: the router's documents as a Secret, since keys may be in them, and a Deployment and Service for each part.

    The checkpoints are claims of the variants' names; how they get there is the cluster's business.
    """
    name = f"quantline-{Path(fleet.folder).name.replace('_', '-')}"
    found: list[dict[str, Any]] = [{
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": f"{name}-router"},
        "stringData": documents(fleet, keys),
    }]  # fmt: skip
    for start in starts:
        own = service_name(start.names[0])
        environment = [{"name": key, "value": value} for key, value in _server_environment().items()]
        gpus = {"resources": {"limits": {"nvidia.com/gpu": start.server.process.tensor_parallel_size}}}
        container: dict[str, Any] = {
            "name": "vllm", "image": VLLM_IMAGE, "args": arguments(start), "env": environment,
            "ports": [{"containerPort": SERVER_PORT}],
            "volumeMounts": [{"name": "model", "mountPath": MODEL, "readOnly": True}],
            "startupProbe": {**_probe("/health", SERVER_PORT), "failureThreshold": 120},
            "livenessProbe": {**_probe("/health", SERVER_PORT), "failureThreshold": 6},
            **(gpus if start.server.device == "cuda" else {}),
        }  # fmt: skip
        volume = {"name": "model", "persistentVolumeClaim": {"claimName": own, "readOnly": True}}
        found += [_deployment(own, container, volume), _service(own, SERVER_PORT)]
    port = fleet.endpoint.port
    envoy = {
        "name": "envoy", "image": ENVOY_IMAGE,
        "command": ["envoy", "-c", f"{PLACE}/{router.BOOT}", "--concurrency", "1", "-l", "warning"],
        "ports": [{"containerPort": port}], "readinessProbe": _probe("/health", port),
        "volumeMounts": [{"name": "documents", "mountPath": PLACE, "readOnly": True}],
    }  # fmt: skip
    volume = {"name": "documents", "secret": {"secretName": f"{name}-router"}}
    return [*found, _deployment(name, envoy, volume), _service(name, port)]


def _probe(path: str, port: int) -> dict[str, Any]:
    return {"httpGet": {"path": path, "port": port}, "periodSeconds": 10, "timeoutSeconds": 5}


def _deployment(name: str, container: Mapping[str, Any], volume: Mapping[str, Any]) -> dict[str, Any]:
    labels = {"app": name}
    pod = {"containers": [dict(container)], "volumes": [dict(volume)]}
    return {
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name, "labels": labels},
        "spec": {
            "replicas": 1, "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }  # fmt: skip


def _service(name: str, port: int) -> dict[str, Any]:
    return {
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
        "spec": {"selector": {"app": name}, "ports": [{"port": port, "targetPort": port}]},
    }  # fmt: skip


def as_yaml(documents_: Sequence[Mapping[str, Any]]) -> str:
    """One or several documents as YAML."""
    return yaml.safe_dump_all([dict(one) for one in documents_], sort_keys=False, width=120)
