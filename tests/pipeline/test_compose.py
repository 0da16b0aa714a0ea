from __future__ import annotations

import pytest
import yaml
from hydra.errors import HydraException

from quantline.core.errors import ConfigError, UserError
from quantline.pipeline.compose import compose_values, freeze, variant_overrides
from quantline.pipeline.config import parse
from quantline.pipeline.identity import locks_of

PARAMS = """
shared: model=demo calibration=demo
baseline: method=float
variants:
  one: method=gptq bits=8
  two: method=awq 'tracking.experiment="a b"'
"""


@pytest.fixture
def checkout(root, tmp_path, composed, monkeypatch):
    monkeypatch.setattr("quantline.pipeline.compose.compose_values", lambda conf, overrides: composed(*overrides))
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
    assert variant_overrides(checkout / "params.yaml", "two")[-1] == 'tracking.experiment="a b"'


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


SHARED = "model=custom model.path=A calibration=demo evaluate.window=128"


def refused(checkout, line, shared=SHARED, baseline="method=float"):
    lines = {"shared": shared, "baseline": baseline, "variants": {"other": line}}
    (checkout / "params.yaml").write_text(yaml.safe_dump(lines))
    with pytest.raises(ConfigError) as caught:
        freeze(checkout, "other")
    assert not (checkout / "variants" / "other.yaml").exists()
    return caught.value.faults


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("model.path=B", "variants.other: model.path=B contradicts shared: model.path=A; download runs once"),
        ("model=demo", "variants.other: model=demo contradicts shared: model.path=A; download runs once"),
        (
            "model.allow_pickle=true",
            "variants.other: model.allow_pickle=true contradicts shared: model=custom (so ",
        ),
        (
            "evaluate.window=256",
            "variants.other: evaluate.window=256 contradicts shared: evaluate.window=128; serve_smoke",
        ),
        (
            "evaluate.path=x.txt",
            "variants.other: evaluate.path=x.txt contradicts the default evaluate.path=assets/demo/",
        ),
        ("evaluate=wikitext2_word evaluate.path=x", "variants.other: evaluate=wikitext2_word (so evaluate."),
        ("evaluate.generations.prompts=3", "variants.other: evaluate.generations.prompts=3 contradicts the default"),
        ("serve.smoke.prompts=[Hello]", "variants.other: serve.smoke.prompts=[Hello] contradicts the default"),
        ("tasks.limit=9", "variants.other: tasks.limit=9 contradicts the default tasks.limit=200; tasks compares"),
        ("+tasks.standard.arc_easy={}", "variants.other: +tasks.standard.arc_easy={} (so"),
        ("serve.max_model_len=2048", "variants.other: serve.max_model_len=2048 contradicts the default"),
    ],
)
def test_a_line_that_contradicts_what_is_shared_is_refused_with_both_lines_as_typed(checkout, line, says):
    assert any(fault.startswith(says) for fault in refused(checkout, f"method=rtn {line}")), line


def test_a_checkpoint_of_another_tool_is_no_line(checkout):
    lines = {
        "shared": "model=demo",
        "baseline": "method=float",
        "variants": {"other": "method=rtn source=auto source.path=/x"},
    }
    (checkout / "params.yaml").write_text(yaml.safe_dump(lines))
    with pytest.raises(
        UserError, match=r"^source=auto: only stages\.convert by hand takes .*, and the pipeline would not"
    ):
        freeze(checkout, "other")
    assert not (checkout / "variants" / "other.yaml").exists()


def test_the_baselines_own_line_is_compared_with_too(checkout):
    (fault, *_) = refused(checkout, "method=rtn", baseline="method=float evaluate.max_tokens=5000")
    assert "the default evaluate.max_tokens=100000 contradicts baseline: evaluate.max_tokens=5000" in fault


@pytest.mark.parametrize(
    "line",
    [
        "calibration.seed=3", "calibration=demo calibration.n_samples=4", "tasks=none", "tasks.engines=[reference]",
        "tasks.local.last_word=null", "speed=none", "convert.shard_size=1GB", "model.path=A", "evaluate.restore.layers=1",
        "tasks=none serve.max_model_len=2048", "serve.smoke.prompts=['A transaction is']", "evaluate.limits.kl_divergence=1",
    ],
)  # fmt: skip
def test_a_line_may_override_what_is_a_variants_own(checkout, line):
    lines = {"shared": SHARED, "variants": {"other": f'method=rtn "{line}"' if "'" in line else f"method=rtn {line}"}}
    (checkout / "params.yaml").write_text(yaml.safe_dump({**lines, "baseline": "method=float"}))
    assert freeze(checkout, "other").is_file()


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("variants.one", "variants: {one: bits=8 method=gptq bits=4}"),
        ("shared", "shared: model=demo model=custom\nvariants: {one: method=gptq}"),
        ("variants.one", "variants: {one: method=rtn +method.sym=true ++method.sym=false}"),
    ],
)
def test_an_option_that_a_line_gives_twice_is_refused(checkout, place, text):
    (checkout / "params.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"params\.yaml: {place}: .* and .*: both set .*; keep one of them"):
        freeze(checkout, "one")


@pytest.mark.parametrize("text", ["a: method=rtn\n  a: method=awq", "1: method=rtn\n  '1': method=awq"])
def test_a_variant_that_is_named_twice_is_refused(checkout, text):
    (checkout / "params.yaml").write_text(f"variants:\n  {text}\n")
    with pytest.raises(UserError, match=r"is given twice, in line 2 and in line 3|two variants are called 1"):
        freeze(checkout, "a")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["bits=8", "calibration.n_samples=5"],
        ["method=gptq", "bits=2", "method.desc_act=true", "evaluate=wikitext2", "evaluate.path=x y", "tasks=none"],
        ["model=custom", "model.path=/a/b", "serve.smoke.prompts=[a,b]", "model.name=null"],
        ["+serve.process.environment.A=b", "instruments=none"],
    ],
)
def test_what_tests_compose_is_what_hydra_composes(root, composed, overrides):
    wanted = compose_values(root / "conf", overrides)
    assert [composed(*overrides), composed(*overrides)] == [wanted, wanted]
    assert list(composed(*overrides)) == list(wanted)


def test_what_tests_cannot_compose_is_refused_as_hydra_refuses_it(root, composed):
    for overrides in (["bitss=8"], ["method=gptqq"], ["method.quant_type=nf4", "method=gptq"], ["bits"], ["bits=[1"]):
        said = []
        for compose in (composed, lambda *own: compose_values(root / "conf", own)):
            with pytest.raises(HydraException) as caught:
                compose(*overrides)
            said.append((type(caught.value), str(caught.value)))
        assert said[0] == said[1]
