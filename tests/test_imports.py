"""`dkv.kernels` imports however Python is started, Hugging Face's `kernels` keeps working, and layers stay apart."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import dkv.kernels

ROOT = Path(__file__).resolve().parent.parent

# Stands for Hugging Face's package `kernels`, whose name our folder has. transformers imports a dozen names from it,
# among them decorators, as soon as it finds a version that it supports.
HUB_KERNELS = """
from unittest.mock import MagicMock

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return (lambda *args, **kwargs: lambda decorated: decorated) if name.startswith("use_kernel") else MagicMock()
"""

KERNELS = sorted((ROOT / "kernels").glob("*.py"))
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted((ROOT / "dkv").rglob("*.py"))]
NEED_TRANSFORMERS = ("dkv.lm_eval", "dkv.models.loader", "dkv.models.native")
MODULES = [name.removesuffix(".__init__") for name in MODULES if name not in NEED_TRANSFORMERS] + [
    f"dkv.kernels.{path.stem}" for path in KERNELS
]

# for `python -c` and as a test module; says where `dkv.kernels` and `kernels` come from
PROBE = f"""
import sys

import {", ".join(MODULES)}
from dkv.kernels import delayed_attention, reference, rope_cache_update

def test_imports():
    assert "transformers" not in sys.modules, "a module of ours imports transformers by itself"
    for function in (delayed_attention, rope_cache_update):
        module = sys.modules[function.__module__]
        assert module.__name__.startswith("dkv.kernels.") and getattr(module, function.__name__) is function
        assert getattr(reference, function.__name__).__module__ == "dkv.kernels.reference"
    if WITH_TRANSFORMERS:
        from transformers import LlamaForCausalLM
    assert not any(name.startswith("kernels.") for name in sys.modules)
    print("<dkv.kernels>", *dkv.kernels.__path__)
    print("<kernels>", getattr(sys.modules.get("kernels"), "__file__", None))
