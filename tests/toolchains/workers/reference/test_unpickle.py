import json
import pickle

import pytest

from quantline.checkpoints.checkpoint import Checkpoint
from quantline.core.errors import UserError
from quantline.toolchains.environments import ensure
from quantline.toolchains.runner import run_worker

pytestmark = pytest.mark.toolchain("reference")

# Written by torch in its own environment: this one has none.
MAKE = """
import torch
from pathlib import Path
from quantline.toolchains.protocol import worker_main

def run(job, report):
    folder = Path(job["folder"])
    tied = torch.arange(12, dtype=torch.float16).reshape(3, 4)
    torch.save({"embed.weight": tied, "head.weight": tied, "odd.weight": tied.t()}, folder / "pytorch_model.bin")
    return {}

worker_main(run)
"""


@pytest.fixture
def unpickle(root, tmp_path):
    toolchain = ensure(root, "reference")

    def run(folder):
        job = {"folder": str(folder)}
        return run_worker(
            toolchain,
            "quantline.toolchains.workers.reference.unpickle",
            job,
            log=tmp_path / "log",
            threads=1,
            label="unpickle",
        )

    return run


def test_pickled_weights_become_safetensors_and_the_pickle_goes(root, tmp_path, unpickle):
    (tmp_path / "make_pickle.py").write_text(MAKE)
    path = f"{root / 'src'}:{tmp_path}"
    folder = tmp_path / "model"
    folder.mkdir()
    run_worker(
        ensure(root, "reference"), "make_pickle", {"folder": str(folder)}, log=tmp_path / "log", threads=1, label="make",
        extra_environment={"PYTHONPATH": path},
    )  # fmt: skip
    assert unpickle(folder).data == {"tensors": 3, "files": 1}
    assert [file.name for file in folder.iterdir()] == ["model.safetensors"]
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.tensor("embed.weight").tolist() == checkpoint.tensor("head.weight").tolist()
    assert checkpoint.tensor("odd.weight").tolist() == checkpoint.tensor("embed.weight").T.tolist()


class _Calls:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, unpickle):
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": _Calls()}))
    with pytest.raises(UserError, match=r"pytorch_model\.bin: is damaged or contains more than tensors"):
        unpickle(tmp_path)
    assert "code ran" not in (tmp_path / "log").read_text()
    assert not (tmp_path / "model.safetensors").exists()


def test_an_index_that_points_outside_its_folder_is_refused(tmp_path, unpickle):
    index = {"weight_map": {"a": "../evil.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"\.\./evil\.bin"):
        unpickle(tmp_path)
