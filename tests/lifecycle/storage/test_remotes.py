"""DVC remotes on loopback: a folder, a real S3 API, a real SSH server; the second clone has a cache of its own."""

from __future__ import annotations

import asyncio
import shutil
import threading

import pytest

from quantline.lifecycle.storage.dvc_cache import all_objects
from quantline.lifecycle.verify import verify

SECRETS = {"AWS_ACCESS_KEY_ID": "planted-key-id", "AWS_SECRET_ACCESS_KEY": "planted-secret-key"}


def push(project, **variables):
    """What `make push` does."""
    return project.dvc("push", "--run-cache", **variables)


def pulled(project, tmp_path, **variables):
    """A clone on another machine, after `make pull`."""
    clone = project.clone(tmp_path / "clone")
    assert not list(all_objects(clone.cache))
    clone.dvc("pull", "--run-cache", **variables)
    assert clone.content() == project.content()
    assert verify(clone.root, clone.cache).faults == ()
    return clone


def assert_nothing_to_do(clone):
    said = clone.dvc("repro")
    assert "Running stage" not in said
    assert "up to date" in said


def commit(project):
    project.git("commit", "-q", "-a", "-m", "remote")


def test_a_folder_as_remote(project, tmp_path):
    project.dvc("remote", "add", "-q", "--default", "storage", str(tmp_path / "storage"))
    commit(project)
    push(project)
    assert_nothing_to_do(pulled(project, tmp_path))


@pytest.fixture
def bucket():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    yield f"http://127.0.0.1:{port}"
    server.stop()


def test_s3_as_remote_and_its_keys_are_in_no_file(project, tmp_path, bucket):
    import boto3

    options = {"endpoint_url": bucket, "region_name": "us-east-1"}
    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "y"}
    boto3.client("s3", **options, **keys).create_bucket(Bucket="quantline")
    project.dvc("remote", "add", "-q", "--default", "storage", "s3://quantline/dvc")
    project.dvc("remote", "modify", "storage", "endpointurl", bucket)
    commit(project)
    push(project, **SECRETS)
    clone = pulled(project, tmp_path, **SECRETS)
    assert_nothing_to_do(clone)
    # Without dvc.lock the runs of the past are known all the same, by what went into them.
    (clone.root / "dvc.lock").unlink()
    shutil.rmtree(clone.root / "artifacts")
    said = clone.dvc("repro", "--pull", **SECRETS)
    assert "Running stage" not in said
    assert said.count("is cached") == 2
    assert clone.content() == project.content()
    kept = [path.read_bytes() for folder in (project.root, clone.root) for path in folder.rglob("*") if path.is_file()]
    assert not any(secret.encode() in text for text in kept for secret in SECRETS.values())


@pytest.fixture
def ssh_server(tmp_path):
    """A server that lets one key in; gives its port, the key's file, and a home in which the server is known."""
    import asyncssh

    folder = tmp_path / ".ssh"
    folder.mkdir()
    host, user = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
    user.write_private_key(str(folder / "user"))
    (folder / "user").chmod(0o600)
    user.write_public_key(str(folder / "authorized"))
    loop, ready, ports = asyncio.new_event_loop(), threading.Event(), []

    async def serve():
        server = await asyncssh.listen(
            "127.0.0.1",
            0,
            server_host_keys=[host],
            authorized_client_keys=str(folder / "authorized"),
            sftp_factory=True,
        )
        ports.append(server.get_port())
        ready.set()

    def run():
        asyncio.set_event_loop(loop)
        loop.run_until_complete(serve())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(30)
    known = f"[127.0.0.1]:{ports[0]} {host.export_public_key().decode()}"
    (folder / "known_hosts").write_text(known)
    yield ports[0], folder / "user", tmp_path
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


def test_ssh_as_remote_with_a_key(project, tmp_path, ssh_server):
    port, key, home = ssh_server
    (tmp_path / "storage").mkdir()
    project.dvc("remote", "add", "-q", "--default", "storage", f"ssh://tester@127.0.0.1:{port}{tmp_path}/storage")
    project.dvc("remote", "modify", "storage", "keyfile", str(key))
    commit(project)
    push(project, HOME=str(home))
    assert list((tmp_path / "storage" / "files" / "md5").glob("??/*"))
    assert_nothing_to_do(pulled(project, tmp_path, HOME=str(home)))


def test_a_remote_without_an_object_names_it(project, tmp_path):
    storage = tmp_path / "storage"
    project.dvc("remote", "add", "-q", "--default", "storage", str(storage))
    commit(project)
    push(project)
    lost = max(storage.glob("files/md5/??/*"), key=lambda path: path.stat().st_size)
    lost.unlink()
    clone = project.clone(tmp_path / "clone")
    said = clone.dvc("pull", "--run-cache", code=1)
    assert lost.parent.name + lost.name in said
