"""States as flat tensors and as files: a long prefix is read once and continued often, in less memory if wanted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hqlt.files import write_tensors
from hqlt.layers.state import MemoryState, ModelState, part_dtype

if TYPE_CHECKING:
    from hqlt.models.language_model import SequenceModel

STORAGES = ("exact", "bfloat16", "int8")
# The two memories; the gates and the convolution's inputs beside them are small and stay exact.
MEMORIES = ("fast_weight", "key", "value")
FORMAT = {"format": "hqlt state", "version": "1"}
SCALE, LIKE = ".scale", ".like"


def pack_state(state: ModelState, storage: str = "exact") -> dict[str, Tensor]:
    r"""A state as named tensors that share nothing with it but memory.

    Args:
        state: what it tracks is left out.
        storage: of the two memories. ``exact``; ``bfloat16`` rounds to 8 bits of precision; ``int8`` keeps
            :math:`\mathrm{round}(127\,x / \max|x|)` and the maximum of each row over the last axis: of a key, a value,
            or what the fast weight holds for one key dimension.

    Returns:
        tensors ``LAYER.PART``, for :func:`unpack_state`.

    Raises:
        ValueError: an unknown storage, or int8 of values that are not finite.
    """
    if storage not in STORAGES:
        raise ValueError(f"storage={storage!r} is unknown; choose one of {', '.join(STORAGES)}")
    tensors = {}
    for n, layer in enumerate(state.layers):
        for part, x in layer.tensors().items():
            name = f"{n}.{part}"
            if storage == "exact" or part not in MEMORIES:
                tensors[name] = x
                continue
            tensors[name + LIKE] = x.new_empty(0)
            if storage == "bfloat16":
                tensors[name] = x.bfloat16()
            else:
                tensors[name], tensors[name + SCALE] = _to_int8(x, name)
    return tensors


def _to_int8(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name} holds values that are not finite; int8 cannot store them")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = wide.abs().amax(-1, keepdim=True) / 127
    codes = (wide / scale.clamp(min=torch.finfo(scale.dtype).tiny)).round().to(torch.int8)
    return codes, scale.float()


def unpack_state(tensors: dict[str, Tensor]) -> ModelState:
    """The state that :func:`pack_state` packed, in its dtypes.

    Raises:
        ValueError: tensors that are missing or unknown.
    """
    layers: dict[int, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        layer, _, part = name.partition(".")
        if part.endswith((SCALE, LIKE)):
            if name.removesuffix(SCALE).removesuffix(LIKE) not in tensors:
                raise ValueError(f"{name!r} belongs to no part of a state")
            continue
        if not layer.isdecimal() or part not in MemoryState.__dataclass_fields__ or part == "history":
            raise ValueError(f"{name!r} is no part of a state")
        like, scale = tensors.get(name + LIKE), tensors.get(name + SCALE)
        if x.dtype == torch.int8 and (like is None or scale is None):
            raise ValueError(f"{name!r} is stored as int8 but its scale or its dtype is missing")
        if like is not None:
            x = x.to(like.dtype) if scale is None else (x * scale).to(like.dtype)
        layers.setdefault(int(layer), {})[part] = x
    if sorted(layers) != list(range(len(layers))) or not layers:
        raise ValueError(f"a state has layers 0, 1, …; these are {sorted(layers)}")
    if any({"position", "held"} - set(parts) for parts in layers.values()):
        raise ValueError("a layer of the state has no position; the tensors are not those of pack_state")
    return ModelState(tuple(MemoryState(history=None, **layers[n]) for n in range(len(layers))))


def save_state(state: ModelState, path: Path | str, storage: str = "exact") -> None:
    """Write a state to a safetensors file that is whole or absent; ``storage`` as for :func:`pack_state`."""
    save_tensors(pack_state(state, storage), path, {**FORMAT, "storage": storage})


def save_tensors(tensors: dict[str, Tensor], path: Path | str, metadata: dict[str, str]) -> None:
    """Write tensors, some of which may share memory, to a safetensors file that is whole or absent."""
    own = {name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
    write_tensors(Path(path), own, metadata)


def read_notes(path: Path | str) -> dict[str, str]:
    """The metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def load_tensors(path: Path | str, metadata: dict[str, str]) -> dict[str, Tensor]:
    """The tensors of a file with this metadata.

    Raises:
        FileNotFoundError: no file.
        ValueError: a truncated or foreign file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {metadata['format']} at {path}")
    try:
        with safe_open(path, "pt") as file:
            found = file.metadata() or {}
            if {name: found.get(name) for name in metadata} != metadata:
                raise ValueError(f"{path} is not a {metadata['format']} that this version has written")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"the {metadata['format']} in {path} is damaged: {error}") from error


def load_state(path: Path | str, model: SequenceModel | None = None) -> ModelState:
    """The state that :func:`save_state` wrote.

    Args:
        path: the file.
        model: that is to continue it: the sizes of the state are checked against it, and it gets its dtype and device.

    Raises:
        FileNotFoundError: no file.
        ValueError: a truncated or foreign file, or a state of a model of other sizes.
    """
    state = unpack_state(load_tensors(path, FORMAT))
    if model is None:
        return state
    return fitted(state, model, f"the state in {path}")


def fitted(state: ModelState, model: SequenceModel, what: str) -> ModelState:
    """The state on the device and in the dtype of a model.

    Raises:
        ValueError: it is that of a model of other sizes; ``what`` names it.
    """
    try:
        model.check_state(state)
    except ValueError as error:
        raise ValueError(f"{what} does not fit the model: {error}") from error
    weight = model.norm.weight

    def fit(name: str, x: Tensor) -> Tensor:
        if name in ("position", "held"):
            return x
        return x.to(weight.device, part_dtype(name, weight.dtype))

    return ModelState(
        tuple(MemoryState(history=None, **{n: fit(n, x) for n, x in layer.tensors().items()}) for layer in state.layers)
    )
