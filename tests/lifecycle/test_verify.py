from __future__ import annotations

import re
import shutil
import sys

import pytest

from quantline.core.errors import UserError
from quantline.lifecycle.storage.dvc_cache import entries_of, object_path
from quantline.lifecycle.storage.dvc_lock import read_lock
from quantline.lifecycle.verify import verify
from quantline.pipeline.dvc_config import cache_folder


def weights_of(project, variant):
    """The object that holds the variant's weights."""
    (output,) = [out for out in read_lock(project.root) if out.path == f"artifacts/{variant}/quantize"]
    (entry,) = [e for e in entries_of(project.cache, output.path, output.md5) if e.path.endswith("safetensors")]
    return object_path(project.cache, entry.md5)


def spoil(path):
    path.chmod(0o644)
    path.write_bytes(b"x" + path.read_bytes()[1:])


def test_the_cache_is_found_where_dvc_has_it(project):
    assert cache_folder(project.root) == project.cache
    (project.root / ".dvc" / "config.local").write_text("[cache]\n    dir = ../elsewhere\n")
    assert cache_folder(project.root).resolve() == project.root / "elsewhere"


def test_a_whole_project_has_no_fault(project):
    report = verify(project.root, project.cache)
    assert report.faults == ()
    assert report.files == 6
    assert report.objects == 7  # of each variant: two lists, two results, two weights; the configurations are equal
    assert report.bytes > 2000


def test_a_variant_that_params_yaml_has_no_more_is_not_missed(project):
    import yaml

    path = project.root / "params.yaml"
    params = yaml.safe_load(path.read_text())
    del params["variants"]["two"]
    path.write_text(yaml.safe_dump(params))
    assert "two" in (project.root / "dvc.lock").read_text()
    shutil.rmtree(project.root / "artifacts" / "two")
    assert verify(project.root, project.cache).faults == ()
    assert {output.variant for output in read_lock(project.root)} == {"one"}


def test_a_damaged_cache_file_is_named_with_its_variant_and_the_remedy_mends_it(project):
    path = weights_of(project, "two")
    spoil(path)
    (fault,) = verify(project.root, project.cache).faults
    assert (fault.where, fault.variant) == (str(path), "two")
    assert "is damaged; it is the content of artifacts/two/quantize/model.safetensors" in fault.what
    assert f"rm -f {path}" in fault.remedy
    assert "dvc commit --force quantize@two" in fault.remedy
    path.unlink()
    project.dvc("commit", "--force", "quantize@two")
    assert verify(project.root, project.cache).faults == ()


def test_a_file_of_the_workspace_that_was_edited_is_named_and_comes_back_from_the_cache(project):
    path = project.root / "artifacts" / "one" / "quantize" / "model.safetensors"
    spoil(path)
    (fault,) = verify(project.root, project.cache).faults  # once, though its result does not know it either
    assert fault.where == "artifacts/one/quantize/model.safetensors"
    assert "dvc.lock records" in fault.what
    assert fault.remedy == "`dvc checkout --force artifacts/one/quantize` takes it from the cache"
    project.dvc("checkout", "--force", "artifacts/one/quantize")
    assert verify(project.root, project.cache).faults == ()


def test_damage_in_both_places_is_mended_by_making_the_output_again(project):
    spoil(weights_of(project, "one"))
    spoil(project.root / "artifacts" / "one" / "quantize" / "model.safetensors")
    remedies = [
        fault.remedy for fault in verify(project.root, project.cache).faults if str(project.cache) in fault.where
    ]
    assert len(remedies) == 1
    assert "dvc repro --force --single-item quantize@one" in remedies[0]


DAMAGES = {
    "the output is gone, and its list": ("gone", "list"),
    "the output is gone, and an object": ("gone", "weights"),
    "a file is changed, and its object": ("changed", "weights"),
    "a file is changed, and the list": ("changed", "list"),
    "a file is more, and the list": ("more", "list"),
    "a file is changed": ("changed", None),
    "a file is more": ("more", None),
    "the output is gone": ("gone", None),
    "the list": (None, "list"),
    "an object": (None, "weights"),
}


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(("here", "cached"), DAMAGES.values(), ids=DAMAGES)
def test_the_remedies_one_after_the_other_as_they_are_told_mend_it(project, tmp_path, here, cached, remote):
    if remote:
        project.dvc("remote", "add", "--default", "store", str(tmp_path / "store"))
        project.dvc("push", "-q")
    folder = project.root / "artifacts" / "one" / "quantize"
    (listed,) = [out.md5 for out in read_lock(project.root) if out.path == "artifacts/one/quantize"]
    if cached:
        spoil({"list": object_path(project.cache, listed), "weights": weights_of(project, "one")}[cached])
    if here == "gone":
        shutil.rmtree(folder)
    elif here == "changed":
        spoil(folder / "model.safetensors")
    elif here == "more":
        (folder / "more").write_text("more")
    faults = verify(project.root, project.cache).faults
    assert faults
    for fault in faults:
        told = [text.replace("make pull", "dvc pull") for text in re.findall("`([^`]+)`", fault.remedy)]
        first = next((place for place, text in enumerate(told) if not text.startswith("rm ")), -1)
        for command in told[: first + 1]:  # what follows an `or` is another way
            project.run("sh", "-c", command.replace("dvc ", f"{sys.executable} -m dvc "))
    assert verify(project.root, project.cache).faults == ()


def test_missing_and_additional_files_are_named(project):
    (project.root / "artifacts" / "one" / "quantize" / "config.json").unlink()
    (project.root / "artifacts" / "two" / "quantize" / "extra").write_text("")
    found = {(fault.where, fault.what) for fault in verify(project.root, project.cache).faults}
    assert ("artifacts/one/quantize/config.json", "is missing") in found
    assert ("artifacts/two/quantize/extra", "is not in dvc.lock") in found


def test_a_missing_list_of_a_folder_and_a_missing_output_are_named(project):
    output = next(out for out in read_lock(project.root) if out.path == "artifacts/one/quantize")
    object_path(project.cache, output.md5).unlink()
    (project.root / "artifacts" / "two" / "quantize.json").unlink()
    found = {(fault.where, fault.what) for fault in verify(project.root, project.cache).faults}
    assert found == {
        (str(object_path(project.cache, output.md5)), "is missing; it is the content of artifacts/one/quantize"),
        ("artifacts/two/quantize.json", "is missing"),
    }


def test_a_result_that_dvc_lock_lacks_is_named_with_its_variant(project):
    for name in ("float/evaluate", "shared/download", "one/convert", "removed/convert"):
        path = project.root / "artifacts" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    found = {(fault.variant, fault.what.split()[3].rstrip(",")) for fault in verify(project.root, project.cache).faults}
    assert found == {("float", "evaluate_baseline"), ("shared", "download"), ("one", "convert@one")}


def test_a_damaged_object_that_nothing_needs_may_go(project):
    path = project.cache / "files" / "md5" / "ab" / ("c" * 30)
    path.parent.mkdir(exist_ok=True)
    path.write_text("half")
    (fault,) = verify(project.root, project.cache).faults
    assert (fault.where, fault.variant) == (str(path), "no current variant")


@pytest.mark.parametrize("text", ["{", "stages: 3", "stages: {a: {outs: [{path: x}]}}"])
def test_a_damaged_lock_is_an_error_that_names_the_remedy(project, text):
    (project.root / "dvc.lock").write_text(text)
    with pytest.raises(UserError, match=r"dvc\.lock is damaged; take it from git"):
        verify(project.root, project.cache)
