"""A transformers model without weights, whose parts are filled from a checkpoint one at a time, and emptied again.

The parts are the input embeddings, each decoder layer, and the output layer. Everything else (norms outside the layers,
learned positions) is small and stays filled. Weights are float32, dequantized exactly. While one part computes, the next
one is read in the background.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.float_view import FloatView
from quantline.checkpoints.layouts import LAYOUTS
from quantline.checkpoints.linears import lacking_experts
from quantline.checkpoints.model_config import WITH_IMAGES
from quantline.checkpoints.safetensors_file import safetensors_dtype, to_float32
from quantline.core.errors import UserError
from quantline.toolchains.protocol import JobError
from quantline.toolchains.workers.reference.accounting import config_of, said, unaccounted
from quantline.toolchains.workers.reference.rounded_inputs import round_inputs

# The name of what is in no part.
REST = ""
_READERS = 4


def auto_class(config: Any) -> Any:
    """The class of transformers that builds the model of a config: for causal LMs, or for those that take images, too."""
    import transformers

    # By name: quantizers ask this, too, whose transformers 4 does not have the second.
    kind = "AutoModelForMultimodalLM" if config.model_type in WITH_IMAGES else "AutoModelForCausalLM"
    return getattr(transformers, kind)


def attention_of(config: Any) -> str:
    """The implementation of attention for a loaded transformers config: "sdpa", or "eager" where that is not right.

    33 of the 178 causal classes of transformers 5.19 have no SDPA (BLOOM, GPT-Neo, gpt-oss), which the class says. Where
    scores are capped (Gemma 2's `attn_logit_softcapping`), SDPA silently ignores the cap (5.19, 4.52). What a config.json
    names itself, such as flash attention, is overridden.
    """
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        return "eager"
    model_class = auto_class(config)._model_mapping.get(type(config), None)
    return "sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager"


class Skeleton:
    """The model of a checkpoint folder: eval mode, no remote code, attention as `attention_of` says.

    All-zero biases that a quantizer added to linears without a bias are dropped; a head tied to the embeddings may be
    absent. If the checkpoint also rounds activations (W8A8), the inputs of its linears are rounded as a server does it.

    Attributes:
        folder, device: as given.
        view: the checkpoint.
        model: the transformers model.
        parts: part -> its module, in the order of the model.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """Build the model and fill what is in no part.

        Raises:
            JobError: transformers does not know the architecture; the checkpoint is damaged; tensors are missing, left
                over or have another shape.
        """
        self.folder, self.device = folder, device
        try:
            self.view = FloatView.open(folder)
            shapes = {name: self.view.shape(name) for name in self.view.names}
        except UserError as error:
            raise JobError(str(error)) from error
        self.model, loaded = _build(folder, shapes, has_own_head=_has_own_head(self.view))
        self._mapping = _Mapping(self.model)
        self._targets = {name: self._mapping.target(name) for name in self.view.names}
        self._numbers = Counter(self._targets.values())
        self._zeros = self._zero_biases(self._targets)
        self._account(loaded, self._targets)
        self.parts = _parts(self.model)
        self._ties = _ties(self.model)
        self._names = {id(module): name for name, module in self.model.named_modules()}
        self._sources = self._sources_of(self._targets)
        self._bare = {part: _tensors(module) for part, module in self.parts.items()}
        self._filled: set[str] = set()
        self._ready: dict[str, dict[str, Future[Any]]] = {}
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="read weights")
        _compute_buffers(self.model, device)
        self._load(REST)
        round_inputs(self.model, self.view)

    @property
    def parameters(self) -> int:
        """The number of weights."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def filled(self) -> list[str]:
        """The parts that have their weights."""
        return sorted(self._filled)

    def parameters_of(self, part: str) -> dict[str, Any]:
        """The parameters of a part, or of the rest, by their names in the model."""
        if part == REST:
            return {name: one for name, one in self.model.named_parameters() if self.part_of(name) == REST}
        return {f"{part}.{name}": parameter for name, parameter in self.parts[part].named_parameters()}

    def homes(self, name: str) -> dict[str, str]:
        """Part -> the model's parameter there that is a checkpoint's tensor, by its name; several parts may share one.

        Empty if the model stacks the tensor with others, fuses or changes it.
        """
        target = self._targets.get(name, "")
        alone = self._numbers[target] == 1
        place = self._place(target) if alone and self._mapping.knows(target) else None
        if place is None or tuple(getattr(*place).shape) != self.view.shape(name):
            return {}
        found = [f"{self._names[id(module)]}.{attribute}" for module, attribute in self._ties.get(place, [place])]
        return {self.part_of(one): one for one in found}

    def parameter(self, name: str) -> Any:
        """A parameter of the model, by its name there."""
        return getattr(*self._place(name))

    def _place(self, name: str) -> tuple[Any, str]:
        module, _, attribute = name.rpartition(".")
        return self.model.get_submodule(module), attribute

    def part_of(self, module: str) -> str:
        """The part that a module is in, by its name; `REST` if it is in none."""
        return next((part for part in self.parts if module == part or module.startswith(f"{part}.")), REST)

    def fill(self, part: str) -> None:
        """Put the weights of a part into its module; does nothing if they are there.

        Raises:
            JobError: its tensors cannot be read.
        """
        if part not in self._filled:
            self._load(part)
            self._filled.add(part)

    def prefetch(self, part: str) -> None:
        """Read a part's weights in the background."""
        if part not in self._filled and part not in self._ready:
            self._ready[part] = {name: self._pool.submit(self._read, name) for name in self._sources[part]}

    def empty(self, part: str) -> None:
        """Free the memory of a part's weights, but for those that it shares with what is filled."""
        self._filled.discard(part)
        for module, name, bare in self._bare[part]:
            places = self._ties.get((module, name), [(module, name)])
            sharing = {self.part_of(self._names[id(owner)]) for owner, _ in places} - {part}
            if not sharing & {REST, *self._filled}:
                for owner, attribute in places:
                    setattr(owner, attribute, bare)

    def fill_all(self) -> Any:
        """Fill every part; returns the model."""
        for part in self.parts:
            self.fill(part)
        return self.model

    def _read(self, name: str) -> Any:
        # Sent as stored, which is less than in float32.
        return _to_torch(self.view.read(name)).to(self.device)

    def _load(self, part: str) -> None:
        self.prefetch(part)
        try:
            read = {name: future.result() for name, future in self._ready.pop(part).items()}
        except UserError as error:
            raise JobError(str(error)) from error
        self._mapping.load({name: read.pop(name).float() for name in list(read)}, self.device)
        for module, name, _ in self._bare[part] if part else _tensors(self.model):
            places = self._ties.get((module, name), ())
            values = [getattr(*place) for place in places if not getattr(*place).is_meta]
            for owner, attribute in places if values else ():
                setattr(owner, attribute, values[0])

    def _sources_of(self, targets: Mapping[str, str]) -> dict[str, list[str]]:
        """Part -> the checkpoint's names that it needs, those of weights that it is tied to among them."""
        homes: dict[str, set[str]] = defaultdict(set)
        for target in targets.values():
            homes[target].add(self.part_of(target))
        for places in self._ties.values():
            whole = [f"{self._names[id(module)]}.{attribute}" for module, attribute in places]
            parts = {self.part_of(name) for name in whole}
            for name in whole:
                homes[name] |= parts
        sources: dict[str, list[str]] = {part: [] for part in (REST, *self.parts)}
        for name, target in targets.items():
            if name not in self._zeros:
                for part in homes[target]:
                    sources[part].append(name)
        return sources

    def _zero_biases(self, targets: Mapping[str, str]) -> set[str]:
        """Biases of quantized linears that are all zero and that the model does not have."""
        biases = {f"{layer}.bias" for layer in self.view.quantized} & set(targets)
        unknown = {name for name in biases if not self._mapping.knows(targets[name])}
        return {name for name in unknown if not self.view.values(name).any()}

    def _account(self, loaded: Mapping[str, Any], targets: Mapping[str, str]) -> None:
        faults = unaccounted(loaded, self._zeros)
        head, embeddings = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if getattr(self.model.config.get_text_config(), "tie_word_embeddings", False) and head is not None:
            owner = {id(module): f"{name}.weight" for name, module in self.model.named_modules()}
            own = [name for name, target in targets.items() if target == owner[id(head)]]
            shared = [name for name, target in targets.items() if target == owner[id(embeddings)]]
            if own and shared and not np.array_equal(self.view.values(own[0]), self.view.values(shared[0])):
                # transformers would load the head from the file, but a server might not.
                faults.append("has a head of its own, but config.json ties it to the embeddings (tie_word_embeddings)")
        if faults:
            raise JobError(f"{self.folder}: {'; '.join(faults)}; does config.json belong to these weights?")


