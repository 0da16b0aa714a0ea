from __future__ import annotations

import pytest

from quantline.toolchains.workers.quantizers import resume_files
from quantline.toolchains.workers.quantizers.resume_layers import LayerStore


@pytest.fixture
def job(tmp_path):
    for name in ("tokens", "probe", "other"):
        (tmp_path / name).write_text(name)
    (tmp_path / "work").mkdir()
    work = str(tmp_path / "work")
    return {"calibration": str(tmp_path / "tokens"), "probe": str(tmp_path / "probe"), "work": work, "seed": 0}


def test_jobs_with_another_result_have_another_folder(job, tmp_path):
    base = resume_files.folder_of(job, "layers", "")
    assert resume_files.folder_of({**job, "output": "elsewhere", "model": "elsewhere"}, "layers", "") == base
    others = [{"seed": 1}, {"calibration": str(tmp_path / "other")}, {"probe": str(tmp_path / "other")}]
    assert base not in [resume_files.folder_of({**job, **change}, "layers", "") for change in others]
    assert base not in [
        resume_files.folder_of(job, "layers", "another version"),
        resume_files.folder_of(job, "blocks", ""),
    ]


def test_what_another_job_kept_is_removed_and_the_own_is_not(job, tmp_path):
    for name in ("layers-a", "layers-b", "blocks-a"):
        (tmp_path / "work" / name).mkdir()
    resume_files.forget(job, "layers", but=tmp_path / "work" / "layers-a")
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["blocks-a", "layers-a"]
    resume_files.forget({}, "layers")  # a job without a folder keeps nothing


def test_a_file_is_there_when_it_is_whole(tmp_path):
    path = tmp_path / "file.npz"

    def write(fail):
        with resume_files.whole(path) as file:
            file.write(b"new" if fail else b"whole")
            if fail:
                raise OSError("no room")

    write(fail=False)
    with pytest.raises(OSError, match="no room"):
        write(fail=True)
    assert path.read_bytes() == b"whole"


def test_a_kept_layer_is_found_by_the_same_job_only(job):
    LayerStore.of(job, "1.0").put("layer", {}, {"loss": 0.5})
    assert LayerStore.of({**job, "output": "elsewhere"}, "1.0").get("layer") == ({}, {"loss": 0.5})
    assert LayerStore.of({**job, "seed": 1}, "1.0").get("layer") is None
    # By then the other job's folder had taken the place of the first.
    assert LayerStore.of(job, "1.0").get("layer") is None
