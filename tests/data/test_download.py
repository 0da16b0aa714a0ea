from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import socket
import traceback
from pathlib import Path

import numpy as np
import pytest
import sections
from hub_server import COMMIT, Hub, serving
from safetensors.numpy import load_file
from tiny_model import write_config, write_model

from quantline.checkpoints.checkpoint import Checkpoint, write_safetensors
from quantline.core.errors import UserError
from quantline.data import hub
from quantline.data.download import check_contents, fetch, model_name, spoken_name

REPO = "owner/tiny"
TOKEN = "hf_secretSECRETsecret"  # planted, to be found nowhere


def pinned(**changes):
    return sections.model(**{"repo": REPO, "revision": COMMIT, **changes})


def local(path, **changes):
    return sections.model(path=str(path), **changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def nothing_left(out: Path) -> bool:
    return not [path for path in out.parent.iterdir() if path.name.startswith(out.name)]


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "source", shards=2)


@pytest.fixture
def served(model, tmp_path, monkeypatch):
    """A hub with one model, and a cache of this test's own."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    files = contents(model)
    files["modeling_tiny.py"] = b"print('code')\n"
    files["pytorch_model.bin"] = b"pickle" * 200
    files["onnx/model.safetensors"] = b"x" * 600
    files["README.md"] = b"a card\n"
    with serving(Hub({("models", REPO): files})) as state:
        monkeypatch.setenv("HF_ENDPOINT", state.address)
        yield state


@pytest.fixture
def no_waiting(monkeypatch):
    """Retries follow each other at once."""
    monkeypatch.setattr("time.sleep", lambda _: None)


@pytest.fixture
def files(served):
    return served.repos["models", REPO]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "artifacts" / "model"


def test_a_pinned_commit_arrives_as_plain_files_without_code_pickles_and_subfolders(served, model, out):
    report = fetch(pinned(), out)
    assert contents(out) == contents(model)
    assert not any(path.is_symlink() for path in out.iterdir())
    assert (report["revision"], report["weights"], report["architecture"]) == (
        COMMIT,
        "safetensors",
        "Qwen2ForCausalLM",
    )
    assert report["bytes"] == sum(len(content) for content in contents(out).values())
    assert sorted(report["files"]) == sorted(path.name for path in out.iterdir())


@pytest.mark.parametrize(
    "name",
    ["pytorch_model-{}-of-2.safetensors", "model.safetensors-{}-of-2.safetensors", "w [{}]*.safetensors"],
)
def test_the_index_says_which_files_are_the_weights_whatever_they_are_called(served, model, out, tmp_path, name):
    files = served.repos["models", REPO]
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for number, old in enumerate(sorted(set(content["weight_map"].values()))):
        (model / old).rename(model / name.format(number))
        del files[old]
        content["weight_map"] = {
            tensor: name.format(number) if shard == old else shard for tensor, shard in content["weight_map"].items()
        }
    index.write_text(json.dumps(content))
    own = contents(model)
    files.update(own)
    (model / "model-00001-of-00009.safetensors").write_bytes(b"of an earlier version")
    files["model-00001-of-00009.safetensors"] = b"of an earlier version"
    assert fetch(local(model), out)["sha256"] == fetch(pinned(), tmp_path / "hub")["sha256"]
    assert contents(out) == contents(tmp_path / "hub") == own


def test_weights_in_folders_are_fetched_and_lie_beside_their_index_where_every_server_looks(
    served, model, out, tmp_path
):
    files = served.repos["models", REPO]
    before = Checkpoint.open(model)
    tensors = {name: before.tensor(name).tobytes() for name in before.names}
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for number, old in enumerate(sorted(set(content["weight_map"].values()))):
        new = ["weights/sub/1.safetensors", "2.safetensors"][number]
        (model / new).parent.mkdir(parents=True, exist_ok=True)
        (model / old).rename(model / new)
        files[new] = files.pop(old)
        content["weight_map"] = {name: new if file == old else file for name, file in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    files[index.name] = index.read_bytes()
    report = fetch(local(model), out)
    assert report["sha256"] == fetch(pinned(), tmp_path / "hub")["sha256"]
    assert contents(out) == contents(tmp_path / "hub")
    assert report["files"].keys() == {path.name for path in out.iterdir()}
    assert {path.name for path in out.glob("*.safetensors")} == {
        f"model-0000{number}-of-00002.safetensors" for number in (1, 2)
    }
    after = Checkpoint.open(out)
    assert {name: after.tensor(name).tobytes() for name in after.names} == tensors
    assert json.loads((out / index.name).read_text())["metadata"] == content["metadata"]


def test_an_index_that_leaves_its_folder_fetches_nothing(served, files, out):
    files["model.safetensors.index.json"] = json.dumps({"weight_map": {"a": "../../secret"}}).encode()
    with pytest.raises(UserError, match="is no file inside its folder"):
        fetch(pinned(), out)
    assert nothing_left(out)


def test_what_a_tokenizer_or_a_processor_needs_comes_along(served, files, model, out, tmp_path):
    more = {
        "additional_chat_templates/tool_use.jinja": b"{{ messages }}", "preprocessor_config.json": b"{}",
        "sentencepiece.bpe.model": b"pieces",
    }  # fmt: skip
    for name, content in more.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(content)
    own = contents(model)
    files.update(more)
    files["additional_chat_templates/deeper/x.jinja"] = b"of nobody"
    report = fetch(pinned(), out)
    assert contents(out) == own
    assert "additional_chat_templates/tool_use.jinja" in report["files"]
    assert fetch(local(model), tmp_path / "again")["sha256"] == report["sha256"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "LORA"}, r"is a LoRA adapter, not a model: merge it .*merge_and_unload\(\)"),
        ({"peft_type": "IA3"}, r"is an IA3 adapter, not a model: merge it .*merge_and_unload\(\)"),
        ({"peft_type": "LOHA"}, r"is an adapter \(LOHA\), not a model: merge it"),
        (
            {"peft_type": "PROMPT_TUNING"},
            r"is an adapter \(PROMPT_TUNING\), not a model, and cannot be merged .* its base",
        ),
        ({}, "is an adapter, not a model: merge it"),
    ],
)
def test_an_adapter_is_called_what_it_is_and_the_merge_is_named(served, model, out, config, words):
    files = served.repos["models", REPO]
    for name in [name for name in files if "safetensors" in name or name.endswith(".bin")]:
        del files[name]
    files["adapter_model.safetensors"], files["adapter_config.json"] = b"x", json.dumps(config).encode()
    for path in model.glob("*.safetensors*"):
        path.unlink()
    (model / "adapter_model.safetensors").write_bytes(b"x")
    (model / "adapter_config.json").write_text(json.dumps(config))
    for source in (pinned(), local(model)):
        with pytest.raises(UserError, match=words):
            fetch(source, out)
    assert nothing_left(out)


def test_a_second_fetch_transfers_nothing(served, out):
    first = fetch(pinned(), out)
    asked = len(served.requests)
    again = fetch(pinned(), out)
    assert again["sha256"] == first["sha256"]
    assert not [request for request in served.requests[asked:] if request[0] == "GET" and "/resolve/" in request[1]]


def test_the_cache_serves_where_the_hub_is_out_of_reach(served, out, monkeypatch, no_waiting):
    first = fetch(pinned(), out)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert fetch(pinned(), out)["sha256"] == first["sha256"]


def test_hub_and_folder_give_the_same_hash(served, model, out, tmp_path):
    assert fetch(pinned(), out)["sha256"] == fetch(local(model), tmp_path / "other")["sha256"]


def test_a_transfer_that_breaks_off_goes_on_at_its_byte(served, model, out, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100)  # what is kept comes in whole chunks
    shard = "model-00001-of-00002.safetensors"
    served.broken_once[shard] = 1000
    fetch(pinned(), out)
    assert served.gets(shard) == [None, "bytes=1000-"]
    assert contents(out) == contents(model)


def test_an_interrupted_run_keeps_the_files_that_it_had(served, out, no_waiting):
    shard = "model-00002-of-00002.safetensors"
    served.broken[shard] = 100
    with pytest.raises(UserError, match=r"owner/tiny.*was interrupted.*run again"):
        fetch(pinned(), out)
    assert nothing_left(out)
    served.broken.clear()
    served.requests.clear()
    fetch(pinned(), out)
    assert served.gets(shard) == [None]
    assert served.gets("model-00001-of-00002.safetensors") == []


def test_large_files_come_by_xet_where_the_hub_has_it_and_are_checked_by_the_same_hash(
    served, files, model, out, tmp_path
):
    """huggingface_hub 2.4 with hf-xet 1.8: they come from Xet storage alone, and damage is found by the hub's hash."""
    served.xet = {name for name in files if name.endswith(".safetensors") and "/" not in name}
    fetch(pinned(), out)
    for name in served.xet:
        assert (out / name).read_bytes() == (model / name).read_bytes()
        assert served.gets(name) == []
    assert len([path for _, path, _ in served.requests if path.startswith("/pack/")]) == len(served.xet) == 2
    shutil.rmtree(tmp_path / "home")
    name = min(served.xet)
    served.corrupt[name] = files[name][:-1] + b"?"
    with pytest.raises(UserError, match="the cached file is damaged"):
        fetch(pinned(), tmp_path / "again")


