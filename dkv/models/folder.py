"""Reads the configs, the index and the tensor headers of a checkpoint's folder, and checks them before any weights.

Anything that the formats do not allow is a ValueError that names the file. Only JSON is parsed, and only files of the
folder itself are opened; links are followed, because the hub's cache consists of them.

Source: https://huggingface.co/docs/safetensors (the layout of a file).
"""

import codecs
import json
import math
import os
from pathlib import Path, PureWindowsPath
from reprlib import repr as shown
from types import SimpleNamespace
from typing import Any, NamedTuple

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_JSON = 10_000_000  # bytes; the header of a model of 8 billion parameters has 40,000
_ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class Stored(NamedTuple):
    """The file and the shape of a tensor."""

    file: Path
    shape: tuple[int, ...]


def read_config(folder: Path) -> tuple[SimpleNamespace, str]:
    """The fields of config.json, and the owner that errors about them name.

    Token ids that it lacks are read from generation_config.json, if there is one.
    """
    path = folder / CONFIG
    if not os.path.isfile(path):
        raise ValueError(f"{folder} has no {CONFIG}; give the folder of a checkpoint.")
    config, owner = _read_object(path), str(path)
    generation = read_generation_config(folder)
    for name in ("eos_token_id", "pad_token_id", "mask_token_id"):
        if config.get(name) is None and generation.get(name) is not None:
            config[name], owner = generation[name], f"{path} with {GENERATION_CONFIG}"
    return SimpleNamespace(**config), owner


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The fields of generation_config.json; none if there is no such file."""
    path = folder / GENERATION_CONFIG
    config = _read_object(path) if os.path.isfile(path) else {}
    for name in ("eos_token_id", "pad_token_id", "mask_token_id"):
        value = config.get(name)
        ids = value if isinstance(value, list) else [value]
        if value is not None and not (ids and all(type(i) is int for i in ids)):
            raise ValueError(f"{path}: {name} must be an int or a list of ints, got {shown(value)}.")
    return config


def read_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of the folder's safetensors, by name."""
    index, weight_map = folder / INDEX, None
    if os.path.isfile(index):
        weight_map = _read_object(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index}: weight_map must be an object, tensor: file, got {shown(weight_map)}.")
        for name in weight_map.values():
            # Windows' rules know every separator
            if not isinstance(name, str) or PureWindowsPath(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{index}: weight_map must name safetensors of this folder, got {shown(name)}.")
    files = [WEIGHTS] if weight_map is None else sorted(set(weight_map.values()))
    missing = [name for name in files if not os.path.isfile(folder / name)]
    if missing:
        raise ValueError(f"{folder} lacks {some(missing)}; the weights must be safetensors, whole or in shards.")
    tensors = {}
    for file in (folder / name for name in files):
        for name, shape in _read_header(file).items():
            if name in tensors:
                raise ValueError(f"{file}: {name} is in {tensors[name].file.name} too; it must be in one file.")
            tensors[name] = Stored(file, shape)
    if weight_map is not None:
        found = {name: stored.file.name for name, stored in tensors.items()}
        wrong = sorted(name for name, _ in weight_map.items() ^ found.items())
        if wrong:
            raise ValueError(f"{index}: weight_map must say where each tensor is, but does not for {some(wrong)}.")
    return tensors


def _read_header(file):
    """name -> shape of the tensors of a safetensors file, which must cover its data without gaps or overlaps."""
    size = os.path.getsize(file)
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        text = f.read(length) if 8 + length <= size and length <= MAX_JSON else b""
    if not text.startswith(b"{"):
        raise ValueError(
            f"{file} is not a safetensors file, or is truncated: no header of {length} bytes; download it again."
        )
    header, spans = _parse_object(file, text), []
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{file}: __metadata__ must be an object of strings, got {shown(metadata)}.")
    for name, entry in header.items():
        match entry:
            # at most eight dimensions, so that their product is computed quickly
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, end]} if len(shape) <= 8 and all(
                type(n) is int and n >= 0 for n in (*shape, start, end)
            ):
                pass
            case _:
                raise ValueError(
                    f"{file}: {name} must have a dtype, a shape and two data_offsets in the header, got {shown(entry)}."
                )
        if dtype not in _ITEMSIZE:
            raise ValueError(
                f"{file}: {name} is {shown(dtype)}; it must be one of {', '.join(_ITEMSIZE)}, "
                "quantised weights are not supported."
            )
        if end - start != math.prod(shape) * _ITEMSIZE[dtype]:
            raise ValueError(f"{file}: data_offsets of {name} do not fit its shape and dtype, {shown(entry)}.")
        spans.append((start, end, name))
        header[name] = tuple(shape)
    position = 0
    for start, end, name in sorted(spans):
        if start != position:
            raise ValueError(f"{file}: {name} must begin at byte {position} of the data, but data_offsets say {start}.")
        position = end
    if 8 + length + position != size:
        raise ValueError(
            f"{file} must have {8 + length + position} bytes by its header, got {size}; download it again."
        )
    return header


def _read_object(path):
    if os.path.getsize(path) > MAX_JSON:
        raise ValueError(f"{path} must have at most {MAX_JSON} bytes, got {os.path.getsize(path)}.")
    return _parse_object(path, path.read_bytes())


def _parse_object(path, text):
    """The JSON object in UTF-8 text of a file, with or without a byte order mark."""
    try:
        content = json.loads(text.removeprefix(codecs.BOM_UTF8).decode(), object_pairs_hook=_named_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must hold JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, {{...}}, got {shown(content)}.")
    return content


def _named_once(pairs):
    content = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"{shown(name)} is there twice")
        content[name] = value
    return content


def some(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
