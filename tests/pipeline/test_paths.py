import pytest

from quantline.core.errors import UserError
from quantline.pipeline.config import parse
from quantline.pipeline.paths import checked_name, derived_name, recorded, run_folder, run_names, stage_paths


def name_of(composed, *overrides):
    return derived_name(parse(composed(*overrides)), overrides)


def test_a_variant_by_hand_is_named_after_method_bits_and_group(composed):
    assert name_of(composed, "method=gptq", "bits=8") == "gptq-w8-g128"


def test_a_group_size_of_minus_one_is_named_channel(composed):
    assert name_of(composed, "method=gptq", "group_size=-1") == "gptq-w4-channel"


def test_other_overrides_are_part_of_the_name_in_a_fixed_order(composed):
    one = name_of(composed, "method=gptq", "method.desc_act=true", "calibration.n_samples=64")
    other = name_of(composed, "calibration.n_samples=64", "method.desc_act=true", "method=gptq")
    assert one == other
    assert one.startswith("gptq-w4-g128-desc_act-true-")


def test_a_path_is_no_part_of_a_name_and_a_choice_is(composed):
    name = name_of(composed, "calibration=jsonl", "calibration.path=/data/of/mine/texts.jsonl")
    assert name.startswith("awq-w4-g128-calibration-jsonl-")
    assert len(name) == len("awq-w4-g128-calibration-jsonl-") + 6
    assert name_of(composed, "method=gptq", "layers=attention8_mlp4").endswith("-layers-attention8_mlp4")


def test_options_of_different_sections_with_the_same_last_word_give_different_names(composed):
    assert name_of(composed, "calibration.seed=1") != name_of(composed, "seed=1")


def test_what_only_changes_how_a_stage_runs_is_no_part_of_the_name(composed):
    assert name_of(composed, "device=cpu", "serve.process.port=8001", "tracking.enabled=false") == "awq-w4-g128"


def test_long_names_are_cut_and_stay_distinct(composed):
    names = {name_of(composed, f"calibration.name={'n' * 90}{i}") for i in range(2)}
    assert len(names) == 2
    assert all(len(name) <= 80 for name in names)


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "shared", "a.b", "x" * 81, "a b"])
def test_names_that_are_no_safe_folder_are_refused(name):
    with pytest.raises(UserError):
        checked_name(name)


@pytest.mark.parametrize("name", ["float", "shared", "report"])
def test_names_of_other_folders_are_refused(name):
    with pytest.raises(UserError, match=f"a variant cannot be called {name}"):
        checked_name(name)


def test_values_that_differ_in_signs_alone_give_different_names(composed):
    names = {name_of(composed, f"evaluate.path='{path}'") for path in ("/a/b", "/a_b", "a b", "a.b")}
    assert len(names) == 4
    assert name_of(composed, "method=gptq", "method.damp_percent=0.1") == "gptq-w4-g128-damp_percent-0_1"


def test_a_name_means_one_run(tmp_path):
    assert run_folder(tmp_path, "one") == tmp_path / "artifacts" / "one"
    assert run_folder(tmp_path, "by-hand/one") == tmp_path / "scratch" / "one"
    assert run_folder(tmp_path, "by-hand/float/demo-1") == tmp_path / "scratch" / "float" / "demo-1"
    assert run_folder(tmp_path, "model/one") == tmp_path / "artifacts" / "model" / "one"
    for name in ("a/b/c", "by-hand/a/b", "by-hand/../artifacts/one", "shared", "by-hand/"):
        assert run_folder(tmp_path, name) is None


def test_the_download_has_one_place_for_all_variants(tmp_path):
    assert stage_paths(tmp_path, "a", "download") == stage_paths(tmp_path, "b", "download")
    assert stage_paths(tmp_path, "a", "quantize").result == tmp_path / "a" / "quantize.json"


def test_each_of_several_models_has_a_download_and_a_float_baseline_of_its_own(tmp_path):
    assert stage_paths(tmp_path, "qwen/one", "download").output == tmp_path / "qwen" / "shared" / "download"
    assert stage_paths(tmp_path, "qwen/float", "evaluate").result == tmp_path / "qwen" / "float" / "evaluate.json"


def test_the_runs_of_several_models_are_found_and_no_file_in_an_output(tmp_path):
    for name in ("artifacts/qwen/one/tasks.json", "artifacts/qwen/shared/download.json", "artifacts/two/tasks.json",
                 "artifacts/two/tasks/tasks.json"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert [path.relative_to(tmp_path).as_posix() for path in recorded(tmp_path, "tasks")] == [
        "artifacts/two/tasks.json", "artifacts/qwen/one/tasks.json",
    ]  # fmt: skip
    assert run_names(tmp_path, "tasks", "download") == ["qwen/one", "two"]
    assert run_folder(tmp_path, "qwen/one") == tmp_path / "artifacts" / "qwen" / "one"
    assert [run_folder(tmp_path, name) for name in ("a/b/c", "../one", "shared/download", "qwen/shared")] == [None] * 4
