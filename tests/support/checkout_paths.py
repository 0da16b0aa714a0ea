"""Paths in the checkout under test, for marks that are made while a test file is imported; tests take the fixture `root`."""

from __future__ import annotations

from pathlib import Path

from quantline.toolchains.environments import environment_folder

ROOT = Path(__file__).resolve().parents[2]
DEMO_MODEL = ROOT / "assets" / "demo" / "model"
FIXTURES = ROOT.parent / "shared" / "fixtures"


def interpreter(environment: str) -> Path:
    """The Python of a locked environment, built or not."""
    return environment_folder(ROOT, environment) / "bin" / "python"
