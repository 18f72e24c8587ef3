"""The set-up of every test: the kernels run without a GPU, `dkv` is found, unwritten memory shows, runs repeat."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

CUDA = torch.cuda.is_available()

if not CUDA:
    # read when a kernel is decorated: it must be set before any module of dkv.kernels is imported
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parent.parent
# last: an installed dkv is tested as it is installed
sys.path.append(str(ROOT))

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
# no TF32, whatever the environment says
torch.set_float32_matmul_precision("highest")

with contextlib.suppress(ImportError):
    from hypothesis import HealthCheck, settings

    # no verdict depends on how fast the machine is
    unhurried = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("dkv", derandomize=True, database=None, max_examples=20, **unhurried)
    settings.load_profile("dkv")


def pytest_collection_modifyitems(items):
    if not CUDA:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    """After an error that leaves CUDA unusable, every later test of the process would fail: end it.

    pytest-xdist starts another worker in its place, and names the test.
    """
    if not report.failed or "CUDA error: " not in str(report.longrepr) or hasattr(report, "node"):
        return  # passed, or another's report
    if "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)
    pytest.exit(f"CUDA is unusable after {report.nodeid}", returncode=1)


@pytest.fixture(autouse=True)
def _give_back_memory(request):
    """Other workers share the GPU."""
    yield
    if CUDA and ("device" in request.fixturenames or "gpu" in request.keywords):
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def device():
    return "cuda" if CUDA else "cpu"


def poisoned(allocate):
    """`allocate`, but what the modules of dkv.kernels get from it is filled with NaN or the dtype's largest integer."""

    def allocate_poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if sys._getframe(1).f_globals.get("__name__", "").startswith("dkv.kernels."):
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
            elif tensor.dtype != torch.bool:
                tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    return allocate_poisoned


ALLOCATIONS = {
    (owner, name): getattr(owner, name)
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"))
}


@pytest.fixture(scope="session", autouse=True)
def poison_unwritten_outputs():
    with torch.device("meta"):  # collects the functions that it redirects at its first use, so before they are patched
        torch.zeros(())
    with pytest.MonkeyPatch.context() as patch:
        for (owner, name), allocate in ALLOCATIONS.items():
            patch.setattr(owner, name, poisoned(allocate))
        yield


@pytest.fixture
def unpoisoned(monkeypatch):
    """Allocations as they are, for who counts launches."""
    for (owner, name), allocate in ALLOCATIONS.items():
        monkeypatch.setattr(owner, name, allocate)


@pytest.fixture
def sized_as_on_a_gpu(monkeypatch):
    """A function: from its call on, steps have the sizes that are known beforehand, and read none from the device."""
    return lambda: monkeypatch.setattr("dkv.run.reads_sizes", lambda device: False)


@pytest.fixture
def standing_clock(monkeypatch):
    """No time passes for the budgets of benchmarks: what they leave out does not depend on the machine."""
    from benchmarks.harness import common

    monkeypatch.setattr(common.Clock, "spent", 0.0)
    monkeypatch.setattr(common, "time", SimpleNamespace(monotonic=lambda: 0.0, perf_counter=time.perf_counter))


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A copy of the repository: what builds leave behind does not touch the real one."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "MANIFEST.in", "Makefile", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("kernels", "dkv", "benchmarks", "tests"):
        shutil.copytree(
            ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "results")
        )
    return copy


@pytest.fixture(scope="session")
def wheel(checkout):
    """Path of what `make wheel` builds, without network, in a checkout where a deleted module was once built."""
    pytest.importorskip("setuptools", minversion="77")  # as in pyproject.toml
    pytest.importorskip("pip")
    stale = checkout / "build" / "lib" / "dkv" / "kernels" / "deleted.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    # an empty STAMP: with the Python at hand; MAKEFLAGS would bring the options of a make that runs these tests
    env = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"} | {"PIP_NO_INDEX": "1"}
    subprocess.run(["make", "wheel", f"PY={sys.executable}", "STAMP="], cwd=checkout, env=env, check=True, timeout=600)
    (path,) = (checkout / "dist").iterdir()
    return path