class _Mapping:
    """How transformers renames, stacks and fuses a checkpoint's tensors into those of a model."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self._model, self._known = model, model.state_dict()
        self._transforms = get_model_conversion_mapping(model)

    def target(self, name: str) -> str:
        """The name in the model of a checkpoint's tensor, or of the tensor that it is a part of."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings = [one for one in self._transforms if isinstance(one, WeightRenaming)]
        converters = [one for one in self._transforms if isinstance(one, WeightConverter)]
        prefix = self._model.base_model_prefix
        target, _ = rename_source_key(name, renamings, converters, prefix, self._known)
        if target not in self._known and name in self._known:
            target, _ = rename_source_key(name, [], [], prefix, self._known)
        return str(target)

    def knows(self, target: str) -> bool:
        """Whether the model has a tensor of this name."""
        return target in self._known

    def load(self, tensors: dict[str, Any], device: str) -> None:
        """Put tensors, by checkpoint name, into the model; what a stacked tensor consists of must be together."""
        import torch
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        settings = LoadStateDictConfig(
            device_map={"": device}, dtype=torch.float32, weight_mapping=self._transforms, ignore_mismatched_sizes=True
        )
        with torch.no_grad():
            convert_and_load_state_dict_in_model(self._model, tensors, settings)


def _has_own_head(view: FloatView) -> bool:
    """Whether the checkpoint has an output layer that is its own whatever its config.json says."""
    info = view.info
    return (
        info is not None and LAYOUTS[info.layout].own_head and any(name.endswith("lm_head") for name in view.quantized)
    )


