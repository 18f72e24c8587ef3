"""Argument checks and the choice of implementation, shared by every operator of `dkv.kernels`."""

import contextlib
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dkv.kernels.language import InterpretedFunction, check_installed
from dkv.kernels.reference import PART, DeferredNorm

Impl = Literal["auto", "triton", "reference"]
IMPLS = get_args(Impl)
HEADDIMS = (16, 32, 64, 128)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def resolve_impl(impl: Impl, kernel: Callable[..., Any], tensor: Tensor) -> Literal["triton", "reference"]:
    """Returns the implementation that `impl` means; `kernel` is the jitted function that would run on `tensor`.

    Raises:
        ValueError: an unknown name.
        NotImplementedError: Triton is needed and cannot run these tensors here.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS}, got {impl!r}.")
    if impl == "auto":
        impl = "triton" if tensor.is_cuda and tensor.dtype != torch.float64 else "reference"
    if impl == "triton":
        check_installed()
        if tensor.dtype == torch.float64:
            raise NotImplementedError("impl='triton' has no float64 kernels; use impl='reference' for float64.")
        if not tensor.is_cuda:
            if not isinstance(kernel, InterpretedFunction):
                raise NotImplementedError(
                    f"impl='triton' needs CUDA tensors, got {tensor.device}; use impl='reference', or set "
                    "TRITON_INTERPRET=1 before importing dkv.kernels to run the kernels in Triton's interpreter."
                )
            if tensor.dtype == torch.bfloat16:
                raise NotImplementedError(
                    "Triton's interpreter computes bfloat16 wrongly; use float32 or float16 in it, or impl='reference'."
                )
    return impl


def check_no_grad(**tensors: Tensor | None) -> None:
    """Refuses tensors that require grad under grad mode: the operators have no backward pass."""
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise ValueError(
                    f"dkv.kernels is inference only, but {name} requires grad; "
                    "call under torch.no_grad() or pass a detached tensor."
                )


def check_same(reference_name: str, reference: Tensor, **tensors: Tensor) -> None:
    """Every tensor must have the dtype and the device of `reference`."""
    for name, tensor in tensors.items():
        if tensor.dtype != reference.dtype:
            raise TypeError(
                f"{name} must have the dtype of {reference_name}, {reference.dtype}, got {tensor.dtype}; cast it first."
            )
        check_device(reference_name, reference, **{name: tensor})


def check_device(reference_name: str, reference: Tensor, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != reference.device:
            raise ValueError(
                f"{name} must be on the device of {reference_name}, {reference.device}, "
                f"got {tensor.device}; move it there."
            )


def check_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...], meaning: str) -> None:
    """A None in `shape` matches any size; `meaning` names the dims in the error."""
    have = tuple(tensor.shape)
    if have == shape or _fits(have, shape):
        return
    want = ", ".join("*" if s is None else str(s) for s in shape)
    # only caches have four dims
    is_heads_first = len(have) == 4 and _fits(tuple(tensor.transpose(1, 2).shape), shape)
    hint = f"; pass {name}.transpose(1, 2), which copies nothing" if is_heads_first else ""
    raise ValueError(f"{name} must have shape {meaning} = ({want}), got {have}{hint}.")


def _fits(have, shape):
    return len(have) == len(shape) and all(want in (None, size) for want, size in zip(shape, have, strict=True))


def check_floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}.")


def check_tensor(
    name: str,
    tensor: Tensor | None,
    reference: Tensor,
    shape: tuple[int | None, ...],
    meaning: str,
    *dtypes: torch.dtype,
) -> None:
    """`tensor` is None, or has one of `dtypes` (default int32), the device of `reference` and this shape."""
    if tensor is None:
        return
    dtypes = dtypes or (torch.int32,)
    if tensor.dtype not in dtypes:
        names = [str(d).removeprefix("torch.") for d in dtypes]
        raise TypeError(f"{name} must be {' or '.join(names)}, got {tensor.dtype}; cast it with .to(torch.{names[0]}).")
    check_shape(name, tensor, shape, meaning)
    check_device("the other tensors", reference, **{name: tensor})
    check_last_dim_contiguous(**{name: tensor})


def check_count(name: str, value: int, minimum: int) -> int:
    if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}.")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}.")
    return value


def check_last_dim_contiguous(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"the last dim of {name} must be contiguous (stride 1), got stride {tensor.stride(-1)}; "
                "call .contiguous() on it."
            )


def check_not_expanded(**tensors: Tensor) -> None:
    """Refuses outputs in which several elements share one place in memory."""
    for name, tensor in tensors.items():
        if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            raise ValueError(
                f"{name} is written in place and must not be expanded, got strides {tensor.stride()} for shape "
                f"{tuple(tensor.shape)}; call .clone() on it and keep that."
            )


def check_headdim(headdim: int) -> None:
    if headdim not in HEADDIMS:
        raise NotImplementedError(f"headdim must be one of {HEADDIMS}, got {headdim}.")


def check_heads(nheads: int, nheads_k: int, seqlen_cache: int = 0) -> None:
    """`seqlen_cache`: that of caches from which `nheads_k` was read, to notice the layout with heads first."""
    if nheads == 0 or nheads_k == 0 or nheads % nheads_k:
        raise ValueError(
            f"nheads must be a positive multiple of nheads_k (grouped-query attention), got {nheads} and {nheads_k}"
            f"{heads_first_hint(nheads, seqlen_cache)}."
        )


def heads_first_hint(nheads: int, seqlen_cache: int) -> str:
    """The end of an error about heads, if `seqlen_cache` would fit as nheads_k."""
    if nheads <= 0 or seqlen_cache == 0 or nheads % seqlen_cache:
        return ""
    return (
        "; if the caches are (batch, nheads_k, seqlen_cache, headdim), "
        "pass k_cache.transpose(1, 2) and v_cache.transpose(1, 2), which copies nothing"
    )


def check_rope(cos: Tensor, sin: Tensor, headdim: int, reference: Tensor) -> None:
    """The tables of half-split RoPE."""
    half = headdim // 2
    if cos is None or sin is None:
        raise TypeError(
            "cos and sin must be tensors (max_position, headdim // 2), got None; for no rotation pass "
            f"torch.ones(1, {half}) and torch.zeros(1, {half}) on the device of the other tensors."
        )
    if cos.dim() >= 2 and cos.shape[-1] == headdim:
        index = "0, " * (cos.dim() - 2) + ":, : headdim // 2"
        raise ValueError(
            f"cos and sin must have shape (max_position, headdim // 2) = (*, {half}), got {tuple(cos.shape)}, where "
            f"half-split RoPE has each angle twice; pass cos[{index}] and sin[{index}]."
        )
    check_tensor("cos", cos, reference, (None, half), "(max_position, headdim // 2)", torch.float32)
    check_tensor("sin", sin, reference, tuple(cos.shape), "(max_position, headdim // 2)", torch.float32)
    if cos.shape[0] == 0:
        raise ValueError("cos and sin must have a row for each position, at least one, got none.")
    if cos.stride(0) != sin.stride(0):
        raise ValueError(f"cos and sin must have the same strides, got {cos.stride()} and {sin.stride()}.")


def check_deferred(normed: DeferredNorm) -> Tensor:
    """Checks a `DeferredNorm` and returns its rows."""
    if not isinstance(normed, DeferredNorm):
        raise TypeError(
            f"normed must be a DeferredNorm, of deferred_norm or linear_add_norm, got {type(normed).__name__}."
        )
    weighted, square_sums = normed
    check_no_grad(normed=weighted)
    check_floating("normed.weighted", weighted)
    check_shape("normed.weighted", weighted, (None, None), "(rows, in_features)")
    rows, in_features = weighted.shape
    if in_features == 0:
        raise ValueError("normed.weighted must have at least one column, got none.")
    sums_dtype = torch.promote_types(weighted.dtype, torch.float32)
    shape, meaning = (-(-in_features // PART), rows), f"(ceil(in_features / {PART}), rows)"
    check_tensor("normed.square_sums", square_sums, weighted, shape, meaning, sums_dtype)
    check_last_dim_contiguous(**{"normed.weighted": weighted})
    if not square_sums.is_contiguous():
        raise ValueError(f"normed.square_sums must be contiguous, got strides {square_sums.stride()}.")
    return weighted


def float_and_tensor(value: float | Tensor | None) -> tuple[float | None, Tensor | None]:
    """(float, None) or (None, tensor): operators and kernels have an argument for each kind."""
    if isinstance(value, Tensor):
        return None, value
    return None if value is None else float(value), None


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's device the current one, because Triton launches on the current device."""
    elsewhere = tensor.is_cuda and tensor.get_device() != torch.cuda.current_device()
    return torch.cuda.device(tensor.device) if elsewhere else _NO_GUARD


_NO_GUARD = contextlib.nullcontext()