"""

# How dkv is installed, how Python is started, from where, whether Hugging Face's kernels is there, and whether
# transformers is imported too. Not the full product: a start takes 3 s, and transformers 5 s more. What matters is
# whether the repository's root is on sys.path (-c and -m at the root), and whether transformers finds `kernels` then:
# each way to install, with and without. The benchmarks' own tests start them from elsewhere and as modules.
STARTS = [
    ("not at all", "-m pytest", "root", "present", True),
    ("not at all", "pytest", "elsewhere", "present", False),
    ("editable", "-c", "elsewhere", "absent", False),
    ("wheel", "-c", "root", "absent", False),
    ("wheel", "-c", "elsewhere", "present", False),
]
MORE_STARTS = [
    ("not at all", "-c", "root", "absent", True),
    ("not at all", "-m benchmark", "root", "present", False),
    ("not at all", "benchmark", "elsewhere", "absent", False),
    ("editable", "-c", "root", "present", True),
    ("editable", "benchmark", "elsewhere", "present", False),
    ("wheel", "pytest", "root", "absent", False),
]
STARTS += [pytest.param(*start, marks=pytest.mark.full) for start in MORE_STARTS]


@pytest.fixture(scope="module")
def pythons(checkout, wheel, tmp_path_factory):
    """A virtual environment for each way to install dkv; torch and the rest come from the environment of this run."""
    build = "from setuptools.build_meta import build_editable; build_editable('dist/editable')"
    subprocess.run([sys.executable, "-c", build], cwd=checkout, check=True, capture_output=True, timeout=600)
    (editable,) = (checkout / "dist" / "editable").iterdir()

    # Python does not read the .pth files of a folder that a .pth file names: an editable dkv in there stays hidden
    names = ("torch", "triton", "transformers", "einops", "pytest")
    dependencies = {str(Path(importlib.util.find_spec(name).origin).parent.parent) for name in names}
    if any(Path(folder, "dkv").is_dir() for folder in dependencies):
        pytest.skip("dkv lies beside its dependencies and cannot be hidden; install it with `pip install -e`")

    pythons = {}
    for name, archive in {"not at all": None, "editable": editable, "wheel": wheel}.items():
        home = tmp_path_factory.mktemp(name.replace(" ", "-"))
        venv.create(home, symlinks=True)
        (site,) = home.glob("lib/python*/site-packages")
        (site / "dependencies.pth").write_text("\n".join(sorted(dependencies)))
        (home / "bin" / "pytest").write_text("import sys, pytest\nsys.exit(pytest.console_main())")
        if archive is not None:
            zipfile.ZipFile(archive).extractall(site)
        pythons[name] = home / "bin" / "python"
    return pythons


@pytest.fixture(scope="module")
def hub_kernels(tmp_path_factory):
    site = tmp_path_factory.mktemp("hub")
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text(HUB_KERNELS)
    supported = Path(importlib.util.find_spec("transformers").origin).parent / "utils" / "import_utils.py"
    found = re.search(r'^KERNELS_MIN_VERSION = "(.+)"', supported.read_text(), re.MULTILINE)
    if found is None:
        pytest.skip("this transformers does not say which version of kernels it supports")
    info = site / f"kernels-{found[1]}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {found[1]}\n")
    return site


@pytest.mark.parametrize("installed, start, where, hub, with_transformers", STARTS)
def test_ours_and_hugging_faces_kernels_both_import(
    installed, start, where, hub, with_transformers, pythons, checkout, hub_kernels, tmp_path
):
    python = pythons[installed]
    probe = f"WITH_TRANSFORMERS = {with_transformers}\n{PROBE}"
    test = checkout / "tests" / f"test_probe_{with_transformers}.py"
    test.write_text(probe)
    benchmark = checkout / "benchmarks" / "attn_speed.py"
    arguments = {
        "-c": ["-c", probe + "test_imports()"],
        "-m pytest": ["-m", "pytest", "-s", test],
        "pytest": [python.with_name("pytest"), "-s", test],
        "-m benchmark": ["-m", "benchmarks.attn_speed", "--help"],
        "benchmark": [benchmark, "--help"],
    }[start]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST", "TRITON"))}
    if hub == "present":
        env["PYTHONPATH"] = str(hub_kernels)
    cwd = checkout if where == "root" else tmp_path
    run = subprocess.run([python, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr

    if start.endswith("benchmark"):
        assert "usage:" in run.stdout
        return
    # the current folder comes before what is installed
    from_wheel = installed == "wheel" and not (where == "root" and start in ("-c", "-m pytest"))
    (folder,) = re.findall("<dkv.kernels> (.+)", run.stdout)
    (site,) = python.parent.parent.glob("lib/python*/site-packages")
    assert Path(folder) == (site / "dkv" / "kernels" if from_wheel else checkout / "kernels")
    (other,) = re.findall("<kernels> (.+)", run.stdout)
    if with_transformers and hub == "present":
        assert other == str(hub_kernels / "kernels" / "__init__.py")
    else:
        assert str(checkout) not in other


def imported_modules(path):
    """Full names of everything that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction, use the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_import_only_torch_and_triton(path):
    allowed = sys.stdlib_module_names | {"torch", "triton", "einops"}
    for name in imported_modules(path):
        assert name.partition(".")[0] in allowed or name.startswith("dkv.kernels."), name


def test_nobody_imports_the_folder_by_its_own_name():
    for folder in ("kernels", "dkv", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            assert "kernels" not in {name.partition(".")[0] for name in imported_modules(path)}, path


def test_type_checkers_see_what_python_imports():
    names = {name.rpartition(".")[2] for name in imported_modules(ROOT / "kernels" / "__init__.pyi")}
    assert names == set(dkv.kernels.__all__)


def test_completion_offers_public_names_only():
    assert dir(dkv) == sorted([*dkv.__all__, "kernels"])
    assert dir(dkv.kernels) == sorted(dkv.kernels.__all__)


def test_the_typed_example_uses_every_public_name():
    tree = ast.parse((ROOT / "tests" / "public_api.py").read_text())
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert used >= {*dkv.__all__, *dkv.kernels.__all__}


def test_no_module_is_named_like_an_exported_function():
    assert not {path.stem for path in KERNELS} & set(dkv.kernels.__all__) - {"reference"}
