"""Fixtures for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkout_paths import ROOT


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """With two processes a file's tests stay together, and all of e2e does: their fixtures run for minutes.

    Tests that run DVC's commands in a small project count as e2e, too: each command takes a second.
    """
    for item in items:
        if "project" in item.fixturenames or "built_project" in item.fixturenames:
            item.add_marker(pytest.mark.e2e)
        place = item.path.parent.name if item.path.parent.name == "e2e" else str(item.path)
        item.add_marker(pytest.mark.xdist_group(place))


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout under test."""
    return ROOT


@pytest.fixture(scope="session")
def composed(root):
    """Compose conf/ with overrides into plain values."""
    from composer import Composer

    return Composer(root / "conf")


@pytest.fixture(scope="session")
def built_project(root, tmp_path_factory):
    """A small DVC project with two variants of one stage, built; see `dvc_project`."""
    from dvc_project import build

    return build(root, tmp_path_factory.mktemp("dvc") / "project")


@pytest.fixture
def project(built_project, tmp_path):
    """A copy of it that may be spoilt."""
    return built_project.copy(tmp_path / "project")


@pytest.fixture(scope="session")
def serves_4_bits():
    """Skips where this machine's vLLM has no kernels for 4-bit weights."""
    from quantline.serving.rules import cpu_instructions
    from quantline.toolchains.environments import detect_platform

    if detect_platform() == "cpu" and cpu_instructions() in ("avx2", "none"):
        pytest.skip("vLLM's kernels for 4-bit weights on CPUs are of AVX-512")
