"""Whatever stands in params.yaml and in variants/: a configuration, or one error for the user; never another exception."""

from __future__ import annotations

import copy

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantline.core.errors import ConfigError, UserError
from quantline.pipeline.compose import frozen_variant, read_frozen, read_params, variant_overrides
from quantline.pipeline.config import Config, parse, with_current_names
from quantline.pipeline.user_messages import explain

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
PARTS = st.sampled_from(
    [
        "method=gptq", "method=rtn", "method=float", "bits=8", "bits=", "bits=x", "bits=4,8", "model.path=A", "model=custom",
        "model={path: A}", "evaluate.window=4096", "evaluate.stride=1e9", "calibration=jsonl", "calibration.sources={}",
        "calibration.sources=3", "~method", "~serve", "+new=1", "++serve=1", "layers.rules=[1]", "tasks.local=null",
        "'+layers.rules=[{match: x}]'", "method@other=awq", "serve.max_model_len=auto", "bits=${seed}", "bits=${nothing}",
        "bits=${oc.env:NOT_SET_ANYWHERE}", "=", "a b", "\"'", "hydra=x", "speed=none", "evaluate=null",
        "tasks.standard={a: 1}",
        "device=cpu", "backends={}", "backends.gptq=[x]", "method={name: gptq}", "method.name=awq", "evaluate.limits=0",
    ]
)  # fmt: skip
SLOW = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
QUICK = settings(SLOW, max_examples=150)


@pytest.fixture
def checkout(root, tmp_path):
    for name in ("conf", "envs"):
        (tmp_path / name).symlink_to(root / name)
    return tmp_path


@QUICK
@given(content=ANYTHING | st.fixed_dictionaries({"shared": ANYTHING, "variants": st.just({"one": 1}) | ANYTHING}))
def test_any_yaml_as_params_gives_lines_or_a_users_error(checkout, content):
    path = checkout / "params.yaml"
    path.write_text(yaml.dump(content), encoding="utf-8")
    try:
        names = list(read_params(path)["variants"])
        assert all(isinstance(variant_overrides(path, name), list) for name in names)
    except UserError:
        return


@QUICK
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_as_params_or_as_a_frozen_variant_are_a_users_error(checkout, content):
    path = checkout / "any.yaml"
    path.write_bytes(content)
    for read in (read_params, read_frozen):
        with pytest.raises(UserError):
            read(path)


@SLOW
@given(shared=st.lists(PARTS, max_size=2), own=st.lists(PARTS, max_size=3))
def test_any_line_gives_a_configuration_or_an_explained_error(root, checkout, shared, own):
    lines = {"shared": " ".join(shared), "baseline": "method=float", "variants": {"one": " ".join(own)}}
    (checkout / "params.yaml").write_text(yaml.safe_dump(lines))
    explained: object = ""
    try:
        assert parse(frozen_variant(checkout, "one")).frozen is not None
    except Exception as error:
        explained = explain(error, root / "conf")
    assert explained is not None


@QUICK
@given(data=st.data())
def test_a_configuration_with_anything_in_it_is_one_or_a_config_error(composed, data):
    values = copy.deepcopy(with_current_names(_base(composed)))
    place = values
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(place, key=str)))
        if not isinstance(place[key], dict) or not place[key] or data.draw(st.booleans()):
            place[key] = data.draw(ANYTHING)
            break
        place = place[key]
    try:
        assert isinstance(parse(values), Config)
    except ConfigError:
        return


_COMPOSED: dict[str, dict[str, object]] = {}


def _base(composed):
    if not _COMPOSED:
        _COMPOSED["method=gptq"] = composed("method=gptq")
    return _COMPOSED["method=gptq"]