def test_a_hub_with_xet_serves_without_it_too(served, files, model, out, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    served.xet = {name for name in files if name.endswith(".safetensors") and "/" not in name}
    fetch(pinned(), out)
    assert contents(out).keys() >= served.xet
    assert not [path for _, path, _ in served.requests if "xet-read-token" in path]


def test_a_transfer_by_xet_that_fails_names_host_status_and_the_way_without_it():
    """As hf-xet 1.8 says it, after a few minutes of its own retries."""
    said = (
        "Task error: File reconstruction error: CAS Client Error: Request error: HTTP status client error (403 Forbidden), "
        "domain: https://cas.example/xorb/abcd?signature=secret"
    )
    fact = hub.transport_fact(RuntimeError(said))
    assert fact == "the transfer from Xet storage at https://cas.example failed (403 Forbidden): run again, or set " \
        "HF_HUB_DISABLE_XET=1, which transfers over HTTP"  # fmt: skip
    assert hub.transport_fact(RuntimeError("other")) is None


def test_damaged_content_is_refused_and_fetched_anew_by_the_next_run(served, files, model, out):
    name = "model-00001-of-00002.safetensors"
    served.corrupt[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])
    with pytest.raises(UserError, match=rf"{name}: the cached file is damaged: {len(files[name])} bytes.*run again"):
        fetch(pinned(), out)
    assert nothing_left(out)
    served.corrupt.clear()
    fetch(pinned(), out)
    assert contents(out) == contents(model)


