"""`add_rms_norm` and `swiglu`: against float64, their roundings, their errors and registration as operators."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from utils import DTYPES, assert_within_error_budget

from dkv.kernels import add_rms_norm, swiglu

IMPLS = pytest.mark.parametrize("impl", ["triton", "reference"])
# the reference runs in every dtype anywhere, the kernels in bfloat16 on a GPU only
IMPLS_AND_DTYPES = pytest.mark.parametrize(
    "impl, dtype",
    [pytest.param("triton", *dtype.values, id=f"triton {dtype.id}", marks=dtype.marks) for dtype in DTYPES]
    + [pytest.param("reference", *dtype.values, id=f"reference {dtype.id}") for dtype in DTYPES],
)
SIZES = pytest.mark.parametrize("size", [1, 7, 64, 100, 3584, 4096, 8192])


def normal(*shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def norm_in_float64(s, weight, eps):
    return weight.double() * norm_without_weight(s, eps)


def norm_without_weight(s, eps):
    return s.double() / (s.double().square().mean(-1, keepdim=True) + eps).sqrt()


def norm_as_the_models(s, weight, eps):
    y = s.float()
    return weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(s.dtype)


def is_laid_out(out, source, impl):
    """PyTorch's result keeps the layout of its argument, the kernel's is contiguous."""
    transposed = impl == "reference" and 0 < source.stride(0) < source.stride(1)
    return (out.T if transposed else out).is_contiguous()


def check_norm(x, residual, weight, eps, impl):
    s = x if residual is None else (residual.float() + x.float()).to(x.dtype)
    untouched = x.clone(), weight.clone()
    normed = add_rms_norm(x, residual, weight, eps, impl=impl)
    assert_within_error_budget(normed, norm_in_float64(s, weight, eps), norm_as_the_models(s, weight, eps))
    assert is_laid_out(normed, x, impl) and normed.dtype == x.dtype
    assert residual is None or torch.equal(residual, s)
    assert torch.equal(x, untouched[0]) and torch.equal(weight, untouched[1])


def check_swiglu(gate_up, impl):
    untouched = gate_up.clone()
    out = swiglu(gate_up, impl=impl)
    gate, up = gate_up.chunk(2, dim=-1)
    oracle = gate.double() / (1 + (-gate.double()).exp()) * up.double()
    assert_within_error_budget(out, oracle, F.silu(gate) * up)
    assert is_laid_out(out, gate_up, impl) and out.dtype == gate_up.dtype
    assert torch.equal(gate_up, untouched)


@IMPLS_AND_DTYPES
@SIZES
@pytest.mark.parametrize("has_residual", [False, True], ids=["alone", "residual"])
def test_norm(device, impl, dtype, size, has_residual):
    x, residual = (normal(5, size, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    check_norm(x, residual if has_residual else None, normal(size, dtype=dtype, device=device), 1e-5, impl)


@IMPLS_AND_DTYPES
@SIZES
def test_swiglu(device, impl, dtype, size):
    check_swiglu(4 * normal(3, 2 * size, dtype=dtype, device=device), impl)


def share_of_equal(result, oracle):
    assert result.dtype == oracle.dtype
    return (result == oracle).double().mean().item()


@IMPLS_AND_DTYPES
def test_roundings(device, impl, dtype):
    """Both round their first factor, as the models do; float32 may differ from float64 by its own roundings."""
    min_share = 0.999 if dtype != torch.float32 else 0.1
    x, weight = normal(8, 1000, dtype=dtype, device=device), normal(1000, dtype=dtype, device=device)
    normed = add_rms_norm(x, None, weight, 1e-5, impl=impl)
    assert share_of_equal(normed, weight * norm_without_weight(x, 1e-5).to(dtype)) > min_share
    assert share_of_equal(normed, norm_in_float64(x, weight, 1e-5).to(dtype)) < 0.9

    gate, up = x, normal(8, 1000, dtype=dtype, device=device, seed=1)
    out = swiglu(torch.cat((gate, up), 1), impl=impl)
    assert share_of_equal(out, F.silu(gate.double()).to(dtype) * up) > min_share
    assert share_of_equal(out, (F.silu(gate.double()) * up.double()).to(dtype)) < 0.9


@IMPLS
def test_strided_tensors(device, impl):
    """Rows of a wider tensor, every second row, one row for all; gate_up transposed and with every second column."""
    wide, weight = normal(6, 300, device=device), normal(100, device=device)
    check_norm(wide[:, :100], wide[:, 150:250], weight, 1e-6, impl)
    check_norm(normal(6, 100, device=device)[::2], normal(3, 100, device=device), weight, 1e-6, impl)
    check_norm(normal(1, 100, device=device).expand(4, 100), None, weight, 1e-6, impl)
    # the layout of products of few rows on a CPU
    check_norm(wide.T, normal(6, 300, device=device).T, normal(6, device=device), 1e-6, impl)
    check_norm(wide[:, ::3], normal(6, 200, device=device)[:, ::2], weight, 1e-6, impl)
    check_swiglu(wide[:, 7:107], impl)
    check_swiglu(wide[:, ::2], impl)
    check_swiglu(wide.T, impl)


@IMPLS
@pytest.mark.parametrize("rows, size", [(0, 8), (0, 0), (3, 0)])
def test_empty(device, impl, rows, size):
    x = normal(rows, size, device=device)
    assert add_rms_norm(x, x.clone(), normal(size, device=device), 1e-5, impl=impl).shape == (rows, size)
    assert swiglu(torch.cat((x, x), 1), impl=impl).shape == (rows, size)


@IMPLS
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's numpy; the quotient is then 0
def test_extreme_values(device, impl):
    """Zeros stay zeros; a large eps counts; silu falls to 0 and rises to its argument."""
    weight = normal(16, device=device)
    assert (add_rms_norm(torch.zeros(2, 16, device=device), None, weight, 1e-6, impl=impl) == 0).all()
    check_norm(1e-6 * normal(2, 16, device=device), None, weight, 1e-2, impl)
    check_norm(1e9 * normal(2, 16, device=device), None, weight, 1e-6, impl)
    gate = torch.tensor([[-1e4, -200.0, -0.0, 200.0, 1e4]], device=device)
    expected = torch.tensor([[0.0, 0.0, 0.0, 400.0, 2e4]], device=device)
    assert torch.equal(swiglu(torch.cat((gate, torch.full_like(gate, 2.0)), 1), impl=impl), expected)


@IMPLS
@given(
    rows=st.integers(1, 4), size=st.integers(1, 600), eps=st.sampled_from([1e-6, 1e-5, 0.1]), offset=st.integers(0, 3)
)
def test_any_shape(device, impl, rows, size, eps, offset):
    wide = normal(rows, 2 * size + offset, device=device)
    check_swiglu(wide[:, offset:], impl)
    check_norm(
        wide[:, offset : offset + size], wide[:, offset + size :].clone(), normal(size, device=device), eps, impl
    )


@pytest.mark.gpu
def test_offsets_beyond_int32():
    storage = torch.zeros(2**31 + 2**13, dtype=torch.bfloat16, device="cuda")
    storage[2**31 :] = normal(2**13, dtype=torch.bfloat16, device="cuda")
    x = storage.as_strided((2, 4096), (2**31, 1))
    check_norm(x, x.clone(), normal(4096, dtype=torch.bfloat16, device="cuda"), 1e-5, "triton")
    x = storage.as_strided((4096, 2), (1, 2**31))
    check_norm(x, None, normal(2, dtype=torch.bfloat16, device="cuda"), 1e-5, "triton")
    check_swiglu(x, "triton")
    check_swiglu(storage.as_strided((4, 2), (1, 2**31)), "triton")


def zeros(*shape, dtype=torch.float32, **kw):
    return torch.zeros(shape, dtype=dtype, **kw)


def norm(**changes):
    """A valid call with some arguments replaced."""
    arguments = dict(x=zeros(3, 8), residual=zeros(3, 8), weight=zeros(8), eps=1e-5)
    return add_rms_norm(**(arguments | changes))


def activation(**changes):
    return swiglu(**(dict(gate_up=zeros(3, 8)) | changes))


@pytest.mark.parametrize(
    "call, changes, error, message",
    [
        (norm, dict(x=zeros(3, 2, 4)), ValueError, r"x must have shape \(rows, size\).*got \(3, 2, 4\)"),
        (norm, dict(x=zeros(3, 8, dtype=torch.int32)), TypeError, "x must be float16.*got torch.int32"),
        (norm, dict(weight=zeros(7)), ValueError, r"weight must have shape \(size,\) = \(8\), got \(7,\)"),
        (norm, dict(weight=zeros(8).half()), TypeError, "weight must have the dtype of x"),
        (norm, dict(weight=zeros(8, 2)[:, 0]), ValueError, "last dim of weight must be contiguous"),
        (norm, dict(residual=zeros(2, 8)), ValueError, r"residual must have shape.* = \(3, 8\), got \(2, 8\)"),
        (norm, dict(residual=zeros(3, 8).half()), TypeError, "residual must have the dtype of x"),
        (norm, dict(residual=zeros(3, 8, device="meta")), ValueError, "residual must be on the device of x, cpu"),
        (norm, dict(residual=zeros(3, 8, requires_grad=True)), ValueError, "but residual requires grad"),
        (norm, dict(impl="torch"), ValueError, "impl must be one of"),
        (activation, dict(gate_up=zeros(8)), ValueError, r"gate_up must have shape \(rows, 2 \* size\)"),
        (activation, dict(gate_up=zeros(3, 7)), ValueError, r"even second size, got \(3, 7\)"),
        (activation, dict(gate_up=zeros(3, 8, dtype=torch.int64)), TypeError, "gate_up must be float16"),
        (activation, dict(gate_up=zeros(3, 8, requires_grad=True)), ValueError, "but gate_up requires grad"),
        (activation, dict(impl="cuda"), ValueError, "impl must be one of"),
    ],
)
def test_bad_input(call, changes, error, message):
    call()
    with pytest.raises(error, match=message):
        call(**changes)


@pytest.mark.parametrize("call, names", [(norm, ("x", "residual", "weight")), (activation, ("gate_up",))])
def test_implementation_that_cannot_run(call, names, monkeypatch):
    shapes = {"x": (3, 8), "residual": (3, 8), "weight": (8,), "gate_up": (3, 8)}
    doubles = {name: zeros(*shapes[name]).double() for name in names}
    assert call(**doubles).dtype == torch.float64
    with pytest.raises(NotImplementedError, match="no float64 kernels; use impl='reference'"):
        call(impl="triton", **doubles)
    monkeypatch.setattr("dkv.kernels.checks.InterpretedFunction", ())
    with pytest.raises(NotImplementedError, match="impl='triton' needs CUDA tensors, got cpu"):
        call(impl="triton")


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("with_residual", [True, False])
def test_compiled(device, with_residual):
    x, residual, weight = normal(3, 8, device=device), normal(3, 8, device=device, seed=1), normal(8, device=device)
    residual = residual if with_residual else None
    compiled = torch.compile(lambda *tensors: add_rms_norm(*tensors, 1e-5))
    twin = None if residual is None else residual.clone()
    assert torch.equal(compiled(x, twin, weight), add_rms_norm(x, residual, weight, 1e-5))
    assert residual is None or torch.equal(twin, residual)


@IMPLS
def test_opcheck(device, impl):
    x, residual, weight = normal(3, 8, device=device), normal(3, 8, device=device, seed=1), normal(8, device=device)
    torch.library.opcheck(torch.ops.dkv.add_rms_norm, (x, residual, weight, 1e-5, impl))
    torch.library.opcheck(torch.ops.dkv.rms_norm, (x, weight, 1e-5, impl))
    torch.library.opcheck(torch.ops.dkv.swiglu, (normal(8, 6, device=device).T, impl))


@pytest.mark.sanitizer
def test_small_run_for_the_sanitizer(device):
    x, residual, weight = (normal(*shape, dtype=torch.float16, device=device) for shape in ((3, 100), (3, 100), (100,)))
    check_norm(x, residual, weight, 1e-5, "triton")
    check_swiglu(x, "triton")
