"""Makes native models: from the files of a checkpoint, from a config, or without memory.

Parameters are replaced one at a time, so a model is never held twice.
"""

import contextlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dkv.models.folder import CONFIG, read_tensors, some
from dkv.models.native import NATIVE, NativeModel, config_from, initialise


def empty(family: ModuleType, fields: dict[str, Any], owner: str = "config") -> NativeModel:
    """A model without memory, on the meta device, for `set_parameter`.

    Args:
        family: a module in `dkv.models.FAMILIES`.
        fields: of a config.json.
        owner: named by errors about them.
    """
    family.read_model_config(SimpleNamespace(**fields), owner)  # its errors are clearer than transformers'
    native = NATIVE[family]
    with torch.device("meta"):
        model = native(config_from(owner, native.config_class, fields))
    model.tie_weights()
    return model


def set_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replaces a parameter by a tensor; after the last one, call `model.tie_weights`."""
    module, _, name = name.rpartition(".")
    setattr(model.get_submodule(module), name, nn.Parameter(tensor))


def random(
    family: ModuleType, fields: dict[str, Any], *, seed: int, dtype: torch.dtype | None, device: torch.device
) -> NativeModel:
    """A model with random weights: matrices are normal with standard deviation 0.02, biases 0, norms 1."""
    model, generator = empty(family, fields), torch.Generator(device).manual_seed(seed)
    for name, parameter in list(model.named_parameters()):
        tensor = torch.empty(parameter.shape, dtype=dtype, device=device)
        set_parameter(model, name, initialise(tensor, is_bias=name.endswith("bias"), generator=generator))
    model.tie_weights()
    return model.eval()


def load(
    family: ModuleType,
    folder: Path,
    fields: dict[str, Any],
    owner: str,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
) -> NativeModel:
    """A model with the weights of a folder: every tensor is read once, straight to its device and dtype.

    Args:
        family: a module in `dkv.models.FAMILIES`.
        fields, owner: what `dkv.models.folder.read_config` returned for the folder.
        dtype: None: that of the first tensor.
    """
    layout, model_config = family.LAYOUT, family.read_model_config(SimpleNamespace(**fields), owner)
    stored = read_tensors(folder)
    if model_config.layers > len(stored):  # building that many could take for ever
        raise ValueError(
            f"{owner}: {layout.layers_field} is {model_config.layers}, but the weights have {len(stored)} tensors only."
        )
    model = empty(family, fields, owner)
    model.set_source(folder)
    embedding, head = f"{layout.embed}.weight", f"{layout.head}.weight"
    # some files of tied models hold the head too
    unused = {head} & stored.keys() if model_config.tied else set()
    _check_tensors(folder, stored, {name: tuple(p.shape) for name, p in model.named_parameters()}, unused)
    if unused and not _are_equal(stored, embedding, head):
        raise ValueError(
            f"{owner}: {layout.tied_field} is true, but {head} in {stored[head].file.name} is not the embedding."
        )
    for file in sorted({tensor.file for tensor in stored.values()}):
        with _opened(file, str(device)) as tensors:
            for name in sorted(set(tensors.keys()) - unused):
                tensor = tensors.get_tensor(name)
                dtype = dtype or tensor.dtype
                set_parameter(model, name, tensor.to(dtype))
    model.tie_weights()
    return model.eval()


def _check_tensors(folder, stored, expected, unused):
    """Raises ValueError unless the files hold the expected tensors (name -> shape) and, at most, the unused ones."""
    problems = {
        "missing": sorted(expected.keys() - stored.keys()),
        "unexpected": sorted(stored.keys() - expected.keys() - unused),
        "wrongly shaped": [
            f"{name} {stored[name].shape} instead of {shape}"
            for name, shape in expected.items()
            if name in stored and stored[name].shape != shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {some(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"the weights in {folder} do not fit its {CONFIG}; {listed}.")


@contextlib.contextmanager
def _opened(file, device="cpu"):
    """`safe_open`, but its errors name the file."""
    try:
        with safe_open(file, framework="pt", device=device) as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file}: {error}.") from error


def _are_equal(stored, *names):
    """Whether two stored tensors (rows, columns) are equal; reads them in pieces of 64 MiB."""
    first, second = (stored[name] for name in names)
    if first.shape != second.shape:
        return False
    with _opened(first.file) as a, _opened(second.file) as b:
        a, b = (file.get_slice(name) for file, name in zip((a, b), names, strict=True))
        rows, columns = first.shape
        step = max(1, 2**26 // (8 * columns))
        return all(torch.equal(a[i : i + step].double(), b[i : i + step].double()) for i in range(0, rows, step))
