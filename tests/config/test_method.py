from __future__ import annotations

from typing import get_args

from quantline.checkpoints.layouts.awq import MADE
from quantline.config.method import AwqMethod


def test_awq_can_be_asked_for_the_versions_that_its_backends_make():
    assert get_args(AwqMethod.model_fields["version"].annotation) == tuple(MADE)
