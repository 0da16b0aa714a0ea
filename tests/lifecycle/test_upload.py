"""Uploads to a hub on this machine, by git LFS over HTTP."""

from __future__ import annotations

import logging
import shutil
import traceback
from dataclasses import replace

import pytest
from hub_server import LARGE, Hub, serving
from variant_records import record

from quantline.core.errors import GateError, UserError
from quantline.lifecycle.upload import UploadError, check_gates, check_repo, upload, upload_of
from quantline.pipeline.identity import combined, file_hashes

REPO = "me/tiny-gptq-w4"
TOKEN = "hf_secretSECRETsecret"  # planted, to be found nowhere
CARD = "---\nlicense: apache-2.0\n---\n# tiny\n"
WEIGHTS = "model.safetensors"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub that knows the token, and waits for nothing."""
    for name in ("HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("time.sleep", lambda _: None)
    with serving(Hub(token=TOKEN)) as state:
        monkeypatch.setenv("HF_ENDPOINT", state.address)
        yield state


@pytest.fixture
def model(tmp_path):
    """A variant with its converted model."""
    folder = tmp_path / "convert"
    (folder / "additional_chat_templates").mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(bytes(range(256)) * 40)
    (folder / "config.json").write_text("{}")
    (folder / "conversion_proof.json").write_text('{"linears": {}}' + " " * LARGE)
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    made = record("gptq-w4", "gptq", 4, 0.01, tmp_path / "work")
    hashes = file_hashes(folder)
    results = [
        {**result, **({"outputs": hashes, "output_hash": combined(hashes)} if result["stage"] == "convert" else {})}
        for result in made.results
    ]
    return upload_of(replace(made, results=results, outputs={"convert": folder}), REPO, CARD, "run123")


def held(hub):
    return hub.repos["models", REPO]


def test_a_new_repository_is_private_and_has_the_model_its_card_and_nothing_else_in_one_commit(hub, model):
    done = upload(model)
    assert (done.created, done.private, done.files, done.commit) == (True, True, 5, hub.head)
    assert done.url == f"{hub.address}/{REPO}"
    assert hub.private == {REPO}
    expected = {name: (model.folder / name).read_bytes() for name in model.files}
    assert held(hub) == {**expected, "README.md": CARD.encode(), ".gitattributes": held(hub)[".gitattributes"]}
    (commit,) = hub.commits
    assert commit["summary"] == "Quantline variant gptq-w4, MLflow run run123"
    assert combined(model.files) in commit["description"]
    assert set(hub.authorizations) == {f"Bearer {TOKEN}", None}  # None: to the address of the storage


def test_it_is_public_where_that_was_asked_for(hub, model):
    assert not upload(model, public=True).private
    assert hub.private == set()


def test_a_file_beside_the_outputs_of_convert_is_no_part_of_the_model_and_stops_the_upload(hub, model):
    (model.folder / "notes.txt").write_text("mine")
    with pytest.raises(
        UserError, match=r"notes\.txt: differs from the convert stage's output; run: dvc checkout --force .*convert$"
    ):
        upload(model)
    assert hub.requests == []


def test_a_changed_file_of_a_run_by_hand_is_made_again_by_its_stage(tmp_path):
    made = record("gptq-w4", "gptq", 4, 0.01, tmp_path / "work")
    results = [{**result, "output_hash": "h", "outputs": {}} for result in made.results]
    outputs = {"convert": tmp_path / "convert"}
    made = replace(
        made, name="by-hand/gptq-w4", overrides="method=gptq bits=4", outputs=outputs, results=results
    )  # fmt: skip
    assert upload_of(made, REPO, CARD, None).remedy == "python -m stages.convert method=gptq bits=4"


def test_an_upload_that_broke_off_goes_on_with_what_the_hub_does_not_have_and_leaves_no_half_model(hub, model):
    hub.refuses["/commit/"] = 500
    with pytest.raises(UserError, match="answered with HTTP status 500: try again later"):
        upload(model)
    assert list(held(hub)) == [".gitattributes"]
    sent = hub.puts()
    assert len(sent) == 2  # weights and proof
    hub.refuses.clear()
    hub.requests.clear()
    assert upload(model).created is False
    assert hub.puts() == []
    assert held(hub)[WEIGHTS] == (model.folder / WEIGHTS).read_bytes()


def test_the_same_model_again_changes_nothing_and_another_of_ours_takes_its_place(hub, model, tmp_path):
    upload(model)
    upload(model)
    other = tmp_path / "other"
    shutil.copytree(model.folder, other)
    (other / WEIGHTS).write_bytes(b"other" * LARGE)
    upload(replace(model, folder=other, files=file_hashes(other)))
    assert held(hub)[WEIGHTS] == b"other" * LARGE
    assert hub.private == {REPO}


def test_files_that_the_model_does_not_have_are_removed_only_where_that_was_asked_for(hub, model):
    upload(model)
    held(hub)["model-00002-of-00002.safetensors"] = b"of an older upload"
    with pytest.raises(UserError, match=r"would remove or replace \(model-00002-of-00002\.safetensors\).*replace=true"):
        upload(model)
    upload(model, replace=True)
    assert hub.commits[-1]["deleted"] == ["model-00002-of-00002.safetensors"]
    assert "model-00002-of-00002.safetensors" not in held(hub)


def test_a_repository_of_another_model_is_not_overwritten(hub, model):
    hub.repos["models", REPO] = {WEIGHTS: b"float", "config.json": b"{}", ".gitattributes": b""}
    hub.private.add(REPO)
    with pytest.raises(
        UserError, match=r"exists with files .* \(config\.json, model\.safetensors\): give another repo"
    ):
        upload(model)
    assert held(hub)[WEIGHTS] == b"float"
    upload(model, replace=True)
    assert held(hub)[WEIGHTS] != b"float"


@pytest.mark.parametrize(
    ("private", "public", "said"),
    [
        (False, False, r"exists and is public: give public=true, change that"),
        (True, True, r"exists and is private: leave public out, change that"),
    ],
)
def test_a_repository_of_another_visibility_is_refused(hub, model, private, public, said):
    hub.repos["models", REPO] = {".gitattributes": b""}
    hub.private |= {REPO} if private else set()
    with pytest.raises(UserError, match=said):
        upload(model, public=public)
    assert hub.commits == []


def test_content_that_the_hub_does_not_have_as_it_was_sent_is_told(hub, model):
    hub.spoils.add("config.json")
    with pytest.raises(UploadError, match=r"config\.json of me/tiny-gptq-w4 at commit 0+1 is not what was sent"):
        upload(model)


def test_without_a_token_nothing_is_asked(hub, model, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"no token for the hub: set HF_TOKEN .* or run `hf auth login`"):
        upload(model)
    assert hub.requests == []


def test_the_token_of_the_login_serves_too(hub, model, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(TOKEN)
    assert upload(model).created


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rejects": True}, "the hub does not know the token (401): set HF_TOKEN to a valid one with write access"),
        ({"read_only": True}, "the token may not write there (403): it needs write access to me"),
        ({"refuses": {"/commit/": 412}}, "somebody else changed the repository meanwhile (412)"),
        ({"status": 503}, "answered with HTTP status 503: try again later"),
        ({"refuses": {"/lfs/": 403}}, "the token may not write there (403)"),
    ],
)
def test_what_the_hub_refuses_is_one_line_without_the_token(hub, model, change, said, request):
    caplog, capfd = (request.getfixturevalue(name) for name in ("caplog", "capfd"))
    for name, value in change.items():
        setattr(hub, name, value)
    with caplog.at_level(logging.DEBUG), pytest.raises(UserError) as caught:
        upload(model)
    text = str(caught.value)
    assert text.startswith(f"{hub.address}/{REPO}: ")
    assert said in text
    assert "\n" not in text
    shown = "".join(traceback.format_exception(caught.value)) + caplog.text + "".join(capfd.readouterr())
    assert TOKEN not in shown


def test_a_hub_out_of_reach_is_one_line(hub, model, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://user:secret@127.0.0.1:9")
    with pytest.raises(UserError, match=r"^http://127\.0\.0\.1:9/me/tiny-gptq-w4: .* cannot be reached") as caught:
        upload(model)
    assert "secret" not in str(caught.value).replace("secretSECRETsecret", "")
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "said"),
    [(404, "this hub has no Xet storage: set HF_HUB_DISABLE_XET=1 to send files over HTTP"),
     (401, "the hub does not know the token (401)"), (403, "the token may not write there (403)")],
)  # fmt: skip
def test_what_stops_an_upload_to_xet_storage_is_one_line_with_the_way_round_it(hub, model, monkeypatch, status, said):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    hub.refuses["/xet-write-token/"] = status
    with pytest.raises(UserError) as caught:
        upload(model)
    assert said in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert (hub.commits, hub.puts()) == ([], [])


def test_a_variant_that_was_not_converted_is_not_uploaded(tmp_path):
    bare = record("gptq-w4", "gptq", 4, 0.01, tmp_path, stages=("download", "quantize"))
    with pytest.raises(UserError, match="variant=gptq-w4: has no converted model to upload; run: dvc repro"):
        upload_of(bare, REPO, CARD, None)


FAULTS = ["quality: perplexity may be +9 %, allowed is 0.05", "layer errors: 3 of 4 linears were quantized"]


def test_a_variant_that_fails_gates_is_refused_unless_each_is_named():
    check_gates("v", [], [])
    check_gates("v", FAULTS, ["layer_errors", "quality"])
    with pytest.raises(
        GateError, match=r"(?s)v is not uploaded.*quality: .*layer errors: .*despite=quality,layer_errors"
    ):
        check_gates("v", FAULTS, [])
    with pytest.raises(GateError) as caught:
        check_gates("v", FAULTS, ["quality"])
    assert "perplexity may be" not in str(caught.value)
    with pytest.raises(UserError, match="despite=alarms: v does not fail alarms; it fails quality, layer_errors"):
        check_gates("v", FAULTS, ["alarms"])


@pytest.mark.parametrize("repo", ["tiny", "a/b/c", "me/", "/tiny", "me/ti ny", "me/a--b", "me/a..b", "me/x.git", "-me/x",
                                  "https://hub.example/me/tiny", "me/" + "x" * 100])  # fmt: skip
def test_what_is_no_name_of_a_repository_is_refused(repo):
    with pytest.raises(UserError, match="give OWNER/NAME"):
        check_repo(repo)


def test_names_of_repositories_are_those_that_the_hubs_library_takes():
    from huggingface_hub.utils import validate_repo_id

    for repo in (REPO, "Me-2/A.b_c-d", "a/b"):
        check_repo(repo)
        validate_repo_id(repo)
