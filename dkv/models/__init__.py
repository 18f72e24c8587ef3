"""The models dkv runs: finding their parts by structure, and native ones of the official checkpoint layout."""

import re
from pathlib import Path
from types import SimpleNamespace

import torch

from dkv.decoder import FAMILIES, find_decoder
from dkv.kernels.checks import FLOAT_DTYPES
from dkv.models.dream import Dream
from dkv.models.llada import LLaDA
from dkv.models.native import NativeModel, read_config

__all__ = ["Dream", "LLaDA", "NativeModel", "find_decoder", "from_config", "from_pretrained"]

_NATIVE = (LLaDA, Dream)
FAMILIES[:] = [native.find for native in _NATIVE]


def from_pretrained(path_or_repo, *, dtype=None, device=None):
    """Loads a LLaDA or Dream of the official checkpoint layout, without remote code and without transformers.

    Reads config.json and the safetensors, one tensor at a time straight to its device and dtype: the weights are never
    held twice.

    Args:
        path_or_repo: a folder, or a repository of the Hugging Face hub such as "GSAI-ML/LLaDA-8B-Instruct".
        dtype: a floating torch.dtype or its name. None: the torch_dtype of config.json, else that of the file.
        device: None: "cuda" if there is one, else "cpu".

    Returns:
        An nn.Module in eval mode whose modules have the official names; `model(input_ids).logits`. Its parameters
        require grad, so that it can be trained.

    Raises:
        ValueError: no such folder, a model that is not supported, weights that do not fit the config.

    Example:
        >>> model = dkv.from_pretrained("GSAI-ML/LLaDA-8B-Instruct", dtype="bfloat16")
        >>> output = dkv.generate(model, input_ids, gen_length=128)
        >>> model.save_pretrained("copy")
    """
    folder = _folder(path_or_repo)
    config = read_config(folder)
    native = _native_class(config, folder)
    if dtype is None:
        dtype = getattr(config, "torch_dtype", None) or getattr(config, "dtype", None)
    return native.load(folder, config, dtype=_dtype(dtype), device=_device(device))


def from_config(config, *, seed=0, dtype=torch.float32, device=None):
    """A randomly initialised model, made on its device in its dtype: for tests, benchmarks and training from scratch.

    Args:
        config: a dict or namespace with the fields of an official config.json.
        seed: of the weights, which are normal with standard deviation 0.02; norms are 1, biases 0.
        dtype, device: as in `from_pretrained`.
    """
    config = SimpleNamespace(**(config if isinstance(config, dict) else vars(config)))
    native = _native_class(config, "config")
    return native.random(config, seed=seed, dtype=_dtype(dtype), device=_device(device))


def _folder(path_or_repo):
    path = Path(path_or_repo)
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*/[\w.-]+", str(path_or_repo)):
        raise ValueError(f"{str(path_or_repo)!r} is neither a folder nor a repository of the hub, 'owner/name'.")
    from huggingface_hub import snapshot_download

    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    return Path(snapshot_download(str(path_or_repo), allow_patterns=patterns))


def _native_class(config, where):
    for native in _NATIVE:
        if native.describes(config):
            return native
    names = getattr(config, "architectures", None) or [f"model_type {getattr(config, 'model_type', None)!r}"]
    raise ValueError(
        f"{where}: {', '.join(names)} is not supported: dkv loads LLaDA (LLaDA-8B, LLaDA-1.5) and Dream (Dream-v0, "
        "Dream-Coder, DiffuCoder) and finetunes of the same module structure."
    )


def _dtype(dtype):
    if dtype is None:
        return None
    given = dtype
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), None)
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype must be one of {FLOAT_DTYPES} or its name, got {given!r}.")
    return dtype


def _device(device):
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
