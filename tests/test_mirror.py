"""Where code and tests stand: every module has its test file, and the package keeps to its size."""

from __future__ import annotations

import ast
import re

import pytest

# Modules without a test file of their own -> the test file that covers them; a package's name stands for its modules.
COVERED = {
    "toolchains/workers/reference/nearest": "tests/quantization/test_layer_errors.py",
    "config": "tests/pipeline/test_config.py",
    "report": "tests/report/test_build.py",
    # exceptions, asked for where they are raised
    "checkpoints/errors": "tests/checkpoints/test_checkpoint.py",
    "serving/handover": "tests/serving/test_keeping.py",
    "serving/running": "tests/serving/test_server.py",
    "checkpoints/float_view": "tests/checkpoints/test_checkpoint.py",
    "conversion/errors": "tests/conversion/test_bands.py",
    "core/errors": "tests/pipeline/test_user_messages.py",
    # layouts: each is written and read back by the same tests
    "checkpoints/layouts/awq_gemm": "tests/checkpoints/layouts/test_layouts.py",
    "checkpoints/layouts/awq_gemv": "tests/checkpoints/layouts/test_layouts.py",
    "checkpoints/layouts/checks": "tests/checkpoints/layouts/test_layouts.py",
    "checkpoints/layouts/gptq": "tests/checkpoints/layouts/test_layouts.py",
    "checkpoints/layouts/gptq_v2": "tests/checkpoints/layouts/test_layouts.py",
    "checkpoints/layouts/awq": "tests/checkpoints/layouts/test_layouts.py",
    "checkpoints/layouts/description": "tests/checkpoints/test_checkpoint.py",
    "checkpoints/layouts/folder": "tests/checkpoints/layouts/msmodelslim/test_files.py",
    "checkpoints/layouts/gptq_config": "tests/checkpoints/layouts/test_layouts.py",
    "checkpoints/layouts/msmodelslim/layout": "tests/checkpoints/layouts/test_registry.py",
    "checkpoints/layouts/linear_spec": "tests/checkpoints/layouts/test_sizes.py",
    "checkpoints/layouts/float_codes": "tests/checkpoints/layouts/compressed_tensors/test_floats.py",
    "checkpoints/layouts/compressed_tensors/schemes": "tests/checkpoints/layouts/compressed_tensors/test_floats.py",
    "checkpoints/layouts/compressed_tensors/config": "tests/checkpoints/layouts/compressed_tensors/test_pack_quantized.py",
    "checkpoints/layouts/msmodelslim/outliers": "tests/checkpoints/layouts/msmodelslim/test_codec.py",
    "checkpoints/layouts/msmodelslim/tensors": "tests/checkpoints/layouts/msmodelslim/test_files.py",
    "checkpoints/layouts/gguf/codebooks": "tests/checkpoints/layouts/gguf/test_blocks.py",
    "serving/server_options": "tests/serving/test_command.py",
    "toolchains/workers/llamacpp/conversion": "tests/toolchains/workers/quantizers/test_llamacpp.py",
    "toolchains/workers/llamacpp/library": "tests/toolchains/workers/quantizers/test_llamacpp.py",
    "toolchains/workers/llamacpp/scoring": "tests/toolchains/workers/llamacpp/test_server.py",
    "toolchains/workers/llamacpp/writing": "tests/toolchains/workers/quantizers/test_llamacpp.py",
    "checkpoints/quantization_config": "tests/checkpoints/test_checkpoint.py",
    "conversion/config_files": "tests/conversion/test_convert.py",
    "conversion/facts": "tests/conversion/test_serving_notes.py",
    "conversion/passthrough": "tests/conversion/test_convert.py",
    "conversion/proof": "tests/conversion/test_convert.py",
    "conversion/source": "tests/conversion/test_convert_to_msmodelslim.py",
    "conversion/targets": "tests/conversion/test_bands.py",
    "conversion/write": "tests/conversion/test_convert.py",
    "data/hub": "tests/data/test_download.py",
    "data/sampling": "tests/data/test_calibration.py",
    "data/windows": "tests/evaluation/test_perplexity.py",
    "evaluation/measurements": "tests/evaluation/test_evaluate.py",
    "evaluation/speed/table": "tests/evaluation/speed/test_ratios.py",
    "lifecycle/restore": "tests/lifecycle/test_backup.py",
    "lifecycle/storage/dvc_cache": "tests/lifecycle/test_verify.py",
    "lifecycle/storage/dvc_outputs": "tests/lifecycle/test_rebuild.py",
    "lifecycle/tracking/reader": "tests/lifecycle/tracking/test_registry.py",
    "lifecycle/tracking/store": "tests/lifecycle/tracking/test_writer.py",
    "lifecycle/sweep/job": "tests/e2e/test_sweep.py",
    "lifecycle/sweep/run": "tests/e2e/test_sweep.py",
    "lifecycle/worktree": "tests/lifecycle/test_rebuild.py",
    "pipeline/convert_folder": "tests/conversion/test_convert_stage.py",
    "pipeline/options": "tests/pipeline/test_identity.py",
    "pipeline/hydra_values": "tests/pipeline/test_compose.py",
    "pipeline/lineage/chain": "tests/pipeline/lineage/test_diff.py",
    "pipeline/lineage/report": "tests/e2e/test_bring_back.py",
    "pipeline/monitor/sampler": "tests/pipeline/monitor/test_monitor.py",
    "planning/report": "tests/stages/test_plan.py",
    "planning/spec": "tests/planning/test_preflight.py",
    "quantization/requirements": "tests/pipeline/test_preflight.py",
    "serving/fleet/child": "tests/serving/fleet/test_drill.py",
    "serving/fleet/load": "tests/serving/fleet/test_drill.py",
    "serving/fleet/router": "tests/serving/fleet/test_drill.py",
    "serving/fleet/orders": "tests/serving/fleet/test_drill.py",
    "serving/fleet/routes": "tests/serving/fleet/test_envoy.py",
    "serving/fleet/running": "tests/serving/fleet/test_drill.py",
    "serving/fleet/status": "tests/lifecycle/test_fleet_commands.py",
    "serving/process_tree": "tests/serving/test_server.py",
    "toolchains/toolchain": "tests/toolchains/test_environments.py",
    # parts of a worker, run with it in its environment
    "toolchains/workers/quantizers/autoround_resume": "tests/toolchains/workers/quantizers/test_autoround.py",
    "toolchains/workers/quantizers/gptqmodel_awq": "tests/toolchains/workers/quantizers/test_gptqmodel.py",
    "toolchains/workers/quantizers/gptqmodel_gptq": "tests/toolchains/workers/quantizers/test_gptqmodel.py",
    "toolchains/workers/quantizers/llmcompressor_floats": "tests/toolchains/workers/quantizers/test_llmcompressor.py",
    "toolchains/workers/quantizers/llmcompressor_modifiers": "tests/toolchains/workers/quantizers/test_llmcompressor.py",
    "toolchains/workers/quantizers/output": "tests/toolchains/workers/quantizers/test_native.py",
    "toolchains/workers/quantizers/resume_layers": "tests/toolchains/workers/quantizers/test_resume_files.py",
    "toolchains/workers/quantizers/rounding": "tests/toolchains/workers/quantizers/test_autoawq.py",
    "toolchains/workers/reference/accounting": "tests/toolchains/workers/reference/test_engine.py",
    "toolchains/workers/reference/architecture": "tests/conversion/test_architecture.py",
    "toolchains/workers/reference/layer_errors": "tests/quantization/test_layer_errors.py",
    "toolchains/workers/reference/linear_locations": "tests/quantization/test_layer_errors.py",
    "toolchains/workers/reference/divergence": "tests/toolchains/workers/reference/test_engine.py",
    "toolchains/workers/reference/generating": "tests/toolchains/workers/reference/test_evaluate.py",
    "toolchains/workers/reference/restoring": "tests/toolchains/workers/reference/test_evaluate.py",
    "toolchains/workers/reference/scoring": "tests/toolchains/workers/reference/test_engine.py",
    "toolchains/workers/reference/skeleton": "tests/toolchains/workers/reference/test_engine.py",
    "toolchains/workers/asking": "tests/lifecycle/test_ask.py",
    "toolchains/workers/vllm_bench": "tests/evaluation/speed/test_speed_vllm.py",
}


