import pytest

from quantline.core.errors import ConfigError
from quantline.pipeline.config import parse


def faults_of(values) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(values)
    return str(caught.value)


def test_five_bits_are_refused_with_the_allowed_ones(composed):
    assert "bits=5: gptq takes 2, 3, 4 or 8" in faults_of(composed("method=gptq", "bits=5"))


def test_rounded_activations_name_what_they_go_with(composed):
    fault = faults_of(composed("method=gptq", "method.activation_bits=8", "bits=3"))
    assert (
        "needs symmetric weights of 4 bits, or of 8 bits with one scale per channel; give bits=8 group_size=-1" in fault
    )
    fault = faults_of(composed("method=gptq", "method.activation_bits=fp8", "bits=8"))
    assert "method.activation_bits=fp8: needs symmetric weights of 4 bits; give bits=4" in fault
    assert parse(composed("method=gptq", "method.activation_bits=fp8")).bits == 4
    whole = ("method=rtn", "method.activation_bits=8", "bits=8", "group_size=-1")
    assert parse(composed(*whole)).method.activation_bits == 8
    assert faults_of(composed(*whole, "method.sym=false")).endswith("give method.sym=true")


def test_methods_of_floating_point_codes_have_their_own_bits_and_groups(composed):
    found = {
        (scheme, parse(composed(f"method={method}", f"method.scheme={scheme}")).bits,
         parse(composed(f"method={method}", f"method.scheme={scheme}")).group_size)
        for method, scheme in (("fp8", "dynamic"), ("fp8", "block"), ("fp4", "nvfp4"), ("mxfp8", "mxfp8"))
    }  # fmt: skip
    assert found == {("dynamic", 8, -1), ("block", 8, 128), ("nvfp4", 4, 16), ("mxfp8", 8, 32)}


def test_eight_bit_awq_is_refused_and_gptq_is_named_as_the_remedy(composed):
    assert "bits=8: awq takes 4; method=gptq takes bits=8" in faults_of(composed("method=awq", "bits=8"))


def test_group_size_96_is_refused_with_the_nearest_allowed(composed):
    message = faults_of(composed("method=awq", "group_size=96"))
    assert "group_size=96: awq takes 32, 64, 128 or 256" in message
    assert "nearest is 64" in message


def test_all_faults_are_reported_together(composed):
    message = faults_of(composed("method=gptq", "bits=5", "group_size=96", "threads=0", "device=tpu"))
    assert "4 faults" in message
    for key in ("bits=5", "group_size=96", "threads=0", "device=tpu"):
        assert key in message


def test_a_word_where_a_number_belongs_is_refused(composed):
    assert "bits=four" in faults_of(composed("bits=four"))


def test_an_option_that_the_method_does_not_have_is_refused(composed):
    assert "method.sym: no such option" in faults_of(composed("method=awq", "+method.sym=true"))


def test_neither_repo_nor_path_is_refused(composed):
    assert "model.path=DIR" in faults_of(composed("model.path=null"))


def test_a_branch_in_place_of_a_commit_is_refused(composed):
    message = faults_of(composed("model=custom", "model.repo=owner/name", "model.revision=main"))
    assert "model.revision=main: give the commit of owner/name, 40 hex digits" in message


def test_a_repository_on_top_of_the_embedded_model_takes_its_place(composed):
    config = parse(composed("model.repo=owner/name", f"model.revision={'a' * 40}"))
    assert (config.model.repo, config.model.path) == ("owner/name", None)


def test_a_calibration_file_that_no_source_reads_is_refused(composed):
    message = faults_of(composed("calibration.path=own.jsonl"))
    assert "calibration.path=own.jsonl: calibration=demo does not read it; give calibration=jsonl" in message


def test_a_password_in_the_tracking_address_is_refused_and_not_repeated(composed):
    message = faults_of(composed("tracking.uri=https://me:secret@host/"))
    assert "MLFLOW_TRACKING_PASSWORD" in message
    assert "secret" not in message


def test_an_experiment_cannot_leave_its_folder(composed):
    assert "tracking.experiment=../x" in faults_of(composed("tracking.experiment=../x"))


def test_trust_remote_code_and_pickle_are_off_by_default(root, composed):
    choices = [path.stem for path in (root / "conf" / "model").glob("*.yaml")]
    assert choices
    for choice in choices:
        model = composed(f"model={choice}")["model"]
        assert model["trust_remote_code"] is False, choice
        assert model["allow_pickle"] is False, choice


def test_servers_listen_on_loopback_by_default(composed):
    assert composed()["serve"]["process"]["host"] == "127.0.0.1"


def test_an_option_that_takes_a_number_or_auto_has_one_fault_by_its_own_name(composed):
    assert faults_of(composed("serve.max_model_len=3")).endswith(
        "serve.max_model_len=3: input should be greater than or equal to 16, or auto"
    )
    assert "evaluate.stride=0: input should be greater than or equal to 1, or auto" in faults_of(
        composed("evaluate.stride=0")
    )


# What configurations of older versions are without, by section.
LATER = {
    "": ("fleet", "sensitivity"), "evaluate.limits": ("rounding_ratio",), "calibration": ("held_back", "self_text"),
    "method": ("solver",), "serve": ("kv_cache_dtype",), "tasks.local": ("needle", "own"), "promote": ("shadow",),
}  # fmt: skip


def test_a_configuration_that_was_frozen_by_an_older_version_is_read_and_has_no_later_limits(composed):
    old = composed("method=gptq")
    for section, names in LATER.items():
        place = old
        for part in section.split(".") if section else ():
            place = place[part]
        for name in names:
            del place[name]
    config = parse(old)
    assert config.evaluate.limits.rounding_ratio is None
    assert "rounding_ratio" not in old["evaluate"]["limits"]
    assert config.evaluate.limits.kl_divergence == parse(composed("method=gptq")).evaluate.limits.kl_divergence
    del old["evaluate"]["limits"]["kl_divergence"]
    assert faults_of(old).endswith("evaluate.limits.kl_divergence: is missing; give it a value")
