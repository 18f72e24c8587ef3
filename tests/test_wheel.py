"""The wheel holds every module of dkv/ and kernels/, their types, the table that kernels/ reads, and nothing else."""

import zipfile


def test_wheel_holds_the_package_and_nothing_else(checkout, wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    modules = {f"dkv/{path.relative_to(checkout / 'dkv')}": path for path in (checkout / "dkv").rglob("*.py")}
    modules |= {f"dkv/kernels/{path.name}": path for path in (checkout / "kernels").rglob("*.py")}
    for name in ("dkv/py.typed", "dkv/kernels/__init__.pyi", "dkv/kernels/fused_products.json"):
        modules[name] = checkout / name.replace("dkv/kernels/", "kernels/")
    assert {"dkv/kernels.py", "dkv/kernels/attention.py", "dkv/kernels/reference.py"} <= modules.keys()
    assert packed == {name: path.read_bytes() for name, path in modules.items()}
