from __future__ import annotations

import ast
import errno
import importlib
import re
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from quantline.core.errors import ConfigError, ServerError, UserError
from quantline.lifecycle.fleet import with_section
from quantline.pipeline.config import parse, with_current_names
from quantline.pipeline.execute import check_caller
from quantline.pipeline.user_messages import explain, option_names
from stages import run_and_publish


@pytest.fixture
def conf(root):
    return root / "conf"


@pytest.fixture
def failure(conf):
    """What Hydra raises for overrides, explained."""

    def of(*overrides, name="config"):
        GlobalHydra.instance().clear()
        with initialize_config_dir(config_dir=str(conf), version_base="1.3"), pytest.raises(Exception) as caught:  # noqa: PT011
            compose(name, overrides=list(overrides))
        return explain(caught.value, conf)

    return of


@pytest.fixture
def frozen(composed):
    locks = {"reference": "", "server": "", "quantizer": ""}
    values = {"variant": "mine", "overrides": "", "backends": ["autoawq"], "locks": locks}
    return parse({**composed(), "frozen": values})


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "method=gptqq",
            "method=gptqq: allowed are autoround, awq, bnb, float, fp4, fp8, gguf, gptq, mxfp8, rtn (did you mean gptq?)",
        ),
        (
            "calibration=wikitext",
            "calibration=wikitext: allowed are auto, c4, demo, domain, jsonl, pileval, self, wikitext2",
        ),
        ("bitss=8", "bitss: no such option (did you mean bits?)"),
        ("method.quant_type=nf4", "method.quant_type: this method has no such option; method=bnb has it, see --help"),
        ("calibration.nsamples=8", "calibration.nsamples: no such option (did you mean calibration.n_samples?)"),
        ("bits", "bits: is not a valid override; give KEY=VALUE"),
        ("model.name=[a", "model.name=[a: is not a valid override"),
    ],
)
def test_what_hydra_cannot_compose_is_explained_with_what_is_allowed(failure, override, says):
    message, code = failure(override)
    assert says in message
    assert code == 2
    assert "\n" not in message


def test_a_frozen_configuration_that_is_missing_is_named_with_its_command(failure):
    message, code = failure(name="nope")
    assert message == "nope: no such configuration; params.yaml names float, awq-w4-g128, gptq-w4-g128, gptq-w8-g128"
    assert code == 2
    message, _ = failure(name="gptq-w8-g128")
    assert message == (
        "gptq-w8-g128: was not composed yet; run `python -m stages.compose variant=gptq-w8-g128`, or `dvc repro`"
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_explained_with_the_file(conf, number):
    message, code = explain(OSError(number, "x", "/data/file"), conf)
    assert "the disk is full while writing /data/file; free some space" in message
    assert code == 1
    assert "writing" not in explain(OSError(number, "x"), conf)[0]


def test_a_file_that_may_not_be_written_is_named(conf):
    assert explain(PermissionError(errno.EACCES, "Permission denied", "/data"), conf) == (
        "/data: Permission denied; make it writable", 1
    )  # fmt: skip


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EIO])
def test_a_file_is_named_as_it_was_to_be_called_not_the_temporary_one_that_is_gone(conf, number):
    inside = OSError(number, "x", "/here/variants/.r8.yaml.partial-vm-64640/r8.yaml")
    assert re.search(r"/here/variants/r8\.yaml[:;]", explain(inside, conf)[0])
    folder = OSError(number, "x", "/here/.report.partial-my.host-7")
    assert "/here/report" in explain(folder, conf)[0]
    assert "partial" not in explain(inside, conf)[0] + explain(folder, conf)[0]


def test_our_own_errors_keep_their_message_and_code(conf):
    assert explain(UserError("no"), conf) == ("no", 2)
    assert explain(ServerError("died"), conf) == ("died", 1)


@pytest.mark.parametrize("error", [ValueError("x"), OSError(errno.EIO, "x"), KeyError("x")])
def test_a_bug_keeps_its_traceback(conf, error):
    assert explain(error, conf) is None