def test_damaged_small_files_are_found_by_gits_hash(served, files, out):
    served.corrupt["LICENSE"] = b"free to lose\n"[: len(files["LICENSE"])]
    with pytest.raises(UserError, match="LICENSE: the cached file is damaged"):
        fetch(pinned(), out)


@pytest.mark.parametrize("revision", ["main", None, COMMIT[:8], COMMIT.upper()])
def test_a_revision_that_can_move_is_refused(served, out, revision):
    with pytest.raises(UserError, match=r"model\.revision .*40 hex digits.*set model\.revision"):
        fetch(pinned(revision=revision), out)


def test_the_refusal_of_a_branch_names_the_commit_to_pin(served, out):
    with pytest.raises(UserError, match=f"main is not a commit.*set model.revision={COMMIT}"):
        fetch(pinned(revision="main"), out)


def test_an_unknown_commit_is_named(served, out):
    with pytest.raises(UserError, match=r"no such commit: check model\.revision"):
        fetch(pinned(revision="f" * 40), out)


def test_an_unknown_repository_is_named(served, out):
    with pytest.raises(UserError, match=r"owner/other.*check model\.repo or set HF_TOKEN.*model\.path=DIR"):
        fetch(pinned(repo="owner/other"), out)
    assert nothing_left(out)


def test_a_word_that_is_no_repository_name_is_refused(served, out):
    with pytest.raises(UserError, match="repo as owner/name"):
        fetch(pinned(repo="a/b/c"), out)


