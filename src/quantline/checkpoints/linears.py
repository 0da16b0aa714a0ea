"""The linears of a model, from its headers: which are quantized, at how many bits and in what groups.

Every tensor with two wide dimensions is one of these (`Inventory`): a linear of a decoder layer, which is quantized; a
stack, which is a weight of a decoder layer in another form, such as all experts in one tensor; an exception by name
(embeddings, norms, routers, the output layer); or it belongs to another part, such as a vision tower. No backend
quantizes stacks, so they need a rule that leaves them float. Other parts are carried over. The output layer is quantized
on request. Rules by name make exceptions.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from quantline.checkpoints.checkpoint import Checkpoint
from quantline.checkpoints.layouts.linear_spec import LM_HEAD, LinearSpec
from quantline.checkpoints.model_config import dimensions, ties_head
from quantline.core.errors import UserError

# The smallest group of weights that shares a scale; a tensor with two dimensions of this size is worth quantizing.
WIDE = 32
# A list of layers, the number of one, and what is inside it.
_NUMBERED = re.compile(r"^(.+?)\.(\d+)\.(.+)$")
_ROUTER = re.compile(r"(?:^|\.)(?:gate|shared_expert_gate|\w*router\w*)(?:\.|$)")
_NOT_LINEAR = re.compile(rf"norm|embed|ln_|A_log|{_ROUTER.pattern}")
_FLOATS = ("BF16", "F16", "F32", "F64")
# Also masks that older models store under such a name.
_BIAS = re.compile(r"bias(?:es)?$")
_CONVOLUTION = re.compile(r"(?:^|\.)\w*conv\w*$")
_LANGUAGE = re.compile(r"(?:^|\.)(?:language_model|text_model)(?:\.|$)")
_OTHER_PART = re.compile(
    r"(?:^|[._])(?:vision|visual|image|img|audio|speech|video|projector|connector|perceiver|resampler|talker|code2wav|token2wav|mtp)"
)
_EXPERTS = re.compile(r"(.+\.experts)\.")
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")
# The stacks of GraniteMoe and JetMoe, and of what is built on them.
_STACKED_EXPERTS = re.compile(r"(.+)\.(?:input|output)_linear$")
_TABLE = re.compile(r"embed|(?:^|\.)(?:w[tp]e|lm_head|embed_out)$")


@dataclass(frozen=True)
class Inventory:
    """What the tensors of a float model with two wide dimensions are, by name without `.weight`.

    linears: (in_features, out_features) of the decoder layers' linears. stacks: shapes of the decoder layers' weights that
    are no linear of their own. others: shapes of the weights of other parts, by name of the part. strangers: of these, the
    weights in layers of a list whose name does not say that it is another part. values: of the whole model.
    """

    linears: dict[str, tuple[int, int]] = field(default_factory=dict)
    stacks: dict[str, tuple[int, ...]] = field(default_factory=dict)
    others: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    strangers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    values: int = 0

    @property
    def note(self) -> str | None:
        """What is carried over because it is not in the decoder layers, with its share; None if there is nothing."""
        if not self.others:
            return None
        parts = [f"{part} ({self._share(shapes)})" for part, shapes in self.others.items()]
        return (
            f"only the decoder layers are quantized; carried over, with their shares of the weights: {', '.join(parts)}"
        )

    def stacked(self, rules: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
        """The stacks that no rule leaves float."""
        return {name: shape for name, shape in self.stacks.items() if not _rule(name, rules).get("skip")}

    def fault(self, rules: Sequence[Mapping[str, Any]]) -> str | None:
        """What is said against stacks and strangers that no rule leaves float, with the rules that would."""
        strangers = {name: shape for name, shape in self.strangers.items() if not _rule(name, rules).get("skip")}
        if strangers:
            first, shape = next(iter(strangers.items()))
            lists = dict.fromkeys(found[0] for name in strangers if (found := numbered(name)))
            remedy = ", ".join(f'{{match: "{one}.*", skip: true}}' for one in lists)
            return (
                f"{len(strangers)} weights, {self._share(strangers)} of the model, are in layers beside the decoder's, and "
                f"no name says what part they are (first: {first}, {' x '.join(map(str, shape))}); leave them float with "
                f"'layers.rules=[{remedy}]'{' before the rules given' if rules else ''}"
            )
        stacks = self.stacked(rules)
        if not stacks:
            return None
        name, shape = next(iter(stacks.items()))
        remedy = ", ".join(f'{{match: "{rule}", skip: true}}' for rule in dict.fromkeys(map(self._matching, stacks)))
        return (
            f"{len(stacks)} weights of the decoder layers, {self._share(stacks)} of the model, are no linears of their own, "
            f"such as experts in one tensor (first: {name}, {' x '.join(map(str, shape))}), and no backend quantizes them; "
            f"leave them float with 'layers.rules=[{remedy}]'{' before the rules given' if rules else ''}, "
            "or take a model that has a tensor for each linear"
        )

    def _matching(self, stack: str) -> str:
        """The shortest rule by the end of a stack's name that matches no linear."""
        parts = stack.split(".")
        rules = (f"*.{'.'.join(parts[-count:])}" for count in range(1, len(parts)))
        return next((rule for rule in rules if not any(fnmatchcase(one, rule) for one in self.linears)), stack)

    def _share(self, shapes: Mapping[str, tuple[int, ...]]) -> str:
        return f"{100 * sum(map(math.prod, shapes.values())) / self.values:.3g} %"