def test_options_are_known_of_every_choice_of_a_group(conf):
    names = option_names(conf)
    assert {"bits", "method.damp_percent", "method.clip", "serve.process.port", "evaluate.bootstrap.seed"} <= set(names)
    assert not [name for name in names if name.startswith(("hydra", "defaults"))]


def test_an_old_option_name_gives_an_error_with_the_new_name(failure, composed):
    assert failure("coverage.samples=4") == ("coverage.samples: was renamed; use layer_errors.samples", 2)
    with pytest.raises(ConfigError, match="coverage: was renamed; use layer_errors"):
        parse({**composed(), "coverage": {"enabled": True}})


def test_a_configuration_of_an_older_version_is_read_by_the_names_of_today(composed):
    old = composed("layer_errors.samples=4", "promote.layer_errors=false")
    old["coverage"] = old.pop("layer_errors")
    old["promote"] = {**old["promote"], "coverage": old["promote"]["layer_errors"]}
    del old["promote"]["layer_errors"]
    config = parse(with_current_names(old))
    assert (config.layer_errors.samples, config.promote.layer_errors) == (4, False)
    assert "coverage" in old


def test_a_frozen_configuration_with_overrides_is_refused(frozen):
    with pytest.raises(UserError, match=r"bits=8: variants/mine\.yaml is frozen and takes no overrides"):
        check_caller(frozen, ["bits=8"])
    check_caller(frozen, [])


def test_dvc_may_run_frozen_configurations_alone(frozen, composed, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "quantize@mine")
    check_caller(frozen, [])
    with pytest.raises(UserError, match=r"not frozen; run it with -cp \.\./variants -cn NAME"):
        check_caller(parse(composed()), [])
    monkeypatch.delenv("DVC_STAGE")
    check_caller(parse(composed()), ["bits=4"])


@pytest.fixture
def checkout(root, tmp_path):
    for name in ("envs", "assets"):
        (tmp_path / name).symlink_to(root / name)
    return tmp_path


@pytest.mark.parametrize(("overrides", "published"), [([], ["by-hand/awq-w4-g128"]), (["tracking.enabled=false"], [])])
def test_a_stage_by_hand_is_published_under_a_name_of_its_own(root, checkout, monkeypatch, overrides, published):
    seen = []
    monkeypatch.setattr(
        "quantline.lifecycle.publish.publish_records", lambda records, *_, **__: seen.extend(r.name for r in records)
    )

    def work(run):
        with run.output():
            pass

    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(root / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=overrides)
    run_and_publish("convert", work, cfg, checkout, overrides)
    assert seen == published


def started(root, *command):
    return subprocess.run([sys.executable, *command], cwd=root, capture_output=True, text=True, check=False)


@pytest.mark.e2e
def test_without_hydra_the_message_names_the_setup_command(root):
    done = started(root, "-S", "-m", "stages.quantize")
    assert done.returncode == 1
    assert done.stderr == "error: hydra is not installed here; run `make setup`, then `source .venv/bin/activate`\n"


@pytest.mark.e2e
def test_a_failure_does_not_end_the_other_jobs_of_a_sweep(root):
    done = started(root, "-m", "stages.quantize", "-m", "method=gptq", "bits=5,7", "tracking.enabled=false")
    assert done.returncode == 2
    assert "bits=5: gptq takes" in done.stderr
    assert "bits=7: gptq takes" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.e2e
def test_every_job_of_a_sweep_has_a_heading_and_none_leaves_a_file_in_the_checkout(root):
    before = sorted(root.iterdir())
    done = started(root, "-m", "stages.quantize", "-m", "method=gptq", "bits=5,7", "tracking.enabled=false")
    headings = [line for line in done.stderr.splitlines() if line.startswith("== ")]
    assert headings == [
        "== 0: method=gptq bits=5 tracking.enabled=False",
        "== 1: method=gptq bits=7 tracking.enabled=False",
    ]
    assert set(root.iterdir()) - set(before) <= {root / "scratch"}


