"""Every method x backend x bits x format on the demo model: `python -m benchmarks.methods [--only PATTERN] [--json FILE]`.

On any other model: `python -m benchmarks.methods --model FOLDER [--group-size 64] [NAME=VALUE ...]`, with options of the
stages for all rows, such as `evaluate=wikitext2 evaluate.path=FILE`.

The rows come from src/quantline/quantization/capabilities.yaml. Each variant runs through the stages manually (quantize,
convert, serve_smoke, evaluate; tracking off), each in its own process, one after the other. A variant that was measured
before is read from scratch/ unless --again is given. It prints a Markdown table:

ppl change   of the reference engine's perplexity against the float model on the same documents, with the 95 % interval of
             the paired bootstrap
seconds      of the whole quantize stage, including the start of interpreters
memory       the largest process of that stage, resident
bits/weight  of the whole model, with scales, head and embeddings: the size against that of the float model at 16
size         of the weight files; the float model's is in the first line
served       by the local vLLM: the change of its perplexity, or no
H200         whether a rule says that vLLM does not serve it on a GPU of compute capability 9.0
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

GROUP = {"bnb": "64"}  # bitsandbytes' own default for a block
SCHEMES = {
    "fp8": ("dynamic", "static", "block"), "fp4": ("nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16"),
    "mxfp8": ("mxfp8", "mxfp8a16"),
}  # fmt: skip
# Of llama.cpp's mixtures those that are used most, by the bits of most of their linears.
MIXTURES = {
    8: ("Q8_0",), 6: ("Q6_K",), 5: ("Q5_K_M",), 4: ("Q4_K_M", "Q4_0", "IQ4_XS"), 3: ("Q3_K_M", "IQ3_S"),
    2: ("Q2_K", "IQ2_M"),
}  # fmt: skip
STAGES = ("quantize", "convert", "serve_smoke", "evaluate")


@dataclass(frozen=True)
class Variant:
    """A row: its name and the overrides that make it."""

    name: str
    method: str
    backend: str
    bits: str
    overrides: tuple[str, ...]


def variants(group: str = "128") -> Iterator[Variant]:
    """The variants that capabilities.yaml allows, at the default options. group: weights that share a scale."""
    import yaml

    from quantline.quantization import capabilities

    for backend, entry in capabilities.table().items():
        for method, able in entry["methods"].items():
            defaults = yaml.safe_load((ROOT / "conf" / "method" / f"{method}.yaml").read_text(encoding="utf-8"))
            needed = tuple(
                f"method.{key}={str(allowed[0]).lower()}"
                for key, allowed in able.get("options", {}).items() if defaults.get(key) not in allowed
            )  # fmt: skip
            for bits in able["bits"]:
                for label, extra in _flavours(method, bits, able):
                    name = "-".join(["bench", method, backend, f"w{bits}", *([label] if label else [])]).replace(
                        "_", "-"
                    )
                    size = GROUP.get(method, group if 128 in able.get("group_size", [128]) else "-1")
                    overrides = (
                        f"method={method}",
                        f"backend={backend}",
                        f"bits={bits}",
                        f"group_size={size}",
                        *needed,
                        *extra,
                    )
                    yield Variant(name, method, backend, f"{bits} {label}".strip(), overrides)


def _flavours(method: str, bits: int, able: dict[str, Any]) -> list[tuple[str, tuple[str, ...]]]:
    if method == "bnb" and bits == 4:
        return [(kind, (f"method.quant_type={kind}",)) for kind in ("nf4", "fp4")]
    if schemes := SCHEMES.get(method):
        return [(kind, (f"method.scheme={kind}",)) for kind in schemes]
    if method == "gguf":
        return [(kind, (f"method.type={kind}",)) for kind in MIXTURES[bits]]
    flavours: list[tuple[str, tuple[str, ...]]] = [("", ())]
    rounded = able.get("options", {}).get("activation_bits", [None])
    if 8 in rounded and bits in (4, 8):
        flavours.append(("a8", ("method.activation_bits=8", *(("group_size=-1",) if bits == 8 else ()))))
    if "fp8" in rounded and bits == 4:
        flavours.append(("afp8", ("method.activation_bits=fp8",)))
    if method == "gptq" and "solver" not in able["options"]:
        flavours += [(kind, (f"method.solver={kind}",)) for kind in ("gptaq", "foem")]
    if method == "rtn" and "grid" not in able["options"]:
        flavours.append(("mse", ("method.grid=mse",)))
    return flavours


def stage(name: str, *overrides: str) -> None:
    """Run one stage manually."""
    # If an option is given twice, the later value is used.
    given = dict(override.partition("=")[::2] for override in overrides)
    command = [sys.executable, "-m", f"stages.{name}", "tracking.enabled=false"]
    command += [f"{key}={value}" for key, value in given.items()]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"{name} failed")


def result(variant: str, name: str) -> dict[str, Any]:
    """A stage's result."""
    found: dict[str, Any] = json.loads((ROOT / "scratch" / variant / f"{name}.json").read_text(encoding="utf-8"))
    return found


def baseline_of(model: Path | None) -> str | None:
    """The folder in scratch/ of a float model that was evaluated; None if it was not. model: None for the demo's."""
    folders = [path.parent for path in ROOT.glob("scratch/float/*/evaluate.json")]
    for folder in folders:
        path = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]["model"]["path"]
        if (path == str(model)) if model is not None else folder.name.startswith("demo-"):
            return folder.relative_to(ROOT / "scratch").as_posix()
    return None