def test_a_gated_repository_asks_for_licence_and_token(served, out):
    served.gated = True
    with pytest.raises(UserError, match=r"gated: accept its licence at http.*/owner/tiny and set HF_TOKEN"):
        fetch(pinned(), out)


@pytest.mark.parametrize(("status", "words"), [(403, r"refuses access \(403\)"), (418, "HTTP status 418")])
def test_other_answers_of_the_hub_are_named(served, out, status, words):
    served.status = status
    with pytest.raises(UserError, match=words):
        fetch(pinned(), out)


def test_an_unreachable_hub_names_its_address_and_the_ways_around(served, out, monkeypatch, no_waiting):
    monkeypatch.setenv("HF_ENDPOINT", "http://user:password@127.0.0.1:9")
    with pytest.raises(
        UserError, match=r"http://127\.0\.0\.1:9 cannot be reached.*HF_ENDPOINT.*model\.path=DIR"
    ) as info:
        fetch(pinned(), out)
    assert "password" not in str(info.value)
    assert nothing_left(out)


def test_the_token_is_sent_and_shown_nowhere(served, out, monkeypatch, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    served.token = TOKEN
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    report = fetch(pinned(), out)
    assert f"Bearer {TOKEN}" in served.authorizations
    served.token = "another"
    shutil.rmtree(os.environ["HF_HOME"])
    errors = []
    for source in (pinned(), pinned(repo=f"owner/{TOKEN}"), pinned(repo=f"{TOKEN}/a/b"), pinned(revision=None)):
        with pytest.raises(UserError) as info:
            fetch(source, out.with_name("second"))
        errors.append("".join(traceback.format_exception(info.value)))
    captured = capfd.readouterr()
    seen = [json.dumps(report), captured.out, captured.err, *errors, *map(str, contents(out).values())]
    assert not [text for text in seen if TOKEN in text]
    assert not [record for record in caplog.records if f"Bearer {TOKEN}" in record.getMessage()]


def test_scrub_takes_the_token_out_of_a_text(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert hub.scrub(f"Authorization: Bearer {TOKEN}!") == "Authorization: Bearer ***!"
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "stored-by-login")
    assert hub.scrub("with stored-by-login") == "with ***"


def test_pickled_weights_alone_are_refused_and_the_option_is_named(served, files, out):
    for name in [name for name in files if "safetensors" in name]:
        del files[name]
    with pytest.raises(UserError, match=r"pickled weights only \(pytorch_model\.bin\).*model\.allow_pickle=true"):
        fetch(pinned(), out)
    assert not served.gets("pytorch_model.bin")
    report = fetch(pinned(allow_pickle=True), out)
    assert report["weights"] == "pickle"
    assert (out / "pytorch_model.bin").read_bytes() == files["pytorch_model.bin"]


def test_pickles_of_other_names_are_not_said_to_be_taken(served, files, model, out):
    for name in [name for name in files if "safetensors" in name]:
        del files[name]
    files["consolidated.00.pth"] = files.pop("pytorch_model.bin")
    for path in model.glob("*.safetensors*"):
        path.unlink()
    (model / "consolidated.00.pth").write_bytes(b"pickle")
    for source in (pinned(), local(model), pinned(allow_pickle=True), local(model, allow_pickle=True)):
        with pytest.raises(
            UserError, match=r"only \(consolidated\.00\.pth\), which can run code: save it as safetensors$"
        ):
            fetch(source, out)


def test_what_lies_in_folders_is_fetched_where_the_hub_lists_no_files(served, files, out, monkeypatch):
    def refuse(*_arguments, **_options):
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", refuse)
    files["additional_chat_templates/tool_use.jinja"] = b"{{ messages }}"
    assert "additional_chat_templates/tool_use.jinja" in fetch(pinned(), out)["files"]


def test_allowing_pickles_does_not_fetch_them_beside_safetensors(served, out):
    assert fetch(pinned(allow_pickle=True), out)["weights"] == "safetensors"
    assert not served.gets("pytorch_model.bin")


def test_pickled_weights_of_a_folder_follow_the_same_rule(model, out):
    for path in model.glob("*.safetensors*"):
        path.unlink()
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"allow_pickle=true"):
        fetch(local(model), out)
    assert fetch(local(model, allow_pickle=True), out)["weights"] == "pickle"


