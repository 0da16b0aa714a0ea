"""The documentation says what is there: options, commands, files. Whether its links hold, `make docs` checks."""

from __future__ import annotations

import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from pydantic import BaseModel

from quantline.pipeline.config import Config
from tools import command_pages, docs_hooks, options_reference

# Made by the pipeline or by a build, or a name that stands for the reader's own.
NOT_KEPT = re.compile(
    r"^(artifacts|variants|scratch|report|metrics|site|mlartifacts|data|\.venvs?)(/|$)|NAME|NNNN|[<>*{}$=: ]|^\W|//|"
    r"mylib|sizes|smollm2|float_quantized|torch_rtn|^dvc/|^system/"
)
PATH = re.compile(r"`([\w.][\w./-]*/[\w./-]*)`")


@pytest.fixture(scope="module")
def page():
    return options_reference.page()


def row(page: str, option: str) -> list[str]:
    (line,) = [line for line in page.splitlines() if line.startswith(f"| `{option}` |")]
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def places(values, place=""):
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from places(value, f"{place}.{key}" if place else str(key))
    else:
        yield place


def sections(kind, found):
    """Every section that a configuration can hold."""
    for info in kind.model_fields.values():
        stack = [info.annotation]
        while stack:
            one = stack.pop()
            if isinstance(one, type) and issubclass(one, BaseModel):
                if one not in found:
                    found.add(one)
                    sections(one, found)
            else:
                stack += getattr(one, "__args__", ())
    return found


def test_the_page_that_is_kept_is_what_conf_and_the_types_say(root, page):
    kept = (root / "docs" / "reference" / "options.md").read_text(encoding="utf-8")
    assert kept == page, "conf/ or a type has changed: run `make docs` and commit docs/reference/options.md"


def test_every_value_of_the_configuration_is_an_option_of_the_page(page, composed):
    options = set(re.findall(r"^\| `([\w.\[\]]+)` \|", page, re.MULTILINE))
    found = list(places({key: value for key, value in composed().items() if key != "hydra"}))
    assert len(found) > 100
    for place in found:
        if place == "method.name":  # is said by the group
            continue
        parents = [place.rsplit(".", count)[0] for count in range(place.count(".") + 1)]
        # A mapping by names of the reader's own is one option; what stands in it is below NAME.
        assert any(parent in options for parent in parents), place


def test_every_field_of_every_section_is_an_option_of_the_page(page):
    known = sections(Config, {Config})
    assert len(known) > 20
    frozen = Config.model_fields["frozen"].annotation.__args__[0]
    options = re.findall(r"^\| `([\w.\[\]]+)` \|", page, re.MULTILINE)
    names, headings = (
        {option.rpartition(".")[2] for option in options},
        set(re.findall(r"^##+ `(.+)`$", page, re.MULTILINE)),
    )
    names |= {heading.rpartition(".")[2] for heading in headings}
    for section in known - {frozen}:
        for key, info in section.model_fields.items():
            assert (info.alias or key) in {*names, "frozen"}, (section.__name__, key)


def test_an_option_tells_its_default_type_limits_and_comment(page):
    assert row(page, "method.damp_percent") == [
        "`method.damp_percent`", "`0.01`", "number, above 0.0, below 1.0",
        "added to the Hessian's diagonal, as a share of its mean",
    ]  # fmt: skip
    assert row(page, "convert.for")[1:3] == ["`null`", "`vllm` or null"]
    assert row(page, "method.version")[2] == "one of `gemm`, `gemv`, `exllama`"
    assert row(page, "layers.rules[].match")[1:3] == ["required", "string, not empty"]
    assert row(page, "evaluate.level")[3].endswith("bits_per_byte are measured in any case"), "two lines long"
    assert "`n_samples=128`" in next(line for line in page.splitlines() if line.startswith("| `calibration=c4`"))


def test_every_choice_of_every_group_is_on_the_page(root, page):
    for path in (root / "conf").glob("*/*.yaml"):
        if path.parent.name != "hydra":
            assert f"| `{path.parent.name}={path.stem}`" in page, path


