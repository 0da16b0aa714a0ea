"""One copy of the checkout and one run of the pipeline in it, for all tests of this folder."""

from __future__ import annotations

import pytest
from checkout import PLANTED, Checkout, Done, copy_checkout

from quantline.toolchains import environments


@pytest.fixture(scope="session")
def bare(root, tmp_path_factory) -> Checkout:
    """The copy, before anything ran in it."""
    for name in ("reference", "autoawq", "auto_gptq", "vllm"):
        environments.ensure(root, name)
    return copy_checkout(root, tmp_path_factory.mktemp("e2e") / "checkout")


@pytest.fixture(scope="session")
def first_run(bare) -> Done:
    """What `dvc repro` said when it built everything."""
    done = bare.run("python", "-m", "dvc", "repro", **PLANTED)
    assert done.code == 0, done.text
    bare.git("add", "-A")
    bare.git("commit", "-q", "-m", "first run")
    return done


@pytest.fixture(scope="session")
def pipeline(bare, first_run) -> Checkout:
    """The copy, after the pipeline ran in it."""
    return bare


@pytest.fixture
def untouched(bare):
    """Whatever happens in the test, no output is made, changed or lost, and no process or temporary file is left."""
    before = bare.files()
    yield
    assert bare.staying() == []
    assert bare.files() == before
    assert bare.leftovers() == []
