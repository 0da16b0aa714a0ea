"""Compile `kernels` with numba once and cache the machine code; later runs load it without importing numba.

Importing numba and loading its own cache takes as long as converting a gigabyte. The kernels need nothing of numba's
runtime, so only their object code is kept. LLVM's loader, which comes with numba, loads it in 0.1 s.

The object code lies beside this module in `__pycache__`. If that folder cannot be written, it lies in `NUMBA_CACHE_DIR` or
below the user's cache folder. Its name is a hash of the source, the versions and the processor.

The kernels are called as numba calls them internally: addresses for the result and for an exception come first, then the
arguments. numba does not promise this convention, so envs/core.in pins its version. `TRIED` lists the versions for which
tests/conversion/test_bands.py compared the kernels with NumPy, byte for byte. With any other version `usable` is false, and
conversion uses NumPy.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from quantline.conversion import kernels
from quantline.core.files import replaced

TRIED = ("0.66.0", "0.67.0", "0.68.1")
_LOCK = threading.Lock()
_TYPES: dict[str, Any] = {"b": ctypes.c_void_p, "w": ctypes.c_void_p, "n": ctypes.c_int64}


def usable() -> bool:
    """Whether numba is installed in a version whose calling convention was tried; numba is not imported."""
    return _numba_version() in TRIED


def _numba_version() -> str | None:
    try:
        return version("numba")
    except PackageNotFoundError:
        return None


def kernel(name: str) -> Callable[..., int]:
    """A compiled function of `kernels`. It takes addresses and integers, and lets other threads run meanwhile."""
    with _LOCK:
        address = _engine().get_function_address(name)
    arguments = [_TYPES[kind] for kind in kernels.SIGNATURES[name]]
    # numba's convention: addresses for the result and for an exception, then the arguments. No kernel raises.
    called = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, *arguments)(address)

    def call(*values: int) -> int:
        result, raised = ctypes.c_int64(0), ctypes.c_void_p()
        called(ctypes.addressof(result), ctypes.addressof(raised), *values)
        return result.value

    return call


@cache
def _engine() -> Any:
    """All kernels, loaded. The engine must live as long as their addresses are in use."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3, jit=True
    )
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(_object_code(llvm, machine)))
    engine.finalize_object()
    return engine


def _object_code(llvm: Any, machine: Any) -> bytes:
    name = _name(llvm)
    for folder in _folders():
        path = folder / name
        data = path.read_bytes() if path.is_file() else b""
        code = data[32:]
        if code and hashlib.sha256(code).digest() == data[:32]:
            return code
    code = _compile(llvm, machine)
    for folder in _folders():
        try:
            with replaced(folder / name) as temporary:
                temporary.write_bytes(hashlib.sha256(code).digest() + code)
            break
        except OSError:
            continue
    return code


def _name(llvm: Any) -> str:
    source = Path(kernels.__file__).read_bytes() + Path(__file__).read_bytes()
    processor = f"{llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}"
    versions = f"{llvm.llvm_version_info} {_numba_version()}"
    return f"kernels.{hashlib.sha256(source + f'{processor} {versions}'.encode()).hexdigest()[:16]}.o"


def _folders() -> Iterator[Path]:
    yield Path(__file__).parent / "__pycache__"
    if "NUMBA_CACHE_DIR" in os.environ:
        yield Path(os.environ["NUMBA_CACHE_DIR"])
    yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantline"


def _compile(llvm: Any, machine: Any) -> bytes:
    """One object file of all kernels, each under its own name."""
    from numba import jit, types

    pointer: Any = types.CPointer
    kinds = {"b": pointer(types.uint8), "w": pointer(types.uint32), "n": types.int64}
    # No wrappers, since they need numba's runtime. With error_model=numpy no exception is raised.
    options: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "error_model": "numpy"}
    whole = llvm.parse_assembly("")
    for name, signature in kernels.SIGNATURES.items():
        arguments = types.int64(*(kinds[kind] for kind in signature))
        made: Any = jit(arguments, nopython=True, **options)(getattr(kernels, name))
        module = llvm.parse_assembly(made.inspect_llvm(made.signatures[0]))
        (function,) = [function for function in module.functions if not function.is_declaration]
        function.name = name
        whole.link_in(module)
    return bytes(machine.emit_object(whole))