@pytest.fixture(scope="module")
def modules(root):
    """Path below src/quantline without its ending -> file, of every module but __init__."""
    package = root / "src" / "quantline"
    files = sorted(path for path in package.rglob("*.py") if path.name != "__init__.py")
    return {path.relative_to(package).with_suffix("").as_posix(): path for path in files}


def own_test(root, module):
    folder, _, name = module.rpartition("/")
    return root / "tests" / folder / f"test_{name}.py"


def test_every_module_has_its_test_file_or_is_named_as_covered_by_another(root, modules):
    bare = [name for name in modules if not own_test(root, name).is_file()]
    lacking = [name for name in bare if name not in COVERED and name.partition("/")[0] not in COVERED]
    assert not lacking, f"write tests/PACKAGE/test_MODULE.py, or name in COVERED what covers it: {lacking}"


def test_what_covers_a_module_exists_and_no_line_of_the_table_is_left_over(root, modules):
    absent = {test for test in COVERED.values() if not (root / test).is_file()}
    assert not absent, f"COVERED names test files that are not there: {sorted(absent)}"
    packages = {name.partition("/")[0] for name in modules}
    over = [name for name in COVERED if name not in packages and name not in modules]
    over += [name for name in COVERED if name in modules and own_test(root, name).is_file()]
    assert not over, f"COVERED names modules that are gone or have their own test file: {over}"


