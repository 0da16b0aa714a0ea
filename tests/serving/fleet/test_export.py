from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import sections
import yaml

from quantline.config.fleet import EndpointConfig
from quantline.core.errors import UserError
from quantline.serving.command import ServerOptions
from quantline.serving.fleet import export
from quantline.serving.fleet.servers import Start
from quantline.serving.fleet.spec import Fleet, Key, Variant
from quantline.toolchains.router import envoy

KEYS = (Key(client="team", key="sk-secret-1"),)
FLEET = Fleet(
    folder="/srv/prod", variants=(Variant(name="awq-w4", port=9001), Variant(name="float", port=9002)),
    precisions={"low": ("awq-w4", "float")}, endpoint=EndpointConfig(port=8080), keys_file="/srv/keys.yaml",
)  # fmt: skip


def starts(device="cuda"):
    return [
        Start(
            names=(variant.name, "low"), python="python", folder=f"/models/{variant.name}", log="", queued_requests=4,
            server=ServerOptions(
                sections.server(tensor_parallel_size=2).process, device=device,
                environment={"CUDA_VISIBLE_DEVICES": "0,1"} if device == "cuda" else {},
            ),
        )
        for variant in FLEET.variants
    ]  # fmt: skip


def tool(name):
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def test_systemd_takes_the_unit(tmp_path):
    overrides = [
        "fleet.precisions.low=[awq-w4,float]",
        "fleet.keys_file=/srv/my keys.yaml",
        "fleet.name=100%",
        'a="b\\c"',
    ]
    text = export.systemd(tmp_path, Path("/bin/true"), overrides, "prod")
    unit = tmp_path / "quantline-fleet-prod.service"
    unit.write_text(text)
    assert '"fleet.keys_file=/srv/my keys.yaml" fleet.name=100%% "a=\\"b\\\\c\\""' in text
    done = subprocess.run(
        [tool("systemd-analyze"), "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    assert unit.name not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr


@pytest.mark.toolchain("router")
def test_envoy_takes_the_documents_for_containers(root, tmp_path):
    texts = export.documents(FLEET, KEYS)
    boot = json.loads(texts["envoy.json"])
    assert "/dev/stdout" in texts["envoy.json"]
    assert boot["admin"]["address"]["socket_address"]["address"] == "127.0.0.1"
    clusters = json.loads(texts["clusters.json"])["resources"]
    assert [cluster["type"] for cluster in clusters if "type" in cluster] == ["STRICT_DNS", "STRICT_DNS"]
    from quantline.serving.fleet.envoy import Documents

    made = Documents(boot, json.loads(texts["clusters.json"]), json.loads(texts["routes.json"]))
    envoy(root).validate(made.whole, tmp_path / "checked.json")


def test_a_compose_file_has_what_its_schema_asks_for():
    found = export.compose(FLEET, starts(), Path("/srv/prod/export"))
    assert yaml.safe_load(export.as_yaml([found])) == found
    assert set(found["services"]) == {"variant-awq-w4", "variant-float", "router"}
    server = found["services"]["variant-awq-w4"]
    assert set(server) <= {"image", "command", "restart", "ipc", "volumes", "environment", "healthcheck", "deploy"}
    assert server["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] == ["0", "1"]
    assert "ports" not in server  # no server can be reached from outside
    command = server["command"]
    assert command[0] == "/model"
    assert command[command.index("--served-model-name") + 1 :][:2] == ["awq-w4", "low"]
    router = found["services"]["router"]
    assert router["user"] == f"{os.getuid()}:{os.getgid()}"  # whose documents they are
    assert router["ports"] == ["127.0.0.1:8080:8080"]
    assert set(router["depends_on"]) == {"variant-awq-w4", "variant-float"}
    assert "deploy" not in export.compose(FLEET, starts("cpu"), Path("/x"))["services"]["variant-float"]


def test_variants_that_would_be_one_service_are_refused():
    export.refuse_alike(FLEET)
    twice = tuple(Variant(name=name, port=9001) for name in ("awq-w4.g128", "awq-w4-g128", "float"))
    fleet = FLEET.model_copy(update={"variants": twice})
    said = r"awq-w4\.g128 and awq-w4-g128 would both be the service variant-awq-w4-g128: rename one"
    with pytest.raises(UserError, match=said):
        export.refuse_alike(fleet)


def test_kubectl_takes_the_manifests_and_keys_are_in_a_secret(tmp_path):
    found = export.kubernetes(FLEET, starts(), KEYS)
    kinds = [one["kind"] for one in found]
    assert kinds == ["Secret", "Deployment", "Service", "Deployment", "Service", "Deployment", "Service"]
    assert [one["kind"] for one in found if "sk-secret-1" in json.dumps(one)] == ["Secret"]
    names = {(one["kind"], one["metadata"]["name"]) for one in found}
    assert len(names) == len(found)
    for one in found:
        if one["kind"] == "Deployment":
            pod = one["spec"]["template"]
            assert pod["metadata"]["labels"] == one["spec"]["selector"]["matchLabels"]
            mounts = {mount["name"] for mount in pod["spec"]["containers"][0]["volumeMounts"]}
            assert mounts == {volume["name"] for volume in pod["spec"]["volumes"]}
    (tmp_path / "fleet.yaml").write_text(export.as_yaml(found))
    (tmp_path / "kustomization.yaml").write_text("resources: [fleet.yaml]\n")
    done = subprocess.run([tool("kubectl"), "kustomize", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list(yaml.safe_load_all(done.stdout))) == len(found)
