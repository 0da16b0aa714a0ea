"""Sorts the tensors of a msModelSlim folder into quantized linears, tensors to copy, tensors to drop, and faults.

Names, headers and the description decide (see `msmodelslim.files`); only biases of norms are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quantline.checkpoints.errors import FormatError
from quantline.checkpoints.layouts.folder import FolderContents, FolderFault, FolderLinear
from quantline.checkpoints.layouts.msmodelslim.codec import geometry
from quantline.checkpoints.safetensors_file import SafetensorsFile, TensorInfo, to_float32

SAFE_TENSOR, ASCEND_V1, V1 = "safe_tensor", "ascendV1", "v1"
SCHEMES = {"W4A16": 4, "W8A16": 8}
FLOAT = "FLOAT"
# Layout of each save mode; linears with two codes per byte have that of ascendV1.
NAMES = {SAFE_TENSOR: "msmodelslim", ASCEND_V1: "msmodelslim_ascend_v1", V1: "msmodelslim_v1"}
PACKED = NAMES[ASCEND_V1]

_PARTNERS = ("weight_scale", "weight_offset")
SUFFIXES = ("weight", "bias", *_PARTNERS)
_AGAIN = "save the model again"
_DROPPED = "a copy or a zero bias that anti-outlier m3 adds to norms"


@dataclass(eq=False)
class Planner:
    """One pass over the tensors of a folder; faults are collected, not raised."""

    folder: Path
    variant: str
    description: str
    files: Mapping[str, str]
    infos: Mapping[str, TensorInfo]
    schemes: Mapping[str, Any]
    faults: list[FolderFault] = field(default_factory=list)
    layers: dict[str, FolderLinear] = field(default_factory=dict)
    carried: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)  # modules with a fault, which is reported once

    def plan(self) -> FolderContents:
        """Decide about every tensor."""
        names = sorted(self.files)
        for name in names:
            module, _, suffix = name.rpartition(".")
            if suffix in ("weight", *_PARTNERS):
                self._linear(module)
        used = {name for layer in self.layers.values() for name in layer.tensors.values()}
        for name in names:
            if name not in used and name.rpartition(".")[0] not in self.refused:
                self._keep(name)
        self._described_only()
        floats = [
            name.removesuffix(".weight")
            for name in sorted(self.carried)
            if name.endswith(".weight") and len(self.infos[self.carried[name]].shape) == 2
        ]
        return FolderContents(
            folder=self.folder,
            layout=NAMES[self.variant],
            variant=self.variant,
            description=self.description,
            files=self.files,
            infos=self.infos,
            layers=self.layers,
            carried=dict(sorted(self.carried.items())),
            dropped=dict.fromkeys(self.dropped, _DROPPED),
            float_linears=tuple(name for name in floats if "embed" not in name and not name.endswith("wte")),
            refusals=tuple(self.faults),
        )

    def _linear(self, module: str) -> None:
        """Decide whether a module is a quantized linear, and record its fault if it cannot be read."""
        if module in self.layers or module in self.refused:
            return
        names = {suffix: f"{module}.{suffix}" for suffix in ("weight", *_PARTNERS)}
        weight = self.infos.get(names["weight"])
        present = [suffix for suffix in names if names[suffix] in self.infos]
        scheme = self.schemes.get(names["weight"])
        integer = weight is not None and weight.dtype in ("I8", "U8") and len(weight.shape) == 2
        # m3 gives the vectors of wrapped norms the scheme of the model, but they are float.
        vector = weight is not None and len(weight.shape) == 1
        if not integer and present == ["weight"] and (vector or scheme in (None, FLOAT)):
            return
        missing = [names[suffix] for suffix in names if suffix not in present]
        if weight is not None and not integer:
            fact = f"is described as {scheme!r} but stored as {weight.dtype} {weight.shape}"
            found: FolderFault | FolderLinear = FolderFault(names["weight"], fact, _AGAIN)
        elif missing and integer and scheme not in (*SCHEMES, FLOAT, None):
            found = _unknown(names["weight"], scheme)
        elif weight is None or missing:
            found = FolderFault(
                module, f"is quantized, but lacks {', '.join(missing)}", "fetch all tensors, or " + _AGAIN
            )
        else:
            found = self._quantized(module, names, weight)
        if isinstance(found, FolderFault):
            self.refused.add(module)
            self.faults.append(found)
        else:
            self.layers[module] = found

    def _quantized(self, module: str, names: Mapping[str, str], weight: TensorInfo) -> FolderFault | FolderLinear:
        """An int8 matrix with both partners."""
        scale, offset = (self.infos[names[suffix]] for suffix in _PARTNERS)
        described = [self.schemes[name] for name in names.values() if name in self.schemes]
        schemes = described or [self.schemes.get("model_quant_type")]
        scheme = next((other for other in schemes if other not in [*SCHEMES]), schemes[0])
        if not isinstance(scheme, str) or scheme not in SCHEMES:
            return _unknown(names["weight"], scheme)
        if any(other != scheme for other in schemes):
            return FolderFault(
                names["weight"], f"and its partners are described as {schemes}", "correct the description"
            )
        if scale.shape != offset.shape or {scale.dtype, offset.dtype} - {"F16", "BF16", "F32"} or weight.dtype != "I8":
            fact = ", ".join(f"{names[s]} is {self.infos[names[s]].dtype} {self.infos[names[s]].shape}" for s in names)
            return FolderFault(module, fact + "; expected int8 and two equal float shapes", _AGAIN)
        bits = SCHEMES[scheme]
        try:
            shape = geometry(weight.shape, scale.shape, bits == 4 and self.variant == ASCEND_V1)
        except FormatError as error:
            return FolderFault(names["weight"], str(error), _AGAIN)
        if shape.packed and bits != 4:
            return FolderFault(
                names["weight"], f"has two codes per byte, but is described as {scheme}", "correct the description"
            )
        if shape.packed and not described:
            fact = "has two codes per byte, but the description does not name it"
            return FolderFault(names["weight"], fact, f"add it to {self.description}")
        return FolderLinear(
            PACKED if shape.packed else NAMES[SAFE_TENSOR], bits, shape.group_size, shape.out_features, shape.in_features,
            dict(names),
        )  # fmt: skip

    def _keep(self, name: str) -> None:
        """Copy a tensor outside the quantized linears, drop it as a duplicate, or record a fault."""
        module, _, suffix = name.rpartition(".")
        outer = module.removesuffix(".module")
        if outer != module and self._is_vector(f"{module}.weight") and f"{outer}.weight" in self.infos:
            if suffix == "weight":
                self.carried[f"{outer}.weight"] = name
                self.dropped.append(f"{outer}.weight")
            elif suffix == "bias":
                self._norm_bias(name)
            else:
                self.carried[name] = name
            return
        if suffix == "weight" and f"{module}.module.weight" in self.infos and self._is_vector(name):
            return  # taken from X.module.weight
        if suffix == "bias" and self._is_vector(f"{module}.weight"):
            self._norm_bias(name)
            return
        scheme = self.schemes.get(name, FLOAT)
        if scheme != FLOAT and (scheme not in SCHEMES or self.infos[name].dtype in ("I8", "U8")):
            self.refused.add(module)
            self.faults.append(_unknown(name, scheme))
            return
        self.carried[name] = name

    def _is_vector(self, name: str) -> bool:
        return name in self.infos and len(self.infos[name].shape) == 1

    def _norm_bias(self, name: str) -> None:
        values = to_float32(SafetensorsFile(self.folder / self.files[name], self.infos).read(name))
        if values.any():
            largest = float(np.abs(values).max())
            fact = f"is the bias of a norm and not zero (largest magnitude {largest:.3g}), which an RMSNorm cannot load"
            remedy = "quantize without the anti-outlier method that made it (m3 leaves zeros)"
            self.faults.append(FolderFault(name, fact, remedy))
        else:
            self.dropped.append(name)

    def _described_only(self) -> None:
        """Record faults of tensors that are in the description but in no file."""
        for name, scheme in self.schemes.items():
            module, _, suffix = name.rpartition(".")
            if name in self.infos or not module or suffix not in SUFFIXES:
                continue
            if module in self.refused or not isinstance(scheme, str):
                continue  # its module has a fault already, or this is not a tensor
            if suffix in _PARTNERS and module in self.layers:
                continue
            copied = module.removesuffix(".module")
            if copied != module and f"{copied}.{suffix}" in self.infos:
                continue  # ascendV1 leaves out the second copies of norms
            if name == "lm_head.weight" and any("embed_tokens.weight" in other for other in self.infos):
                continue  # tied to the embeddings
            if suffix == "bias" and self._is_vector(f"{module}.weight"):
                continue  # a zero bias that m3 would have added to a norm
            fact = f"is described as {scheme} in {self.description}, but is in no weights file"
            self.faults.append(FolderFault(name, fact, "fetch all weights files, or " + _AGAIN))


def _unknown(tensor: str, scheme: Any) -> FolderFault:
    supported = f"supported are {', '.join(SCHEMES)} and {FLOAT}"
    return FolderFault(
        tensor, f"has the scheme {scheme!r}; {supported}", "quantize it with one of them, or leave it in float"
    )
