"""`dkv` without Triton: everything imports, the PyTorch twins run, and asking for a kernel is a clear error."""

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from tiny import CONFIGS, tiny_model

import dkv

ROOT = Path(__file__).resolve().parent.parent

# a Python that has no Triton; `found` is what it prints
SCRIPT = """
import importlib, json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._triton import has_triton_package

import dkv, dkv.kernels
from dkv.kernels.direct import direct
from tiny import CONFIGS, tiny_model

for name in NAMES:
    importlib.import_module(f"dkv.kernels.{name}")
found = {"tokens": [], "errors": [], "triton": has_triton_package() or "triton" in sys.modules}

def errors(call, *args, **options):
    try:
        call(*args, **options)
    except NotImplementedError as error:
        found["errors"].append(str(error))

for family in CONFIGS:
    model, prompt = tiny_model(family), torch.arange(1, 9)[None]
    for options in ({}, {"impl": "reference", "temperature": 0.5, "generator": torch.Generator().manual_seed(0)}):
        found["tokens"].append(dkv.generate(model, prompt, gen_length=8, **options).sequences.tolist())
    errors(dkv.generate, model, prompt, gen_length=8, impl="triton")
x, weight = torch.ones(2, 16), torch.ones(16)
errors(dkv.kernels.add_rms_norm, x, None, weight, 1e-5, impl="triton")
with FakeTensorMode():
    x, weight = torch.ones(2, 16, device="cuda"), torch.ones(16, device="cuda")
    errors(dkv.kernels.add_rms_norm, x, None, weight, 1e-5)
    errors(direct, "auto", x)
print(json.dumps(found))
"""


def test_without_triton():
    names = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
    paths = [str(ROOT / "tests"), str(Path(dkv.__path__[0]).parent), str(ROOT)]
    code = f"import sys; sys.path[:0] = {paths!r}; NAMES = {names!r}\n{SCRIPT}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert not found["triton"]
    want = []
    for family in CONFIGS:
        model, prompt = tiny_model(family), torch.arange(1, 9)[None]
        sampled = {"temperature": 0.5, "generator": torch.Generator().manual_seed(0)}
        want += [dkv.generate(model, prompt, gen_length=8, **options).sequences.tolist() for options in ({}, sampled)]
    assert found["tokens"] == want
    message = "the kernels need Triton, .*No module named 'triton'.*; install it .*impl='reference'"
    assert len(found["errors"]) == 5 and all(re.match(message, error) for error in found["errors"])


def test_triton_is_imported_in_one_place():
    pattern = re.compile(r"^\s*(import|from) triton\b", re.MULTILINE)
    paths = [*(ROOT / "kernels").glob("*.py"), *(ROOT / "dkv").rglob("*.py")]
    assert [path.name for path in paths if pattern.search(path.read_text())] == ["language.py"]