def test_code_of_the_repository_is_refused_unless_trusted(model, out):
    write_config(model, auto_map={"AutoModelForCausalLM": "modeling_tiny.Tiny"})
    (model / "modeling_tiny.py").write_text("print('code')\n")
    with pytest.raises(UserError, match=r"modeling_tiny\.Tiny.*model\.trust_remote_code=true"):
        fetch(local(model), out)
    fetch(local(model, trust_remote_code=True), out)
    assert (out / "modeling_tiny.py").is_file()


@pytest.mark.parametrize("source", [sections.model(), sections.model(repo="a/b", revision=COMMIT, path="folder")])
def test_exactly_one_of_repo_and_path_is_needed(source, out):
    with pytest.raises(UserError, match=r"model\.repo.*model\.path"):
        fetch(source, out)


def test_a_folder_that_is_missing_is_named_in_full(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"model\.path=no/such: {tmp_path}/no/such does not exist"):
        fetch(local("no/such"), out)


def test_a_file_in_the_place_of_the_folder_is_refused(out, model):
    with pytest.raises(UserError, match="is a file"):
        fetch(local(model / "config.json"), out)


def test_a_relative_folder_starts_at_the_working_directory(out, model, monkeypatch):
    monkeypatch.chdir(model.parent)
    assert fetch(local("source"), out)["repo"] is None


def test_links_in_a_folder_become_plain_files(out, model, tmp_path):
    real = tmp_path / "elsewhere.json"
    shutil.move(model / "config.json", real)
    (model / "config.json").symlink_to(real)
    fetch(local(model), out)
    assert not (out / "config.json").is_symlink()
    assert (out / "config.json").read_bytes() == real.read_bytes()


def test_the_folder_itself_is_no_place_for_the_copy(model):
    with pytest.raises(UserError, match="give another one"):
        fetch(local(model), model)
    assert (model / "config.json").is_file()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", b"{}", "has no model_type"),
        ("config.json", b'{"model_type": ', "config.json is not valid JSON"),
        ("config.json", b"[]", "is no JSON object"),
        ("tokenizer.json", None, "has no tokenizer"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json is not valid JSON"),
        ("model-00002-of-00002.safetensors", None, "shard model-00002-of-00002.safetensors is missing"),
        ("model.safetensors.index.json", None, "neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_an_incomplete_model_is_refused_and_leaves_the_old_one(model, out, name, change, words):
    first = fetch(local(model), out)
    if change is None:
        (model / name).unlink()
    else:
        (model / name).write_bytes(change)
    with pytest.raises(UserError, match=words) as info:
        fetch(local(model), out)
    assert ".partial-" not in str(info.value)
    assert sorted(contents(out)) == sorted(first["files"])
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_a_truncated_shard_is_refused_with_both_sizes(model, out):
    shard = model / "model-00001-of-00002.safetensors"
    size = shard.stat().st_size
    os.truncate(shard, size - 100)
    with pytest.raises(UserError, match=f"{shard.name}.*{size} bytes, but the file has {size - 100}.*truncated"):
        fetch(local(model), out)


def test_a_full_disk_is_named_and_leaves_nothing(model, out, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(UserError, match="the disk is full"):
        fetch(local(model), out)
    assert nothing_left(out)


def test_a_full_disk_under_the_cache_is_named(served, out, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(UserError, match="the disk is full"):
        fetch(pinned(), out)


def test_an_old_copy_survives_a_kill_between_the_two_renames(model, out):
    fetch(local(model), out)
    left = out.with_name(f".model.partial-{socket.gethostname()}-1")
    left.mkdir()
    os.replace(out, left / ".former")
    (model / "config.json").unlink()
    with pytest.raises(UserError):
        fetch(local(model), out)
    assert (out / "config.json").is_file()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (sections.model(repo="Qwen/Qwen2.5-0.5B-Instruct"), "Qwen2.5-0.5B-Instruct"),
        (sections.model(path="assets/demo/model"), "demo"),
        (sections.model(path="./my models/tiny one/"), "tiny-one"),
        (sections.model(path="model"), "model"),
    ],
)
def test_a_model_is_named_after_its_repository_or_folder(source, name):
    assert model_name(source) == name


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ({"name": "Mine", "repo": "a/b"}, "Mine"),
        ({"name": None, "repo": "meta-llama/Llama-2-7b-hf", "revision": "1"}, "meta-llama/Llama-2-7b-hf"),
        ({"repo": None, "path": "/srv/models/tiny/model"}, "tiny"),
        ({}, "model"),
    ],
)
def test_a_reader_sees_a_name_and_no_path(model, name):
    assert spoken_name(model) == name


