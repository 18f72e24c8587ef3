"""The models that dkv runs: finds their parts by structure, and loads native ones from official checkpoints.

`dkv.models.native` and transformers are imported when a native model is made or registered, not before.
"""

import os
import re
from pathlib import Path
from reprlib import repr as shown
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from dkv.kernels.checks import FLOAT_DTYPES
from dkv.models import dream, llada
from dkv.models.folder import read_config
from dkv.models.view import ModelView

if TYPE_CHECKING:
    from dkv.models.native import Dream, LLaDA, NativeConfig, NativeModel

__all__ = ["Dream", "LLaDA", "NativeModel", "from_config", "from_pretrained", "register", "view_of"]

FAMILIES = (llada, dream)


def __getattr__(name: str) -> Any:
    if name not in ("Dream", "LLaDA", "NativeModel"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dkv.models import native

    return getattr(native, name)


def view_of(model: nn.Module) -> ModelView:
    """The `ModelView` of a supported model; ValueError naming the class of any other."""
    check_not_wrapped(model)
    for family in FAMILIES:
        view = family.find(model)
        if view is not None:
            _check_on_one_device(model, view)
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


def _check_on_one_device(model, view):
    devices = sorted({str(p.device) for module in view.called for p in module.parameters()})
    # a hook of accelerate that moves the whole model when it is called
    moved = hasattr(model.__dict__.get("_hf_hook"), "prev_module_hook")
    if moved or len(devices) > 1 or devices == ["meta"]:
        raise ValueError(
            f"{type(model).__name__}: dkv needs all weights on the one device that it computes on, but they are "
            f"{'moved when the model is called' if moved else 'on ' + ' and '.join(devices)}; load the model without "
            "offloading, and with a device_map of one device, if any."
        )


def register() -> None:
    """Makes transformers load LLaDA and Dream as native models, by AutoConfig, AutoModel and AutoModelForCausalLM.

    Both AutoModels give the model with its head. From then on, the model types "llada" and "Dream" mean the native
    classes in this process. In recent releases (5.17, 5.24) that holds even with trust_remote_code=True, so the hub's
    code of these types is out of reach; in older ones (4.57, 5.0) that keyword still runs it. Tokenizers stay as they
    are: Dream's is remote code and needs trust_remote_code=True. A second call changes nothing.

    Example:
        >>> dkv.register()
        >>> model = AutoModel.from_pretrained("GSAI-ML/LLaDA-8B-Instruct", dtype="auto", device_map="cuda")
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from dkv.models.native import NATIVE

    for native in NATIVE.values():
        config = native.config_class
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto in (AutoModel, AutoModelForCausalLM):
            auto.register(config, native, exist_ok=True)


def from_pretrained(
    path_or_repo: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    **unknown: NoReturn,  # so that type checkers still refuse wrong names
) -> "NativeModel":
    """Loads a LLaDA or Dream of the official checkpoint layout, without remote code.

    Reads config.json (generation_config.json for end, pad and mask tokens that it lacks) and the safetensors, one
    tensor at a time straight to its device and dtype, so the weights are never held twice. The configs and the headers
    are checked before anything is built from them.

    Args:
        path_or_repo: a folder, or a repository of the Hugging Face hub such as "GSAI-ML/LLaDA-8B-Instruct".
        dtype: a floating torch.dtype or its name. None or "auto": the torch_dtype of config.json, otherwise the file's.
        torch_dtype: another name of dtype.
        device: None: "cuda" if there is one, otherwise "cpu".
        revision, token, cache_dir, local_files_only: for a repository, as in huggingface_hub.

    Returns:
        A transformers model in eval mode, of the class that AutoModel gives after `dkv.register()`. Its parameters
        require grad.

    Raises:
        ValueError: no such folder, a malformed file in it, an unsupported model, weights that do not fit the config, or
            an invalid dtype or device.
        TypeError: a keyword that only transformers has, such as device_map; or both dtype and torch_dtype.

    Example:
        >>> model = dkv.from_pretrained("GSAI-ML/LLaDA-8B-Instruct", dtype="bfloat16")
        >>> output = model.generate(**batch, max_new_tokens=128)
        >>> model.save_pretrained("copy")
    """
    if unknown:
        raise TypeError(
            f"dkv.from_pretrained has no {', '.join(unknown)}: it loads unquantised weights to one device, without "
            "remote code. For all that transformers has, call dkv.register() and then "
            "transformers.AutoModel.from_pretrained, which gives the same class."
        )
    if dtype is not None and torch_dtype is not None:
        raise TypeError("dtype and torch_dtype are the same; pass one of them.")
    folder = _folder(
        path_or_repo, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    fields, owner = read_config(folder)
    from dkv.models import loader

    family, dtype = _family(fields, owner), torch_dtype if dtype is None else dtype
    dtype = _dtype("dtype", None if isinstance(dtype, str) and dtype == "auto" else dtype)
    for field in ("torch_dtype", "dtype"):
        dtype = dtype or _dtype(f"{owner}: {field}", getattr(fields, field, None))
    model = loader.load(family, folder, vars(fields), owner, dtype=dtype, device=_device(device))
    model.config.name_or_path = model.name_or_path = str(path_or_repo)
    return model


def from_config(
    config: "dict[str, Any] | SimpleNamespace | NativeConfig",
    *,
    seed: int = 0,
    dtype: torch.dtype | str | None = torch.float32,
    device: torch.device | str | int | None = None,
) -> "NativeModel":
    """A randomly initialised model, made on its device in its dtype: for tests, benchmarks and training from scratch.

    Args:
        config: the fields of an official config.json; or `model.config`.
        seed: of the weights, which are normal with standard deviation 0.02; norms are 1, biases 0.
        dtype: a floating torch.dtype or its name. None: PyTorch's default.
        device: as in `from_pretrained`.

    Raises:
        ValueError: an unsupported model, a missing or invalid field, or an invalid dtype or device.
    """
    fields = config.to_dict() if hasattr(config, "to_dict") else getattr(config, "__dict__", config)
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise ValueError(f"config must be a dict or namespace of the fields of a config.json, got {shown(config)}.")
    from dkv.models import loader

    family = _family(SimpleNamespace(**fields), "config")
    return loader.random(family, fields, seed=seed, dtype=_dtype("dtype", dtype), device=_device(device))


def _folder(path_or_repo, **options):
    path = Path(path_or_repo)
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*/[\w.-]+", str(path_or_repo)):
        raise ValueError(f"{str(path_or_repo)!r} is neither a folder nor a repository of the hub, 'owner/name'.")
    from huggingface_hub import snapshot_download

    # the code is not run; a copy that `save_pretrained` writes should have all files of the repository
    patterns = ["*.json", "*.jinja", "*.txt", "*.model", "*.py", "*.safetensors"]
    return Path(snapshot_download(str(path_or_repo), allow_patterns=patterns, **options))


def _family(fields, owner):
    model_type, names = (getattr(fields, name, None) for name in ("model_type", "architectures"))
    if not isinstance(model_type, str | None):
        raise ValueError(f"{owner}: model_type must be a string, got {shown(model_type)}.")
    if names is not None and not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{owner}: architectures must be a list of strings, got {shown(names)}.")
    for family in FAMILIES:
        if family.describes(fields):
            return family
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
