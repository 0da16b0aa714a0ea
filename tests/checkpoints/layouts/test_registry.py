"""All layouts together: what their methods share, what names tell, and that nobody outside asks for a layout's name."""

from __future__ import annotations

import ast
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from quantline.checkpoints import layouts
from quantline.checkpoints.layouts import LAYOUTS, TARGETS, Layout
from quantline.checkpoints.layouts.description import Description
from quantline.checkpoints.layouts.linear_spec import LayerSettings
from quantline.checkpoints.layouts.registry import CONFIG_SECTIONS, folder_layout, packed_linear
from quantline.core.errors import CheckpointError

# Names that are no method, backend or library too: in code outside of layouts/ they have no place at all.
UNMISTAKABLE = set(LAYOUTS) - {"gptq", "bitsandbytes", "msmodelslim", "compressed_tensors", "gguf"}
# The values that a configuration may have; a test holds that they are the layouts' targets.
ALLOWED = {"config/convert.py"}


def test_layouts_of_one_method_are_read_by_one_section() -> None:
    described = [layout for layout in LAYOUTS.values() if layout.config is not None]
    for layout in described:
        assert layout.config is not None
        section = CONFIG_SECTIONS[layout.method]
        assert (layout.config.parse, layout.config.own_file) == (section.parse, section.own_file)
    assert set(CONFIG_SECTIONS) == {"awq", "gptq", "compressed-tensors", "bitsandbytes", "modelopt", "gguf", "exl3"}


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.config is not None])
def test_what_a_layout_describes_is_read_as_that_layout(name: str) -> None:
    layout = LAYOUTS[name]
    assert layout.config is not None
    read = []
    for settings in (LayerSettings(*one) for one in ((4, 128, True), (4, 128, False), (8, -1, True))):
        try:
            section = layout.config.describe(Description(settings))
        except CheckpointError:
            continue
        read.append(layout.config.parse(Path("config.json"), section).layout)
    assert set(read) <= {name}, f"{name}: describe writes a section that parse takes for another layout"


def test_every_layout_of_a_module_is_registered() -> None:
    modules = [module_info.name for module_info in pkgutil.walk_packages(layouts.__path__, f"{layouts.__name__}.")]
    found = [value for name in modules for value in vars(import_module(name)).values() if isinstance(value, Layout)]
    lacking = [layout.name for layout in found if layout not in LAYOUTS.values()]
    assert not lacking, f"add a line to LAYOUTS in checkpoints/layouts/registry.py for {lacking}"


def test_targets_are_layouts_that_can_be_written() -> None:
    assert all(layout.affine is not None and layout.target == name for name, layout in TARGETS.items())


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["a.weight", "a.bias", "b.0.norm.weight"], None),
        (["a.weight", "b.qweight", "b.scales"], "b"),
        (["a.weight", "a.weight.absmax"], "a"),
        (["z.SCB", "m.weight_packed"], "m"),
        (["a.weight_offset"], "a"),
    ],
)
def test_a_packed_linear_is_known_by_the_names_of_its_tensors(names: list[str], found: str | None) -> None:
    assert packed_linear(names) == found


def test_a_folder_is_recognised_by_its_files_or_by_the_method_that_is_given(tmp_path: Path) -> None:
    assert folder_layout(tmp_path, "auto") is None
    assert folder_layout(tmp_path, "msmodelslim") is LAYOUTS["msmodelslim"]
    (tmp_path / "quant_model_description.json").write_text("{}")
    assert folder_layout(tmp_path, "auto") is LAYOUTS["msmodelslim"]


def sources() -> Iterator[tuple[str, ast.Module]]:
    root = Path(__file__).resolve().parents[3] / "src" / "quantline"
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not name.startswith("checkpoints/layouts/"):
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def docstrings(tree: ast.Module) -> set[int]:
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def names_in(node: ast.AST) -> set[str]:
    return {one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)}


def is_layout(node: ast.AST) -> bool:
    return "layout" in ast.unparse(node).lower()


def asked(tree: ast.Module) -> Iterator[str]:
    """Conditions on a layout's name: comparisons and look-ups, and names that can mean nothing else."""
    described = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in UNMISTAKABLE and id(node) not in described:
            yield str(node.value)
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(is_layout(side) for side in sides) and any(names_in(side) & set(LAYOUTS) for side in sides):
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and is_question(node, node.func):
            yield ast.unparse(node)


def is_question(call: ast.Call, method: ast.Attribute) -> bool:
    if method.attr in ("startswith", "endswith", "split", "removeprefix"):
        return is_layout(method.value)
    return method.attr == "get" and bool(call.args) and is_layout(call.args[0]) and bool(names_in(method.value))


def test_no_module_outside_of_layouts_asks_for_a_name() -> None:
    found = [f"{name}: {what}" for name, tree in sources() if name not in ALLOWED for what in asked(tree)]
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        'if layout == "gptq": pass',
        'if source.layout in ("gptq", "half"): pass',
        'if layout.startswith("awq"): pass',
        'kind = {"gptq": 1}.get(layout)',
        'written = "awq_gemm"',
    ],
)
def test_a_question_for_a_name_is_seen(code: str) -> None:
    assert list(asked(ast.parse(code)))
