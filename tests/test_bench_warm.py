"""warm.py compiles every kernel that the benchmarks launch, and nothing compiles in the middle of a run."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def python(*arguments, **environment):
    """Runs a script in a process where the kernels are not interpreted; returns what it prints."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    run = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def kernels():
    return json.loads(python("tests/stub_gpu.py").splitlines()[-1])


def test_what_is_launched_is_warmed(kernels):
    """Real generations of true width, by Triton's own JIT."""
    launched = set(kernels["launched"])
    assert len(launched) > 20 and launched <= set(kernels["warmed"])
    names = {key.split()[0] for key in launched}
    for name in ("delayed_attention", "lm_head", "merge_confidence", "rope_cache", "add_rms_norm", "swiglu"):
        assert f"_{name}_kernel" in names
    assert {"_advance_rows_kernel", "_active_positions_kernel", "_pack_positions_kernel"} <= names


def test_what_a_step_launches_is_warmed_in_every_way(kernels):
    steps, warmed = kernels["steps"], set(kernels["warmed_steps"])
    assert set().union(*steps.values()) <= warmed
    ours = {f"_{name}_kernel" for name in ("linear_rope_cache", "linear_add_norm", "linear_swiglu")}
    names = {way: {key.split()[0] for key in keys} for way, keys in steps.items()}
    assert not ours & names["library"] and names["fused"] == ours | {"_deferred_norm_kernel"}
    assert names["fused, PDL"] == ours | {"_delayed_attention_kernel", "_merge_splits_kernel"}
    with_pdl = [key for key in warmed if "launch_pdl=True" in key]
    assert set(with_pdl) == set(steps["fused, PDL"])


def test_ids_flags_and_numbers_of_rows_compile_nothing_anew(kernels):
    assert kernels["varied"] == []


@pytest.mark.rehearsal
def test_the_cache_can_be_packed_and_carried(tmp_path):
    """From the unpacked cache nothing is compiled again."""
    packed = tmp_path / "triton.tgz"
    job = ("benchmarks/warm.py", "--steps", "Dream:1:64:8", "--limit", "1")
    python(*job, "--pack", packed, TRITON_CACHE_DIR=str(tmp_path / "one"))
    with tarfile.open(packed) as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert any(name.endswith(".cubin") for name in names)
    python(*job, "--unpack", packed, TRITON_CACHE_DIR=str(tmp_path / "other"))

    def written(folder):
        return {p.relative_to(folder): int(p.stat().st_mtime) for p in folder.rglob("*") if p.is_file()}

    assert written(tmp_path / "other") == written(tmp_path / "one")