def inventory(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Inventory:
    """Take stock of a float model, from its headers and its config.json."""
    shapes = {name: tuple(checkpoint.info(name).shape) for name in checkpoint.names}
    layers = _decoder_layers(shapes, config)
    linears: dict[str, tuple[int, int]] = {}
    stacks: dict[str, tuple[int, ...]] = {}
    others: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    strangers: dict[str, tuple[int, ...]] = {}
    depth = dimensions(config).layers
    for full, shape in shapes.items():
        place, name = numbered(full), full.removesuffix(".weight")
        wide = is_wide(shape)
        if place and place[:2] in layers:
            if exempt(place[2], shape):
                continue
            if len(shape) == 2 and full.endswith(".weight"):
                linears[name] = (shape[1], shape[0])
            elif wide:
                stacks[name] = shape
        elif wide and (_OTHER_PART.search(name) or not _TABLE.search(name)):
            others[_part(name, layers)][name] = shape
            strangers |= {name: shape} if is_due(full, shape, depth) else {}
    return Inventory(linears, stacks, dict(others), strangers, sum(map(math.prod, shapes.values())))


def why_not_float(checkpoint: Checkpoint) -> str | None:
    """Which weight of a model has a dtype that only a quantized one has, and what to do; None if there is none.

    transformers would take the codes of such a weight for its values.
    """
    for name in sorted(checkpoint.names):
        info = checkpoint.info(name)
        if name.endswith(".weight") and is_wide(info.shape) and info.dtype not in _FLOATS:
            return f"{name} has dtype {info.dtype}, and a float model has {', '.join(_FLOATS)}: give the float model instead"
    return None


def is_wide(shape: Sequence[int]) -> bool:
    """Whether a tensor has two wide dimensions."""
    return len(shape) > 1 and sorted(shape)[-2] >= WIDE


def linear_shapes(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(in_features, out_features) of every linear of the decoder's layers, by name without `.weight`."""
    return inventory(checkpoint, config).linears


def exempt(inside: str, shape: Sequence[int]) -> bool:
    """Whether a tensor of a layer is no weight of a linear by its name: a norm, an embedding, a router, a bias, a mask.

    With three or more dimensions, also a convolution.
    """
    name = inside.removesuffix(".weight")
    return bool(_NOT_LINEAR.search(name) or _BIAS.search(name) or (len(shape) > 2 and _CONVOLUTION.search(name)))


def routers(checkpoint: Checkpoint) -> list[str]:
    """The modules of a float model's layers that choose experts.

    vLLM 0.32 takes them for quantized where a config names what is not, and not them.
    """
    return [
        name.removesuffix(".weight") for name in checkpoint.names
        if name.endswith(".weight") and (place := numbered(name)) and _ROUTER.search(place[2].removesuffix(".weight"))
    ]  # fmt: skip


def is_due(name: str, shape: Sequence[int], depth: int | None) -> bool:
    """Whether a tensor should be quantized: two wide dimensions, in one of the first layers, and no name that excepts it.

    Such a name is that of a norm, a table or a router, or of a part that is no language model, such as a vision tower.

    depth: the number of layers in config.json.
    """
    place = numbered(name)
    if place is None or place[1] >= (depth or 0) or not is_wide(shape):
        return False
    return not (exempt(place[2], shape) or _OTHER_PART.search(name))


def numbered(name: str) -> tuple[str, int, str] | None:
    """The list that a tensor's layer is in, the layer's number, and the tensor's name inside it; None outside of layers."""
    found = _NUMBERED.search(name)
    return (found[1], int(found[2]), found[3]) if found else None


def _decoder_layers(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> set[tuple[str, int]]:
    """(list, number) of every decoder layer.

    They are in the lists with as many entries as config.json says, or else in the heaviest one, and in lists of the same
    kind of layers beside them.
    """
    sizes: dict[str, int] = defaultdict(int)
    numbers: dict[str, set[int]] = defaultdict(set)
    insides: dict[str, set[str]] = defaultdict(set)
    for name, shape in shapes.items():
        if found := numbered(name):
            sizes[found[0]] += math.prod(shape)
            numbers[found[0]].add(found[1])
            insides[found[0]].add(found[2])
    own = [one for one in sizes if not _OTHER_PART.search(one)]
    own = [one for one in own if _LANGUAGE.search(one)] or own
    depth = dimensions(config).layers
    # Layers beyond the number that config.json gives predict further tokens (DeepSeek V3), and no engine here runs them.
    chosen = [one for one in own if depth and numbers[one] >= set(range(depth))]
    if not chosen:
        chosen, depth = sorted(own, key=lambda one: sizes[one])[-1:], None
    layers = {(one, number) for one in chosen for number in numbers[one] if depth is None or number < depth}
    alike = [one for one in own if one not in chosen and any(insides[one] <= insides[other] for other in chosen)]
    return layers | {(one, number) for one in alike for number in numbers[one]}


def _part(name: str, layers: set[tuple[str, int]]) -> str:
    """The name of the part that a tensor belongs to: up to where it leaves the path to the decoder layers."""
    path, decoder = name.split("."), min(layers)[0].split(".") if layers else []
    same = 0
    while same < len(decoder) and path[same] == decoder[same]:
        same += 1
    return ".".join(path[: same + 1])


def _rule(name: str, rules: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return next((rule for rule in rules if fnmatchcase(name, rule["match"])), {})


def select_linears(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    *,
    bits: int,
    group_size: int,
    rules: Sequence[Mapping[str, Any]] = (),
    lm_head: bool = False,
) -> dict[str, LinearSpec]:
    """Which linears to quantize and how, by name in the order of the checkpoint; all others stay float.

    Args:
        checkpoint: of the float model.
        config: its config.json.
        bits, group_size: of linears that no rule matches.
        rules: mappings with `match` (a pattern of the full name, * and ? as in a shell) and `skip`, `bits` or
            `group_size`; the first one that matches counts.
        lm_head: whether the output layer is quantized too.

    Raises:
        UserError: a rule matches nothing, every linear is skipped, the output layer cannot be quantized, or a weight of
            the decoder layers is no linear, or of layers beside them, and no rule leaves it float.
    """
    stock = inventory(checkpoint, config)
    names = list(stock.linears)
    if lm_head:
        if ties_head(config) or f"{LM_HEAD}.weight" not in checkpoint.names:
            raise UserError(
                "lm_head=quantized: the model's output layer is tied to its embeddings, which stay float; give "
                "lm_head=float"
            )
        names.append(LM_HEAD)
    known = [*names, *stock.stacks, *stock.strangers]
    unmatched = [rule["match"] for rule in rules if not any(fnmatchcase(name, rule["match"]) for name in known)]
    if unmatched:
        example = names[0] if names else "no linear"
        raise UserError(
            f"layers.rules: {', '.join(unmatched)} matches no linear of this model; names look like {example}"
        )
    fault = stock.fault(rules)
    if fault:
        raise UserError(fault)
    widths = {}
    for name in names:
        rule = _rule(name, rules)
        if not rule.get("skip"):
            own_bits, own_group = rule.get("bits"), rule.get("group_size")
            widths[name] = LinearSpec(
                bits if own_bits is None else own_bits, group_size if own_group is None else own_group
            )
    if names and not widths:
        raise UserError(
            "layers.rules: every linear is skipped, so nothing would be quantized; use method=float for that"
        )
    return widths


def modules_left(left: Sequence[str], quantized: Collection[str]) -> list[str]:
    """The modules that a config must name as left in float: the linears, and the experts of a layer if none is quantized.

    vLLM 0.32 asks for the module that holds the experts, which it calls `experts`, and otherwise takes them for quantized.
    """
    experts = dict.fromkeys(one for name in left if (one := _experts_of(name)))
    return [*left, *(one for one in experts if not any(name.startswith(f"{one}.") for name in quantized))]


def _experts_of(name: str) -> str | None:
    if found := _EXPERTS.match(name):
        return found[1]
    stack = _STACKED_EXPERTS.match(name)
    return f"{stack[1]}.experts" if stack else None


def place_of(name: str) -> tuple[int, str]:
    """The decoder layer of a linear and its name inside that layer; -1 and the whole name outside the layers."""
    found = numbered(name)
    return found[1:] if found else (-1, name)


def lacking_experts(names: Collection[str]) -> list[str]:
    """Tensors that one expert of a layer lacks and others, of this layer or another, have."""
    found = [(one[1], int(one[2]), one[3]) for name in names if (one := _EXPERT.match(name))]
    experts, insides = {number for _, number, _ in found}, {inside for _, _, inside in found}
    lists, have = dict.fromkeys(layer for layer, _, _ in found), set(found)
    every = [(layer, number, inside) for layer in lists for number in sorted(experts) for inside in sorted(insides)]
    return [f"{layer}.{number}.{inside}" for layer, number, inside in every if (layer, number, inside) not in have]
