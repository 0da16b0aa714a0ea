"""Models and variants to plan with."""

from __future__ import annotations

import pytest
from places import ORDER
from tiny_quantized import write_float

from quantline.pipeline.preflight import method_defaults
from quantline.planning.spec import Model, VariantSpec


@pytest.fixture(scope="module")
def defaults(root):
    return {name: options for name, options in method_defaults(root).items() if name in ORDER}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Model.open(write_float(tmp_path_factory.mktemp("m") / "model", layers=2), "tiny")


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return Model.open(write_float(tmp_path_factory.mktemp("m") / "untied", tied=False), "untied")


@pytest.fixture
def variant(defaults):
    def build(method, bits=4, group_size=128, **changes):
        own = {key: changes.pop(key) for key in tuple(changes) if key in defaults[method]}
        return VariantSpec(method, bits, group_size, {**defaults[method], **own}, **changes)

    return build
