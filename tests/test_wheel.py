"""The wheel holds every module of dkv/ and kernels/, their types, the table that kernels/ reads, and nothing else.

So does the source archive, from which the same wheel can be built. An index shows the README.
"""

import email
import subprocess
import sys
import tarfile
import zipfile

import dkv


def test_wheel_holds_the_package_and_nothing_else(checkout, wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    modules = {f"dkv/{path.relative_to(checkout / 'dkv')}": path for path in (checkout / "dkv").rglob("*.py")}
    modules |= {f"dkv/kernels/{path.name}": path for path in (checkout / "kernels").rglob("*.py")}
    for name in ("dkv/py.typed", "dkv/kernels/__init__.pyi", "dkv/kernels/fused_products.json"):
        modules[name] = checkout / name.replace("dkv/kernels/", "kernels/")
    assert {"dkv/kernels.py", "dkv/kernels/attention.py", "dkv/kernels/reference.py"} <= modules.keys()
    assert packed == {name: path.read_bytes() for name, path in modules.items()}


def test_the_source_archive_holds_what_the_wheel_is_built_from(checkout, wheel):
    build = "from setuptools.build_meta import build_sdist; build_sdist('dist/source')"
    subprocess.run([sys.executable, "-c", build], cwd=checkout, check=True, capture_output=True, timeout=600)
    (path,) = (checkout / "dist" / "source").iterdir()
    with tarfile.open(path) as archive:
        files = {member.name.partition("/")[2]: archive.extractfile(member) for member in archive if member.isfile()}
        packed = {name: file.read() for name, file in files.items()}
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        assert packed.pop(name) == (checkout / name).read_bytes()
    made = ("PKG-INFO", "setup.cfg", "dkv.egg-info/")  # by setuptools
    sources = {name: content for name, content in packed.items() if not name.startswith(made)}
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert sources == {name.replace("dkv/kernels/", "kernels/"): archive.read(name) for name in names}


def test_an_index_shows_the_readme(checkout, wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert (metadata["Name"], metadata["Version"]) == ("dkv", dkv.__version__)
    assert metadata["Summary"] and metadata["License-Expression"] == "Apache-2.0" and metadata["Requires-Python"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload(decode=True).decode().strip() == (checkout / "README.md").read_text().strip()
