"""Fixtures for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkout_paths import ROOT


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config, items):
    """With two processes a file's tests stay together, and all of e2e does: their fixtures run for minutes.

    These come first, then the files that run toolchains, so that at the end both processes have short files left.
    Tests that run DVC's commands in a small project count as e2e, too: each command takes a second.
    """
    for item in items:
        if "project" in item.fixturenames or "built_project" in item.fixturenames:
            item.add_marker(pytest.mark.e2e)
        place = item.path.parent.name if item.path.parent.name == "e2e" else str(item.path)
        item.add_marker(pytest.mark.xdist_group(place))
    if hasattr(config, "workerinput"):  # one of several processes
        slow = {item.path for item in items if item.get_closest_marker("toolchain")}
        items.sort(key=lambda item: 0 if item.path.parent.name == "e2e" else 1 if item.path in slow else 2)


@pytest.hookimpl(tryfirst=True)  # before fixtures
def pytest_runtest_setup(item):
    """Builds the environments that a test names, so that none is skipped, or fails, for the order in which tests run."""
    from quantline.toolchains.environments import ensure

    for mark in item.iter_markers("toolchain"):
        ensure(ROOT, mark.args[0])


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
