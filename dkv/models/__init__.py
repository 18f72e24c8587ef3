"""The models that dkv runs: finds their parts by structure, and loads native ones from official checkpoints."""

import os
import re
from pathlib import Path
from reprlib import repr as shown
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from dkv.kernels.checks import FLOAT_DTYPES
from dkv.models.dream import Dream
from dkv.models.folder import read_config
from dkv.models.llada import LLaDA
from dkv.models.native import NativeModel
from dkv.models.view import ModelView

__all__ = ["Dream", "LLaDA", "NativeModel", "from_config", "from_pretrained", "view_of"]

NATIVE: tuple[type[NativeModel], ...] = (LLaDA, Dream)


def view_of(model: nn.Module) -> ModelView:
    """The `ModelView` of a supported model; ValueError naming the class of any other."""
    check_not_wrapped(model)
    for native in NATIVE:
        view = native.find(model)
        if view is not None:
            _check_not_offloaded(model, view)
            return view
    name = type(getattr(model, "_orig_mod", model)).__name__
    raise ValueError(
        f"{name} is not supported: dkv runs LLaDA (LLaDA-8B, LLaDA-1.5) and Dream (Dream-v0, "
        "Dream-Coder, DiffuCoder), native or of Hugging Face's remote code, and finetunes of the same module structure."
    )


def check_not_wrapped(model: nn.Module) -> None:
    """Raises ValueError for wrappers other than torch.compile's (DataParallel, PEFT): dkv would skip what they add."""
    for attribute, inner in (("get_base_model", "model.get_base_model()"), ("module", "model.module")):
        if hasattr(model, attribute):
            raise ValueError(f"{type(model).__name__} wraps the model that dkv runs: pass {inner}.")


def _check_not_offloaded(model, view):
    outer = (view.embed, view.final_norm, view.head)
    # a hook of accelerate that moves the whole model when it is called
    moved = hasattr(model.__dict__.get("_hf_hook"), "prev_module_hook")
    if moved or any(p.is_meta for module in outer if module is not None for p in module.parameters()):
        raise ValueError(
            f"{type(model).__name__} is offloaded: dkv needs all weights on the one device that it computes on; load "
            "the model without offloading and without a device_map."
        )


def from_pretrained(
    path_or_repo: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
) -> NativeModel:
    """Loads a LLaDA or Dream of the official checkpoint layout, without remote code.

    Reads config.json (generation_config.json for end, pad and mask tokens that it lacks) and the safetensors, one
    tensor at a time straight to its device and dtype, so the weights are never held twice. The configs and the headers
    are checked before anything is built from them.

    Args:
        path_or_repo: a folder, or a repository of the Hugging Face hub such as "GSAI-ML/LLaDA-8B-Instruct".
        dtype: a floating torch.dtype or its name. None: the torch_dtype of config.json, otherwise the file's.
        device: None: "cuda" if there is one, otherwise "cpu".

    Returns:
        An nn.Module in eval mode whose modules have the official names; `model(input_ids).logits`. Its parameters
        require grad, so it can be trained.

    Raises:
        ValueError: no such folder, a malformed file in it, an unsupported model, weights that do not fit the config, or
            an invalid dtype or device.

    Example:
        >>> model = dkv.from_pretrained("GSAI-ML/LLaDA-8B-Instruct", dtype="bfloat16")
        >>> output = dkv.generate(model, input_ids, gen_length=128)
        >>> model.save_pretrained("copy")
    """
    folder = _folder(path_or_repo)
    config, owner = read_config(folder)
    native = _native_class(config, owner)
    dtype = _dtype("dtype", dtype)
    for field in ("torch_dtype", "dtype"):
        dtype = dtype or _dtype(f"{owner}: {field}", getattr(config, field, None))
    return native.load(folder, config, owner, dtype=dtype, device=_device(device))


def from_config(
    config: dict[str, Any] | SimpleNamespace,
    *,
    seed: int = 0,
    dtype: torch.dtype | str | None = torch.float32,
    device: torch.device | str | int | None = None,
) -> NativeModel:
    """A randomly initialised model, made on its device in its dtype: for tests, benchmarks and training from scratch.

    Args:
        config: a dict or namespace with the fields of an official config.json.
        seed: of the weights, which are normal with standard deviation 0.02; norms are 1, biases 0.
        dtype: a floating torch.dtype or its name. None: PyTorch's default.
        device: as in `from_pretrained`.

    Raises:
        ValueError: an unsupported model, a missing or invalid field, or an invalid dtype or device.
    """
    fields = config if isinstance(config, dict) else getattr(config, "__dict__", None)
    if fields is None or not all(isinstance(name, str) for name in fields):
        raise ValueError(f"config must be a dict or namespace of the fields of a config.json, got {shown(config)}.")
    config = SimpleNamespace(**fields)
    native = _native_class(config, "config")
    return native.random(config, seed=seed, dtype=_dtype("dtype", dtype), device=_device(device))


def _folder(path_or_repo):
    path = Path(path_or_repo)
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*/[\w.-]+", str(path_or_repo)):
        raise ValueError(f"{str(path_or_repo)!r} is neither a folder nor a repository of the hub, 'owner/name'.")
    from huggingface_hub import snapshot_download

    patterns = ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"]
    return Path(snapshot_download(str(path_or_repo), allow_patterns=patterns))


def _native_class(config, owner):
    model_type, names = (getattr(config, name, None) for name in ("model_type", "architectures"))
    if not isinstance(model_type, str | None):
        raise ValueError(f"{owner}: model_type must be a string, got {shown(model_type)}.")
    if names is not None and not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{owner}: architectures must be a list of strings, got {shown(names)}.")
    for native in NATIVE:
        if native.describes(config):
            return native
    names = [f"model_type {model_type!r}", *(names or [])]
    raise ValueError(
        f"{owner}: {', '.join(names)} is not supported: dkv loads LLaDA (LLaDA-8B, LLaDA-1.5) and Dream (Dream-v0, "
        "Dream-Coder, DiffuCoder) and finetunes of the same module structure."
    )


def _dtype(name, value):
    """The floating dtype of that name, or the dtype itself; None for None."""
    dtype = vars(torch).get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if value is not None and dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be one of {FLOAT_DTYPES} or its name, got {shown(value)}.")
    return dtype


def _device(device):
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    try:
        probe = torch.tensor([0], device=device)
        probe.cpu()  # fails on devices without memory, such as "meta"
    except Exception as error:  # its class differs by device
        raise ValueError(f"device must be one that PyTorch can use here, got {device!r}: {error}") from None
    return probe.device