def test_the_reference_of_commands_has_every_stage_and_every_target(root):
    commands = (root / "docs" / "reference" / "commands.md").read_text(encoding="utf-8")
    stages = [path.stem for path in (root / "stages").glob("[a-z]*.py")]
    assert len(stages) > 20
    assert [name for name in stages if f"stages.{name}" not in commands] == []
    targets = re.findall(r"^([a-z]+):.*## ", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name in targets if f"`make {name}`" not in commands and name != "help"] == []


def test_every_command_has_a_page_that_is_what_its_module_says(root):
    folder = root / "docs" / "reference" / "commands"
    kept = {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    made = {name: command_pages.page(name) for name in command_pages.commands()}
    assert kept == made, "a command has changed: run `make docs` and commit docs/reference/commands/"
    overview = (root / "docs" / "reference" / "commands.md").read_text(encoding="utf-8")
    assert [name for name in made if f"](commands/{name}.md)" not in overview] == []


def test_a_page_of_a_command_has_its_examples_options_and_place_in_the_pipeline():
    plan, quantize, verify = (command_pages.page(name) for name in ("plan", "quantize", "verify"))
    assert "```sh\npython -m stages.plan method=gptq bits=8\n" in plan
    assert "| `context` | tokens per sequence; default serve.max_model_len | such as `4096` |" in plan
    assert "[`method`](../options.md#method)" in plan
    assert "of [the variant](../options.md#the-variant) `bits`, `group_size`" in quantize
    assert "| follows | [`stages.download`](download.md), [`stages.calibrate`](calibrate.md) |" in quantize
    assert "## Options" not in verify
    assert "## As a stage" not in verify


def test_decisions_are_listed_by_their_headings(root):
    listed = docs_hooks.decisions(root / "docs")
    assert len(listed) == len(list((root / "docs" / "decisions").glob("[0-9]*.md"))) > 10
    assert [title.partition(".")[0] for _, title in listed] == [str(int(name[:4])) for name, _ in listed]
    assert len({name[:4] for name, _ in listed}) == len(listed), "a number is there twice"


def test_readme_is_one_page_and_its_links_and_those_of_contributing_hold(root):
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (root / name).read_text(encoding="utf-8")
        assert name != "README.md" or text.count("\n") <= 160
        links = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
        assert links
        assert [link for link in links if not (root / link).exists()] == []


def test_files_that_are_named_are_there(root):
    texts = [root / "README.md", root / "CONTRIBUTING.md", *(root / "docs").rglob("*.md")]
    package = root / "src" / "quantline"
    gone = [
        f"{path.relative_to(root)}: {name}"
        for path in texts
        for name in PATH.findall(path.read_text(encoding="utf-8"))
        if not NOT_KEPT.search(name) and not (root / name).exists() and not (package / name).exists()
    ]
    assert gone == []


def test_the_library_depends_on_what_the_lock_of_the_core_is_made_of(root):
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = (root / "envs" / "core.in").read_text(encoding="utf-8").partition("# development")[0]
    pinned = [Requirement(line.partition(" #")[0]) for line in wanted.splitlines() if line and not line.startswith("#")]
    declared = {Requirement(line).name: Requirement(line).specifier for line in project["dependencies"]}
    assert set(declared) == {one.name for one in pinned}
    lock = dict(line.split("==") for line in (root / "envs" / "core.txt").read_text().split() if "==" in line)
    assert [name for name, allowed in declared.items() if not allowed.contains(lock[name], prereleases=True)] == []


def test_pages_of_the_site_are_plain_text_without_addresses_of_indexes_or_this_machine(root):
    menu = (root / "mkdocs.yml").read_text(encoding="utf-8")
    assert yaml.safe_load(menu)["strict"] is True
    for path in [root / "mkdocs.yml", *(root / "docs").rglob("*.md"), *(root / "envs").glob("docs.*")]:
        assert not re.search(r"https?://(?!127\.0\.0\.1|minio\.example)", path.read_text(encoding="utf-8")), path
