"""The rules of the recommendation that conf/ has."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from quantline.config.report import ReportConfig


@pytest.fixture(scope="session")
def rules(root: Path) -> ReportConfig:
    return ReportConfig.model_validate(yaml.safe_load((root / "conf" / "report" / "default.yaml").read_text()))