def _build(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], *, has_own_head: bool = False
) -> tuple[Any, Mapping[str, Any]]:
    """The model without weights, and what transformers says about loading tensors of these shapes."""
    import torch

    config = config_of(folder)
    if has_own_head:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    try:
        attention = attention_of(config)
        with torch.device("meta"):
            bare = auto_class(config).from_config(config, trust_remote_code=False, attn_implementation=attention)
    except Exception as error:  # a value of config.json that the model does not expect raises anything
        raise JobError(
            f"{folder}: transformers cannot build the model that its config.json describes: {said(error)}"
        ) from error
    state = {name: torch.empty(shape, device="meta", dtype=torch.float32) for name, shape in shapes.items()}
    try:
        # Without a path, transformers loads the given tensors as it would load a file's, with renaming and fusing.
        model, loaded = type(bare).from_pretrained(
            None, config=bare.config, state_dict=state, dtype=torch.float32, attn_implementation=attention,
            device_map={"": "meta"}, output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        if lacking := lacking_experts(
            shapes
        ):  # transformers stacks the experts of a layer, and says only that it cannot
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise JobError(f"{folder}: no file has the tensor {lacking[0]}{more}; fetch it again") from error
        raise JobError(f"{folder}: transformers cannot build its model: {error}") from error
    return model.eval(), loaded


def _parts(model: Any) -> dict[str, Any]:
    """Input embeddings, decoder layers and output layer, by name, in the order of the model."""
    from torch.nn import ModuleList
    from transformers.modeling_layers import GradientCheckpointingLayer

    lists = [one for one in model.modules() if isinstance(one, ModuleList) and len(one)]
    layers = [layer for one in lists for layer in one if isinstance(layer, GradientCheckpointingLayer)]
    if not layers and lists:
        layers = list(max(lists, key=lambda one: len(list(one))))
    wanted = {id(one) for one in (*layers, model.get_input_embeddings(), model.get_output_embeddings())}
    parts: dict[str, Any] = {}
    for name, module in model.named_modules():
        if id(module) in wanted and not any(name.startswith(f"{outer}.") for outer in parts):
            parts[name] = module
    return parts


def _ties(model: Any) -> dict[tuple[Any, str], list[tuple[Any, str]]]:
    """(module, attribute) of each tied parameter -> all places of the same parameter."""
    places: dict[int, list[tuple[Any, str]]] = defaultdict(list)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places[id(parameter)].append((module, name))
    return {place: shared for shared in places.values() if len(shared) > 1 for place in shared}


def _tensors(module: Any) -> list[tuple[Any, str, Any]]:
    """(owner, attribute, tensor) of each parameter and each buffer of a checkpoint in a module."""
    found = []
    for owner in module.modules():
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None and name not in owner._non_persistent_buffers_set:
                found.append((owner, name, tensor))
    return found


def _compute_buffers(model: Any, device: str) -> None:
    """Compute the buffers that are in no checkpoint, such as rotary frequencies."""
    import torch

    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            if module._buffers.get(name) is not None:
                module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        # A module may compute the buffers of those inside it (Falcon-H1), so none counts as done.
        module._is_hf_initialized = False
    model.initialize_weights()
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            if module._buffers.get(name) is not None:
                module._buffers[name] = module._buffers[name].to(device)


def _to_torch(array: NDArray[Any]) -> Any:
    """A tensor with a copy of an array's values, as stored or in float32."""
    import torch

    if safetensors_dtype(array.dtype) == "BF16":  # a dtype that torch does not read from NumPy
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    if array.dtype == np.float16:
        return torch.from_numpy(array.copy())
    return torch.from_numpy(np.require(to_float32(array), requirements=["C", "W"]))