def measured(variant: Variant) -> bool:
    return all((ROOT / "scratch" / variant.name / f"{name}.json").is_file() for name in STAGES)


def row(variant: Variant, float_vllm: float) -> dict[str, Any]:
    """The measurements of a variant."""
    quantize, serve, evaluate = (result(variant.name, name) for name in ("quantize", "serve_smoke", "evaluate"))
    metrics = evaluate["metrics"]
    percent = [100 * math.expm1(metrics[f"nll_difference{end}"]) for end in ("", "_low", "_high")]
    served = metrics.get("vllm_perplexity")
    return {
        "method": variant.method, "backend": variant.backend, "bits": variant.bits,
        "ppl_change_percent": percent, "seconds": quantize["timings"]["total_seconds"],
        "memory_bytes": quantize["peak_memory_bytes"], "size_bytes": metrics["size_bytes"],
        "compression": metrics["compression_ratio"],
        "gpu": gpu_rule(variant.name),
        "served_change_percent": None if served is None else 100 * (served / float_vllm - 1),
        "reason": serve["reason"],
    }  # fmt: skip


def gpu_rule(name: str) -> str:
    """The rule against serving a variant on a GPU of compute capability 9.0; empty if there is none."""
    from quantline.serving.rules import Target, checkpoint_facts, verdict

    target = Target("vllm", locked_vllm(), "cuda", "float16", compute_capability=90)
    return verdict(target, checkpoint_facts(ROOT / "scratch" / name / "convert")).rule_id


def locked_vllm() -> str:
    """The version of vLLM in the lock for GPUs."""
    from quantline.toolchains.environments import locked_version

    return locked_version(ROOT, "vllm", "cuda")


def table(rows: list[dict[str, Any]], float_bytes: float) -> str:
    """Markdown."""
    lines = [
        "| method | backend | bits | ppl change, 95 % interval | seconds | memory | bits/weight | size | served | H200 |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | --- | --- |",
        f"| float | - | 16 | - | - | - | 16 | {float_bytes / 1e6:.1f} MB | yes | yes |",
    ]
    for one in rows:
        start = f"| {one['method']} | {one['backend']} | {one['bits']} |"
        if "failed" in one:
            lines.append(f"{start} failed: {one['failed']} | | | | | | |")
            continue
        change, low, high = one["ppl_change_percent"]
        served = one["served_change_percent"]
        told = "no" if served is None else f"{served:+.2f} %"
        lines.append(
            f"{start} {change:+.2f} % [{low:+.2f}, {high:+.2f}] | {one['seconds']:.0f} | "
            f"{one['memory_bytes'] / 2**30:.1f} GiB | {16 * one['size_bytes'] / float_bytes:.2f} | "
            f"{one['size_bytes'] / 1e6:.1f} MB | {told} | {one['gpu'] or 'yes'} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", help="pattern of names, such as *gptqmodel*")
    parser.add_argument("--again", action="store_true", help="measure variants again that were measured before")
    parser.add_argument("--measured", action="store_true", help="only show earlier measurements")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--model", type=Path, help="folder of another model than the demo's")
    parser.add_argument("--group-size", default="128", help="weights that share a scale, where the backend has groups")
    options, more = parser.parse_known_args()
    if wrong := [word for word in more if "=" not in word or word.startswith("-")]:
        parser.error(f"{' '.join(wrong)}: give options of the stages as NAME=VALUE")
    model = None if options.model is None else options.model.resolve()
    of_all = [] if model is None else ["model=custom", f"model.path={model}"]
    of_all += more
    chosen = [variant for variant in variants(options.group_size) if fnmatch(variant.name, f"*{options.only}*")]
    if model is not None:
        chosen = [replace(variant, name=f"{variant.name}-{model.name.lower()}") for variant in chosen]
    if options.measured:
        chosen = [variant for variant in chosen if measured(variant)]
    # The usual bits first, so that the table is useful before it is complete.
    chosen.sort(key=lambda variant: (variant.method == "autoround", "482356".index(variant.bits[0])))
    if options.again or baseline_of(model) is None:
        for name, overrides in (("download", ()), ("serve_smoke", ("method=float",)), ("evaluate", ("method=float",))):
            stage(name, *of_all, *overrides)
    if not options.measured:
        stage("calibrate", f"group_size={options.group_size}", *of_all)
    rows: list[dict[str, Any]] = []
    baseline = result(str(baseline_of(model)), "evaluate")["metrics"]
    for number, variant in enumerate(chosen, 1):
        print(f"{number}/{len(chosen)} {variant.name}", file=sys.stderr, flush=True)
        try:
            if options.again or not measured(variant):
                for name in STAGES:
                    stage(name, *of_all, f"variant={variant.name}", *variant.overrides)
            rows.append(row(variant, baseline["vllm_perplexity"]))
        except RuntimeError as error:
            rows.append(
                {"method": variant.method, "backend": variant.backend, "bits": variant.bits, "failed": str(error)}
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    rows.sort(key=lambda one: (one["method"], one["backend"], one["bits"]))
    print(table(rows, baseline["size_bytes"]))


if __name__ == "__main__":
    main()
