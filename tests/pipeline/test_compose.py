from __future__ import annotations

import pytest
import yaml

from quantline.core.errors import ConfigError, UserError
from quantline.pipeline.compose import freeze, variant_overrides
from quantline.pipeline.config import parse
from quantline.pipeline.identity import locks_of

PARAMS = """
shared: model=demo calibration=demo
baseline: method=float
variants:
  one: method=gptq bits=8
  two: method=awq 'model.name="a b"'
"""


@pytest.fixture
def checkout(root, tmp_path):
    for name in ("conf", "envs"):
        (tmp_path / name).symlink_to(root / name)
    (tmp_path / "params.yaml").write_text(PARAMS)
    return tmp_path


def frozen_values(path):
    values = yaml.safe_load(path.read_text())
    return {key: value for key, value in values.items() if key not in ("defaults", "hydra")}


def test_a_variants_overrides_follow_those_that_are_shared(checkout):
    overrides = variant_overrides(checkout / "params.yaml", "one")
    assert overrides == ["model=demo", "calibration=demo", "method=gptq", "bits=8"]
    assert variant_overrides(checkout / "params.yaml", "float")[-1] == "method=float"


def test_overrides_are_quoted_as_in_a_shell(checkout):
    assert variant_overrides(checkout / "params.yaml", "two")[-1] == 'model.name="a b"'


def test_a_frozen_variant_is_the_whole_configuration_with_the_locks(checkout):
    path = freeze(checkout, "one")
    assert path == checkout / "variants" / "one.yaml"
    config = parse(frozen_values(path))
    assert (config.method.name, config.bits) == ("gptq", 8)
    assert config.frozen is not None
    assert config.frozen.variant == "one"
    assert config.frozen.overrides == "model=demo calibration=demo method=gptq bits=8"
    assert config.frozen.locks == locks_of(config.frozen.backends, checkout)
    assert set(config.frozen.locks) == {"reference", "server", "quantizer", "tasks"}


def test_freezing_twice_gives_the_same_bytes(checkout):
    first = freeze(checkout, "one").read_bytes()
    assert freeze(checkout, "one").read_bytes() == first
    assert [path.name for path in (checkout / "variants").iterdir()] == ["one.yaml"]


def test_a_changed_lock_changes_its_role_alone(root, checkout):
    before = frozen_values(freeze(checkout, "one"))["frozen"]["locks"]
    (checkout / "envs").unlink()
    (checkout / "envs").mkdir()
    for lock in (root / "envs").glob("*.txt"):
        (checkout / "envs" / lock.name).write_bytes(lock.read_bytes())
    with (checkout / "envs" / "auto_gptq-cuda.txt").open("a") as file:
        file.write("six==1.17.0\n")
    after = frozen_values(freeze(checkout, "one"))["frozen"]["locks"]
    assert {role for role in after if after[role] != before[role]} == {"quantizer"}


def test_a_frozen_file_is_one_that_hydra_takes_as_it_is(checkout):
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from quantline.pipeline.hydra_values import plain

    path = freeze(checkout, "two")
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(path.parent), version_base="1.3"):
        assert plain(compose("two")) == frozen_values(path)


def test_an_unknown_variant_is_refused_with_the_known_ones(checkout):
    with pytest.raises(UserError, match=r"variant=onne: params.yaml names float, one, two \(did you mean one\?\)"):
        freeze(checkout, "onne")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("variants: [a, b]", "needs `variants:`"),
        ("shared: x", "needs `variants:`"),
        ("- a", "needs `variants:`"),
        ("variants: {a: b", "is not valid YAML"),
        ("variants: {float: method=gptq}", "a variant cannot be called float"),
        ("variants: {one: {bits: 8}}", "variants.one is {'bits': 8}; give overrides as one line of text"),
        ("shared: [1]\nvariants: {one: bits=8}", "shared is"),
    ],
)
def test_a_params_file_that_cannot_be_read_is_refused(checkout, text, says):
    (checkout / "params.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        freeze(checkout, "one")
    assert says in str(caught.value)


def test_quotes_that_do_not_close_are_refused(checkout):
    (checkout / "params.yaml").write_text("variants:\n  one: method=gptq 'bits=8\n")
    with pytest.raises(UserError, match=r"variants\.one .*No closing quotation; quote it"):
        freeze(checkout, "one")


def test_a_params_file_that_is_not_there_is_refused(checkout):
    (checkout / "params.yaml").unlink()
    with pytest.raises(UserError, match="this file names the variants to build"):
        freeze(checkout, "one")


def test_a_line_that_is_no_valid_variant_leaves_the_former_file(checkout):
    before = freeze(checkout, "one").read_bytes()
    (checkout / "params.yaml").write_text(PARAMS.replace("bits=8", "bits=5"))
    with pytest.raises(ConfigError, match="bits=5"):
        freeze(checkout, "one")
    assert (checkout / "variants" / "one.yaml").read_bytes() == before


@pytest.mark.parametrize(("name", "line"), [("one", "  one: method=float"), ("float", "baseline: method=gptq")])
def test_the_float_method_belongs_to_the_baseline_alone(checkout, name, line):
    key = line.split(":")[0]
    lines = [line if old.startswith(f"{key}:") else old for old in PARAMS.splitlines()]
    (checkout / "params.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError, match="is only for the variant called float"):
        freeze(checkout, name)