def test_what_covers_a_module_imports_it_or_a_module_that_does(root, modules):
    files = {f"quantline.{name.replace('/', '.')}": path for name, path in modules.items()}
    files |= {f"stages.{path.stem}": path for path in (root / "stages").glob("*.py")}
    package = root / "src" / "quantline"
    files |= {
        f"quantline.{path.parent.relative_to(package).as_posix().replace('/', '.')}": path
        for path in package.rglob("*/__init__.py")
    }

    def used_by(path):
        """The modules that a file imports, starts by their dotted names, or runs as scripts beside it."""
        text, found = path.read_text(encoding="utf-8"), set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found |= set(re.findall(r"(?:quantline|stages)(?:\.[a-z_0-9]+)+", text))
        beside = {path.with_name(name) for name in re.findall(r'"([a-z_]+\.py)"', text)}
        return {files[name] for name in found if name in files} | {script for script in beside if script.is_file()}

    far = []
    for name, test in COVERED.items():
        near = used_by(root / test)
        reached = near.union(*map(used_by, near))
        wanted = [path for module, path in modules.items() if module == name or module.startswith(f"{name}/")]
        far += [] if reached.intersection(wanted) else [f"{name}: {test}"]
    assert not far, f"neither these tests nor what they import import what they are to cover: {far}"


def test_the_package_keeps_to_its_size(root, modules):
    package = root / "src" / "quantline"
    entries = [path.name for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    assert len(entries) <= 14, f"entries of src/quantline: {sorted(entries)}"
    core = [name for name in modules if name.startswith("core/")]
    assert len(core) <= 7, f"modules of core: {core}"
    long = {name: count for name, path in modules.items() if (count := lines(path)) > 400}
    assert not long, f"modules of more than 400 lines: {long}"


def test_the_pages_that_one_reads_first_keep_to_their_size(root):
    assert lines(root / "dvc.yaml") <= 260
    assert lines(root / "README.md") <= 160


def lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())
