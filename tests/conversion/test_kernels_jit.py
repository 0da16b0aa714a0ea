import os
import subprocess
import sys

from quantline.conversion import kernels_jit
from quantline.conversion.kernels_jit import kernel


def test_compiled_kernels_are_loaded_again_without_numba(root):
    kernel("pack_flat")  # compiled by now
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "from quantline.conversion.kernels_jit import kernel\n"
        "import numpy as np; codes, words = np.array([-8, 7] * 8, np.int8), np.zeros(8, np.uint8)\n"
        "kernel('pack_flat')(codes.ctypes.data, 16, 4, words.ctypes.data); print(words.tolist())"
    )
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split("\n")[0] == str([0xF0] * 8)


def test_a_folder_that_cannot_be_written_is_passed_over_and_a_damaged_file_made_again(tmp_path, monkeypatch):
    import llvmlite.binding as llvm

    made = []
    monkeypatch.setattr(kernels_jit, "_compile", lambda *_: made.append(1) or b"code")
    (tmp_path / "a file").touch()
    monkeypatch.setattr(kernels_jit, "_folders", lambda: [tmp_path / "a file" / "x", tmp_path / "cache"])
    assert kernels_jit._object_code(llvm, None) == kernels_jit._object_code(llvm, None) == b"code"
    assert len(made) == 1
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])
    assert kernels_jit._object_code(llvm, None) == b"code"
    assert len(made) == 2
