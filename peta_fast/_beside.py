"""What a merge reads beside its models: statistics of each model, and a checkpoint to begin from.

A statistics file holds, in fp32 safetensors,

    <module>.input_gram, <module>.output_gram   [n (n + 1) / 2]   of the layer whose weight is <module>.weight
    <tensor>.fisher                             of the tensor's shape
    <tensor>.fisher_gram                        [n (n + 1) / 2], n elements

and in its metadata, as JSON, what `peta_fast.fit.statistics` says of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from peta_fast.buffers import Buffer
from peta_fast.errors import CheckpointError
from peta_fast.formats import open_checkpoint
from peta_fast.formats.hub import locate
from peta_fast.formats.weight_marks import is_marked, marked, marks_in, sample
from peta_fast.methods import KINDS

OF_MODULES = ("input_gram", "output_gram")
WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class BesidePlaces:
    """Where a tensor's statistics lie, one a model: kind -> (file, name), and the tensor to begin from."""

    statistics: tuple[Mapping[str, tuple[str, str]], ...] = ()
    start: tuple[str, str] | None = None


@dataclass
class Beside:
    """The opened files beside the models, by the names that the recipe gives them.

    files  name -> source; those that the recipe names are opened when they are first asked for
    used   the keys of each file that belong to a tensor of its model
    marks  of each file: the weights that its statistics were collected from, by tensor name
    foreign  (file, model) -> tensors whose values are not those
    """

    files: dict[str, Any] = field(default_factory=dict)
    used: dict[str, set[str]] = field(default_factory=dict)
    solved: bool = False
    layouts: dict[str, frozenset[str]] = field(default_factory=dict)
    marks: dict[str, dict[str, str]] = field(default_factory=dict)
    foreign: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def source(self, name: str, *, model: bool = False):
        """The opened file; a model may be named by its hub id too."""
        if name not in self.files:
            self.files[name] = open_checkpoint(locate(name, None) if model else name)
        return self.files[name]

    def places(
        self, method: ModuleType, params, name: str, models, shape: tuple[int, ...], sources, faults: list[str]
    ) -> BesidePlaces | str:
        """Where one tensor's statistics are; why it is averaged, where there are none. What does not fit: faults.

        models   (model, tensor name there)
        sources  model -> its opened checkpoint
        """
        alternatives = method.needs(params)
        if () in alternatives:
            return BesidePlaces((), self._start(method, params, name, shape, faults))
        files = params.statistics
        names = [[self._keys(file, place[1], kinds) for file, place in zip(files, models, strict=True)]
                 for kinds in alternatives]  # fmt: skip
        for kinds, found in zip(alternatives, names, strict=True):
            have = [len(keys) == len(kinds) for keys in found]
            if all(have):
                self.solved = True
                for file, keys, (model, there) in zip(files, found, models, strict=True):
                    faults.extend(self._misfits(file, keys, shape))
                    if params.check_statistics and not self._belongs(file, there, sources[model], math.prod(shape)):
                        self.foreign.setdefault((file, str(model)), []).append(there)
                places = tuple(
                    {k: (file, key) for k, key in keys.items()} for file, keys in zip(files, found, strict=True)
                )
                return BesidePlaces(places, self._start(method, params, name, shape, faults))
            if any(have):
                lacks, has = have.index(False), have.index(True)
                missing = next(kind for kind in kinds if kind not in found[lacks])
                faults.append(f"{files[lacks]}: lacks {key_of(name, missing)!r}, which {files[has]} has")
        return f"no {' or '.join(' and '.join(kinds) for kinds in alternatives)} for it"

    def _keys(self, file: str, name: str, kinds: tuple[str, ...]) -> dict[str, str]:
        """kind -> key, for those that the file has; all the tensor's keys count as used."""
        tensors = self.source(file).tensors
        used = self.used.setdefault(file, set())
        used.update(key for key in (key_of(name, kind) for kind in KINDS) if key in tensors)
        return {kind: key for kind in kinds if (key := key_of(name, kind)) in tensors}

    def _misfits(self, file: str, keys: Mapping[str, str], shape: tuple[int, ...]) -> list[str]:
        tensors, faults = self.source(file).tensors, []
        for kind, key in keys.items():
            transposed = key.removesuffix(f".{kind}") in self.transposed(file)
            wanted = expected_shape(kind, shape, transposed)
            if tensors[key].dtype != "F32" or tuple(tensors[key].shape) != wanted:
                got = f"{tensors[key].dtype} {list(tensors[key].shape)}"
                faults.append(f"{file}: {key!r} is {got}, expected F32 {list(wanted)} for a tensor of {list(shape)}")
        return faults

    def _belongs(self, file: str, name: str, source, size: int) -> bool:
        """Whether the tensor has the values that the file's statistics were collected from, as far as it says."""
        if file not in self.marks:
            self.marks[file] = marks_in(self.metadata(file), file)
        mark = self.marks[file].get(name)
        stored = name if name in source.tensors else source.aliases.get(name)
        if mark is None or stored is None or not marked(source.tensors[stored].dtype):
            return True
        if stored in getattr(source, "changed", ()):
            return True  # by an adapter, which the network has added in roundings of its own
        return is_marked(mark, sample(source, stored, size, _host_bytes), source.tensors[stored].dtype)

    def foreigners(self) -> list[str]:
        """Statistics that were collected from other weights than those of their model, as faults."""
        faults = []
        for (file, model), names in self.foreign.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            faults.append(
                f"{file}: was collected from other weights than those of {model}: {names[0]!r}{more} differ; collect "
                "it from that model (peta-fast fit statistics), or set check_statistics: false to use it all the same"
            )
        return faults

    def metadata(self, file: str) -> Mapping[str, str]:
        return getattr(self.source(file), "metadata", {})

    def transposed(self, file: str) -> frozenset[str]:
        """The modules of a file whose weights are stored [in, out]."""
        if file not in self.layouts:
            text = self.metadata(file).get("transposed", "[]")
            try:
                self.layouts[file] = frozenset(json.loads(text))
            except (ValueError, TypeError):
                raise CheckpointError(file, f"metadata 'transposed' must be a JSON list, got {text!r}") from None
        return self.layouts[file]

    def fisher_norm(self, file: str) -> float:
        """Of all diagonal Fishers of a file together; 0 where it does not say."""
        text = self.metadata(file).get("fisher_norm", "0")
        try:
            return float(text)
        except ValueError:
            raise CheckpointError(file, f"metadata 'fisher_norm' must be a number, got {text!r}") from None

    def _start(self, method: ModuleType, params, name: str, shape, faults: list[str]) -> tuple[str, str] | None:
        file = method.start(params) if hasattr(method, "start") else None
        if file is None:
            return None
        source = self.source(file, model=True)
        stored = name if name in source.tensors else source.aliases.get(name)
        if stored is None:
            faults.append(f"{file}: lacks {name!r}, which the merge is to begin from")
        elif tuple(source.tensors[stored].shape) != tuple(shape):
            faults.append(f"{file}: {name!r} is {list(source.tensors[stored].shape)}, expected {list(shape)}")
        else:
            return file, stored
        return None

    def leftovers(self, names: Mapping[str, set[str]]) -> list[str]:
        """Keys of statistics files that belong to no tensor of their model, as faults.

        names  file -> names of all tensors of its models, tied ones too
        """
        faults = []
        for file, known in names.items():
            keys = set(self.source(file).tensors) - self.used.get(file, set())
            strange = sorted(
                key for key in keys if not any(key == key_of(n, k) for n in _owners(key) & known for k in KINDS)
            )
            if strange:
                more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
                faults.append(f"{file}: {strange[0]!r}{more} belongs to no tensor of its model")
        return faults


def _host_bytes(buffer: Buffer) -> memoryview:
    if not buffer.device:
        return buffer.as_bytes()
    from peta_fast.ops.device import device_bytes

    return memoryview(device_bytes(buffer.address, buffer.nbytes, buffer.device).cpu().numpy())


def owner_of(key: str) -> str:
    """The tensor that a statistic's key belongs to."""
    stem, _, kind = key.rpartition(".")
    return stem + WEIGHT if kind in OF_MODULES else stem


def _owners(key: str) -> set[str]:
    """The tensor names that a statistic's key may belong to."""
    stem = key.rpartition(".")[0]
    return {stem, stem + WEIGHT}


def key_of(name: str, kind: str) -> str:
    """The key of a statistic of the tensor `name`."""
    return f"{name.removesuffix(WEIGHT) if kind in OF_MODULES else name}.{kind}"


def expected_shape(kind: str, shape: tuple[int, ...], transposed: bool) -> tuple[int, ...]:
    """Of a statistic for a tensor of `shape`."""
    if kind == "fisher":
        return tuple(shape)
    out, width = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
    if transposed:
        out, width = width, out
    side = {"input_gram": width, "output_gram": out, "fisher_gram": math.prod(shape)}[kind]
    return (side * (side + 1) // 2,)
