"""The official modeling code of LLaDA and Dream, for the tests that compare with it. It is not in this repository.

`DKV_HUB_CODE` names a folder with copies of the files of the hub: llada_v1/ and llada_v2/ (before and after LLaDA's
file learnt to honour attention masks), dream/, and llada_generate.py (LLaDA's `generate.py`). Without it, and with
transformers 5, under which these files do not load, the tests are skipped.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

KINDS = ("llada_v1", "llada_v2", "dream")

# hashes of `git hash-object`
BLOBS = {
    "llada_v1/modeling_llada.py": "ddf5467ac9e37abd3816a083be03041b471339d7",
    "llada_v1/configuration_llada.py": "1f9dce522c55a9e84c99bc6c36b0b01c3b378938",
    "llada_v2/modeling_llada.py": "810676f774fa5541030f36fbd7c451be588e8628",
    "llada_v2/configuration_llada.py": "1f9dce522c55a9e84c99bc6c36b0b01c3b378938",
    "llada_generate.py": "3f71e513d55df4d9e1e231d1cc12b027016fcf5f",
    "dream/modeling_dream.py": "45ce4736df4764510c625710b5db7586506d24e0",
    "dream/configuration_dream.py": "96d1598e69f108469c292fa6a86fb143be07d70c",
    "dream/generation_utils.py": "ecc30e19744b69b2515b7ff5698b3fa8d84396a8",
    "dream/tokenization_dream.py": "cca444f900c5f5d2909c65a49771dfbd32267e5c",
}


def skip_reason():
    """Why the hub's code cannot be used here, or None."""
    if not os.environ.get("DKV_HUB_CODE"):
        return "DKV_HUB_CODE is not set: it names the folder with the hub's modeling files"
    if importlib.util.find_spec("transformers") is None:
        return "the hub's code needs transformers"
    from transformers import __version__

    return (
        f"the hub's code does not load with transformers {__version__}" if int(__version__.split(".")[0]) > 4 else None
    )


@contextlib.contextmanager
def _no_bytecode():
    """The folder is someone else's: importing from it leaves nothing behind."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def module(path):
    """The module of a file below DKV_HUB_CODE, such as "dream/generation_utils.py"; skips the test without it."""
    reason = skip_reason()
    if reason:
        pytest.skip(reason)
    folder = Path(os.environ["DKV_HUB_CODE"])
    for name, blob in BLOBS.items():
        if name.split("/")[0] == path.split("/")[0]:
            content = (folder / name).read_bytes()
            got = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            assert got == blob, f"{folder / name} is not the official file: git blob {got}, expected {blob}"
    kind, _, file = path.rpartition("/")
    package = f"hub_code_{kind}"
    if package not in sys.modules:
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(folder / kind)]
    with _no_bytecode():
        return importlib.import_module(f"{package}.{(file or path).removesuffix('.py')}")


def model_class(kind):
    if kind == "dream":
        return module("dream/modeling_dream.py").DreamModel
    return module(f"{kind}/modeling_llada.py").LLaDAModelLM


def load(kind, folder):
    """`from_pretrained` of the official class of `kind` on a folder with config.json and safetensors, in float32.

    Dream's insists on a generation_config.json, which is added. All weights must have been found and used.
    """
    if kind == "dream" and not (folder / "generation_config.json").exists():
        (folder / "generation_config.json").write_text("{}")
    efficient = torch.backends.cuda.mem_efficient_sdp_enabled()
    try:
        model = model_class(kind).from_pretrained(str(folder), torch_dtype=torch.float32).eval()
    finally:
        torch.backends.cuda.enable_mem_efficient_sdp(efficient)  # LLaDA's constructor turns it off for good
    stored = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    assert stored.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(parameter, stored[name].float()) for name, parameter in model.named_parameters())
    return model