def test_the_model_options_name_pinned_sources(root):
    import yaml

    found = {path.stem: yaml.safe_load(path.read_text()) for path in (root / "conf/model").glob("*.yaml")}
    assert {"demo", "custom", "qwen2_5_0_5b", "qwen2_5_3b", "llama2_7b", "opt_125m"} <= set(found)
    for values in found.values():
        assert sorted(values) == ["allow_pickle", "name", "path", "repo", "revision", "trust_remote_code"]
        assert values["repo"] is None or hub.COMMIT.fullmatch(values["revision"])
    assert not any(values["allow_pickle"] or values["trust_remote_code"] for values in found.values())


def test_the_embedded_demo_model_is_a_complete_model(root, out):
    if not (root / "assets/demo/model/config.json").is_file():
        pytest.skip("the demo model is not built yet")
    assert fetch(local(root / "assets/demo/model"), out)["weights"] == "safetensors"


# --- what the files say


@pytest.mark.parametrize("architectures", [["Qwen2Model"], ["Qwen2ForSequenceClassification"]])
def test_a_model_that_is_no_causal_lm_is_refused_by_what_was_given(model, out, architectures):
    write_config(model, architectures=architectures)
    with pytest.raises(UserError, match=rf"^{model}: architectures in config\.json names .* no causal LM"):
        fetch(local(model), out)
    assert nothing_left(out)


def test_a_number_in_quotes_is_refused_by_its_key_and_what_was_given(model, out):
    write_config(model, num_attention_heads="6")
    with pytest.raises(
        UserError, match=rf'^{model}: config\.json has num_attention_heads="6"; it must be a whole number'
    ):
        fetch(local(model), out)
    assert nothing_left(out)


def test_a_tokenizer_that_not_every_stage_reads_is_refused_with_the_command_that_makes_one(model, out):
    (model / "tokenizer.json").rename(model / "tokenizer.model")
    with pytest.raises(UserError, match=rf"{model}: has only SentencePiece's tokenizer\.model .*: uv run .*'{model}'"):
        fetch(local(model), out)
    assert nothing_left(out)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused_by_tensor(model, value):
    check_contents(model)
    path = model / "model-00002-of-00002.safetensors"
    weights = load_file(path)
    name = sorted(weights)[1]
    weights[name][3, 5] = value
    write_safetensors(path, weights)
    with pytest.raises(
        UserError, match=rf"{name} has 1 values that are NaN or infinite: .*damaged, on every device; fetch"
    ):
        check_contents(model)


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3"])
def test_a_weight_that_holds_codes_is_refused_though_nothing_says_that_the_model_is_quantized(model, out, dtype):
    path = model / "model-00002-of-00002.safetensors"
    weights = load_file(path)
    name = sorted(weights)[0]
    weights[name] = np.zeros((64, 64), np.int8)
    write_safetensors(path, weights)
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = path.read_bytes()[8 : 8 + size].replace(b'"I8"', f'"{dtype}"'.encode())
    path.write_bytes(len(header).to_bytes(8, "little") + header + path.read_bytes()[8 + size :])
    with pytest.raises(UserError, match=rf"^{model}: {name} has dtype {dtype}, and a float model has BF16"):
        fetch(local(model), out)
    assert nothing_left(out)