@pytest.mark.e2e
def test_all_help_names_the_stage_the_groups_and_every_default(root):
    done = started(root, "-m", "stages.convert", "--help=all")
    assert done.returncode == 0
    assert done.stdout.startswith("convert: one stage of the quantline pipeline")
    assert "method: autoround, awq, bnb, float, fp4, fp8, gguf, gptq, mxfp8, rtn" in done.stdout
    assert "group_size: 128" in done.stdout


def messages(root):
    """Every text with a space in the code, docstrings aside, and every text in its YAML: where it is, and the text."""
    for path in sorted([*(root / "src").rglob("*.py"), *(root / "stages").glob("*.py")]):
        tree, parts = ast.parse(path.read_text(encoding="utf-8")), set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr | ast.JoinedStr):
                parts.update(id(part) for part in ast.iter_child_nodes(node))
            text = None
            if isinstance(node, ast.JoinedStr):
                text = "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
                text = node.value
            if text and " " in text:
                yield f"{path.name}:{node.lineno}", text
    for path in sorted((root / "src").rglob("*.yaml")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if re.search(r"(reason|remedy):", line):
                yield f"{path.name}:{number}", line.partition("#")[0]


def options_of_commands(root):
    """The own options of each command in stages/, by its name."""
    return {
        path.stem: {option.name for option in getattr(importlib.import_module(f"stages.{path.stem}"), "OPTIONS", ())}
        for path in (root / "stages").glob("[a-z]*.py")
    }


def test_every_option_that_a_message_advises_to_give_can_be_typed_like_that(root, conf):
    groups = {path.parent.relative_to(conf).as_posix() for path in conf.glob("*/*.yaml")}
    known = {*option_names(conf), *groups, *(name for own in options_of_commands(root).values() for name in own)}
    # A fleet's commands take the options of its section without the section's name, and precisions of any name.
    known |= {name.removeprefix("fleet.") for name in option_names(conf)} | {"precisions.low"}
    assert with_section(["precisions.low=[a]"]) == ["++fleet.precisions.low=[a]"]
    wrong, seen = [], 0
    for where, text in messages(root):
        for advised in re.findall(r"\b(?:[Gg]ive|[Ss]et|[Uu]se|[Cc]hoose|[Aa]dd|raise)\b([^;:]*)", text):
            for key in re.findall(r"(?<![\w./{}`-])([a-z_][a-z_0-9.]*)=[\w{\[]", advised):
                seen += 1
                if re.sub(r"\{\}|NAME", "demo", key) not in known:
                    wrong.append(f"{where}: {key} in {text!r}")
            bare = re.findall(r"^ ([a-z_]+\.[a-z_.]+[a-z])\b(?![=(])", advised)
            wrong += [f"{where}: {key} in {text!r}" for key in bare if key not in known]
    assert wrong == []
    assert seen > 50


def test_every_command_that_a_message_names_exists_and_takes_its_options(root, conf):
    own, known = options_of_commands(root), set(option_names(conf))
    targets = set(re.findall(r"(?m)^([a-z]+):", (root / "Makefile").read_text(encoding="utf-8")))
    from dvc.cli.parser import COMMANDS

    of_dvc = {module.__name__.rpartition(".")[2] for module in COMMANDS}
    wrong, seen = [], 0
    for where, text in messages(root):
        for name, arguments in re.findall(r"python -m stages\.(\w+)((?: [\w.]+=[\w{}./<>-]+)*)", text):
            keys = set(re.findall(r" ([\w.]+)=", arguments))
            seen += 1
            if name not in own or keys - own[name] - known:
                wrong.append(f"{where}: stages.{name}{arguments}")
        unknown = [f"make {name}" for name in re.findall(r"`make ([a-z]+)", text) if name not in targets]
        named = re.findall(r"`dvc ([a-z]+)", text)
        unknown += [f"dvc {name}" for name in named if name not in of_dvc]
        wrong += [f"{where}: {command}" for command in unknown]
        seen += len(named)
    assert wrong == []
    assert seen > 30
