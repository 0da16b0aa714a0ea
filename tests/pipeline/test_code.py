from __future__ import annotations

import ast

import pytest
import yaml

from quantline.pipeline import code
from quantline.pipeline.code import code_files, stage_hash
from quantline.pipeline.config import parse
from quantline.pipeline.identity import identity
from quantline.pipeline.stages import PIPELINE, STAGES


def names(stage, checkout=code.CHECKOUT):
    return {name.removeprefix("src/quantline/") for name in code_files(stage, checkout)}


@pytest.fixture
def checkout(tmp_path):
    files = {
        "stages/one.py": "def one():\n    from quantline.data import reading\n"
        "    start('quantline.toolchains.workers.lib')\n",
        "stages/two.py": "from quantline.toolchains.workers import lib\nname = f'quantline.quantization.{lib}'\n",
        "src/quantline/data/reading.py": "from quantline.core import files\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from quantline.data import unread\nopen('words.yaml')\n",
        "src/quantline/data/words.yaml": "a: 1\n",
        "src/quantline/data/reading.yaml": "b: 1\n",
        "src/quantline/data/unread.py": "",
        "src/quantline/core/files.py": "from quantline.data import unread\n",
        "src/quantline/toolchains/workers/lib.py": "import numpy\n",
        "src/quantline/quantization/any.py": "",
        "src/quantline/pipeline/identity.py": "",
        "src/quantline/pipeline/options.py": "",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_imports_workers_by_name_and_data_beside_a_module_belong_to_a_stage(checkout):
    assert names("one", checkout) == {
        "stages/one.py", "data/reading.py", "data/words.yaml", "data/reading.yaml", "toolchains/workers/lib.py",
    }  # fmt: skip


def test_a_composed_module_name_includes_the_whole_package(checkout):
    assert names("two", checkout) == {"stages/two.py", "toolchains/workers/lib.py", "quantization/any.py"}


def test_infrastructure_and_type_checking_imports_are_left_out(checkout):
    assert not names("one", checkout) & {"core/files.py", "data/unread.py"}


def test_an_edit_changes_the_stages_that_run_it_and_an_edit_of_the_identity_all(checkout):
    def hashes():
        code_files.cache_clear()
        code._references.cache_clear()
        return [stage_hash(stage, checkout) for stage in ("one", "two")]

    first = hashes()
    (checkout / "src/quantline/data/words.yaml").write_text("a: 2\n")
    second = hashes()
    assert [one == other for one, other in zip(first, second, strict=True)] == [False, True]
    (checkout / "src/quantline/pipeline/options.py").write_text("x = 1\n")
    assert [one == other for one, other in zip(second, hashes(), strict=True)] == [False, False]


def test_the_stages_of_the_pipeline_reach_their_modules_at_any_distance():
    assert {"toolchains/workers/reference/engine.py", "data/parity_probe.py"} <= names("download")
    assert {"quantization/capabilities.yaml", "toolchains/workers/quantizers/autoawq.py",
            "toolchains/workers/reference/layer_errors.py",
            "checkpoints/layouts/packing.py"} <= names("quantize")  # fmt: skip
    assert {"serving/rules.yaml", "serving/server_log.py", "data/windows.py"} <= names("serve_smoke")
    assert {"conversion/kernels.py", "serving/rules.yaml"} <= names("convert")
    assert {"report/glossary.yaml", "report/templates/page.html.j2", "report/svg.py"} <= names("report")
    assert {"toolchains/workers/vllm_bench.py", "evaluation/speed/ratios.py"} <= names("speed")
    assert "serving/server.py" not in names("evaluate")
    assert "evaluation/perplexity.py" not in names("quantize")


def test_packages_that_do_not_influence_outputs_are_in_no_closure():
    makes = {"config/limits.py", "core/gpu.py", "pipeline/server.py"}
    for stage in (*PIPELINE, "noise"):
        carried = ("pipeline/", "lifecycle/", "core/", "config/", "toolchains/environments")
        assert [name for name in names(stage) - makes if name.startswith(carried)] == [], stage
        assert not any(name.startswith("planning/") for name in names(stage)), stage


def test_what_has_a_part_in_an_output_is_in_its_closure_wherever_it_stands():
    assert "config/limits.py" in names("evaluate")
    assert "config/limits.py" not in names("serve_smoke") | names("quantize")
    for stage in ("serve_smoke", "speed"):
        assert {"core/gpu.py", "pipeline/server.py"} <= names(stage), stage
    assert {"core/text.py", "config/report.py", "pipeline/records.py"} <= names("report")
    drilled = {"lifecycle/fleet.py", "lifecycle/fleet_smoke.py", "serving/fleet/drill.py", "serving/fleet/envoy.py"}
    assert drilled <= names("fleet_smoke")
    assert not [name for name in names("fleet_smoke") if name.startswith(("report/", "lifecycle/tracking"))]


def test_every_import_of_a_module_is_an_absolute_one(root):
    for path in (root / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: a relative import is not followed"


def test_the_code_is_part_of_a_stages_identity(composed, root):
    values = identity(parse(composed("method=gptq")), "convert", root)
    assert "src/quantline/conversion/convert.py" in values["code"]
    assert "src/quantline/evaluation/perplexity.py" not in values["code"]


def test_the_file_that_dvc_watches_has_a_hash_for_every_stage(root, tmp_path, monkeypatch):
    import stages.code as entry

    monkeypatch.setattr(entry, "ROOT", tmp_path)
    assert entry.code({}) == 0
    written = yaml.safe_load((tmp_path / code.CODE_FILE).read_text(encoding="utf-8"))
    assert set(written) == {name for name, stage in STAGES.items() if not stage.by_hand} | {
        "compose", "fleet_smoke", "report"
    }  # fmt: skip
    assert written["quantize"] == stage_hash("quantize")
