"""The operators' errors, their signatures, their registration with PyTorch, their use under torch.compile."""

import inspect

import pytest
import torch
from utils import AttentionCase, rope_inputs

from dkv.kernels import (
    DeferredNorm,
    add_rms_norm,
    commit_tokens,
    deferred_norm,
    delayed_attention,
    linear_add_norm,
    linear_rope_cache_update,
    linear_swiglu,
    lm_head_confidence,
    pack_positions,
    reference,
    rope_cache_update,
    swiglu,
)
from dkv.kernels.direct import TRITON
from dkv.kernels.operators import INTERNAL


def zeros(*shape, dtype=torch.float32, **kw):
    return torch.zeros(shape, dtype=dtype, **kw)


def normed(rows=3, size=70, *, parts=2, dtype=torch.float32, sums_dtype=torch.float32):
    return DeferredNorm(zeros(rows, size, dtype=dtype), zeros(parts, rows, dtype=sums_dtype))


def valid_arguments(operator):
    """Arguments by name that the operator accepts."""
    if operator is delayed_attention:
        case = AttentionCase.random([3, 4], seqlen=20, group=2)
        return dict(zip(("q", "k_cache", "v_cache", "cu_seqlens_q"), case.tensors(), strict=True))
    if operator is rope_cache_update:
        names = ("q", "k", "v", "cos", "sin", "positions", "slots", "k_cache", "v_cache")
        return dict(zip(names, rope_inputs([3, 39, 0]), strict=True))
    if operator is linear_rope_cache_update:
        rest = {name: value for name, value in valid_arguments(rope_cache_update).items() if name not in "qkv"}
        return {"normed": normed(), "eps": 1e-5, "weight": zeros(8 * 32, 70), "bias": zeros(8 * 32), **rest}
    if operator is linear_swiglu:
        return {"normed": normed(), "eps": 1e-5, "weight": zeros(16, 70)}
    if operator is linear_add_norm:
        weights = {"weight": zeros(8, 70), "norm_weight": zeros(8)}
        return {"x": zeros(3, 70), "residual": zeros(3, 8), **weights}
    if operator is deferred_norm:
        return {"x": zeros(3, 70), "weight": zeros(70)}
    raise NotImplementedError(operator)


i32 = torch.int32
f16 = torch.float16
ATTENTION_ERRORS = [
    ("q rank", dict(q=zeros(7, 128)), ValueError, r"q must have shape \(total, nheads, headdim\).*got \(7, 128\)"),
    ("q dtype", dict(q=zeros(7, 4, 32, dtype=i32)), TypeError, "q must be float16.*got torch.int32"),
    ("headdim", dict(q=zeros(7, 4, 80)), NotImplementedError, r"headdim must be one of \(16, 32, 64, 128\), got 80"),
    ("cache headdim", dict(k_cache=zeros(2, 20, 2, 64)), ValueError, r"k_cache must have shape.*got \(2, 20, 2, 64\)"),
    ("cache shapes", dict(v_cache=zeros(2, 21, 2, 32)), ValueError, r"v_cache must have shape.*got \(2, 21, 2, 32\)"),
    ("heads", dict(q=zeros(7, 5, 32)), ValueError, "multiple of nheads_k.*got 5 and 2"),
    ("no heads", dict(q=zeros(7, 0, 32)), ValueError, "positive multiple of nheads_k.*got 0 and 2"),
    ("no heads", dict(k_cache=zeros(2, 20, 0, 32), v_cache=zeros(2, 20, 0, 32)), ValueError, "got 4 and 0"),
    (
        "cache dtype",
        dict(k_cache=zeros(2, 20, 2, 32, dtype=torch.float16)),
        TypeError,
        "k_cache must have the dtype of q",
    ),
    ("stride", dict(q=zeros(7, 32, 4).transpose(1, 2)), ValueError, r"last dim of q must be contiguous.*\.contiguous"),
    ("device", dict(k_cache=zeros(2, 20, 2, 32, device="meta")), ValueError, "k_cache must be on the device of q, cpu"),
    (
        "cu dtype",
        dict(cu_seqlens_q=zeros(3)),
        TypeError,
        r"cu_seqlens_q must be int32 or int64, got torch.float32; cast it with .to\(torch.int32",
    ),
    (
        "cu shape",
        dict(cu_seqlens_q=zeros(2, dtype=i32)),
        ValueError,
        r"cu_seqlens_q must have shape \(batch \+ 1,\) = \(3\)",
    ),
    ("leftpad", dict(cache_leftpad=zeros(3, dtype=i32)), ValueError, r"cache_leftpad must have shape \(batch,\)"),
    ("seqlens", dict(cache_seqlens=zeros(2)), TypeError, "cache_seqlens must be int32, got torch.float32"),
    ("mask dtype", dict(key_mask=zeros(2, 20)), TypeError, "key_mask must be bool, got torch.float32"),
    (
        "mask shape",
        dict(key_mask=zeros(2, 19, dtype=torch.bool)),
        ValueError,
        r"key_mask must have shape.*got \(2, 19\)",
    ),
    ("index", dict(key_index=zeros(1, 5, dtype=i32)), ValueError, r"key_index must have shape \(batch, max_keys\)"),
    ("max_seqlen_q", dict(max_seqlen_q=-1), ValueError, "max_seqlen_q must be at least 0, got -1"),
    ("max_seqlen_q type", dict(max_seqlen_q=2.0), TypeError, "max_seqlen_q must be an int, got float"),
    ("num_splits", dict(num_splits=0), ValueError, "num_splits must be at least 1, got 0"),
    ("impl", dict(impl="cuda"), ValueError, r"impl must be one of .*'reference'.*got 'cuda'"),
    ("grad", dict(q=zeros(7, 4, 32, requires_grad=True)), ValueError, "inference only, but q requires grad"),
]
ROPE_ERRORS = [
    ("q rank", dict(q=zeros(3, 128)), ValueError, r"q must have shape \(total, nheads, headdim\)"),
    ("headdim", dict(q=zeros(3, 4, 48)), NotImplementedError, r"headdim must be one of .*got 48"),
    ("k total", dict(k=zeros(2, 2, 32)), ValueError, r"k must have shape \(total, nheads_k, headdim\) = \(3, \*, 32\)"),
    ("v shape", dict(v=zeros(3, 4, 32)), ValueError, r"v must have shape .*got \(3, 4, 32\)"),
    ("heads", dict(q=zeros(3, 3, 32)), ValueError, "multiple of nheads_k.*got 3 and 2"),
    ("cache heads", dict(k_cache=zeros(2, 20, 4, 32)), ValueError, r"k_cache must have shape .*got \(2, 20, 4, 32\)"),
    ("cache shapes", dict(v_cache=zeros(1, 20, 2, 32)), ValueError, "v_cache must have shape"),
    (
        "cache dtype",
        dict(v_cache=zeros(2, 20, 2, 32, dtype=torch.float16)),
        TypeError,
        "v_cache must have the dtype of q",
    ),
    ("cos dtype", dict(cos=zeros(64, 16, dtype=torch.float16)), TypeError, "cos must be float32, got torch.float16"),
    (
        "cos shape",
        dict(cos=zeros(64, 17)),
        ValueError,
        r"cos must have shape \(max_position, headdim // 2\) = \(\*, 16\)",
    ),
    ("sin shape", dict(sin=zeros(63, 16)), ValueError, r"sin must have shape .*got \(63, 16\)"),
    ("sin strides", dict(sin=zeros(64, 32)[:, :16]), ValueError, "cos and sin must have the same strides"),
    ("positions dtype", dict(positions=zeros(3)), TypeError, "positions must be int32 or int64, got torch.float32"),
    (
        "positions shape",
        dict(positions=zeros(4, dtype=i32)),
        ValueError,
        r"positions must have shape \(total,\) = \(3\)",
    ),
    ("slots dtype", dict(slots=zeros(3, dtype=torch.int16)), TypeError, "slots must be int32 or int64"),
    ("slots device", dict(slots=zeros(3, dtype=i32, device="meta")), ValueError, "slots must be on the device"),
    ("k stride", dict(k=zeros(3, 32, 2).transpose(1, 2)), ValueError, "last dim of k must be contiguous"),
    ("impl", dict(impl="torch"), ValueError, "impl must be one of"),
    ("grad", dict(k_cache=zeros(2, 20, 2, 32, requires_grad=True)), ValueError, "but k_cache requires grad"),
]

GRAD = {"requires_grad": True}
SAME = "must have the dtype of normed.weighted"
# for every operator that takes a `DeferredNorm`
NORMED_ERRORS = [
    (
        "normed",
        dict(normed=(zeros(3, 70), zeros(2, 3))),
        TypeError,
        "normed must be a DeferredNorm, of deferred_norm .*got tuple",
    ),
    (
        "normed grad",
        dict(normed=DeferredNorm(zeros(3, 70, **GRAD), zeros(2, 3))),
        ValueError,
        "but normed requires grad",
    ),
    ("normed dtype", dict(normed=normed(dtype=i32)), TypeError, r"normed\.weighted must be float16.*got torch.int32"),
    (
        "normed rank",
        dict(normed=DeferredNorm(zeros(3, 7, 10), zeros(2, 3))),
        ValueError,
        r"normed\.weighted must have shape \(rows, in_features\).*got \(3, 7, 10\)",
    ),
    (
        "no features",
        dict(normed=normed(size=0, parts=0)),
        ValueError,
        r"normed\.weighted must have at least one column",
    ),
    ("sums dtype", dict(normed=normed(sums_dtype=f16)), TypeError, r"normed\.square_sums must be float32, got torch.f"),
    (
        "sums shape",
        dict(normed=normed(parts=3)),
        ValueError,
        r"normed\.square_sums must have shape \(ceil\(in_features / 64\), rows\) = \(2, 3\), got \(3, 3\)",
    ),
    (
        "sums device",
        dict(normed=DeferredNorm(zeros(3, 70), zeros(2, 3, device="meta"))),
        ValueError,
        r"normed\.square_sums must be on the device of the other tensors, cpu",
    ),
    (
        "sums transposed",
        dict(normed=DeferredNorm(zeros(3, 70), zeros(3, 2).T)),
        ValueError,
        r"last dim of normed\.square_sums must be contiguous",
    ),
    (
        "sums strides",
        dict(normed=DeferredNorm(zeros(3, 70), zeros(2, 5)[:, :3])),
        ValueError,
        r"normed\.square_sums must be contiguous, got strides \(5, 1\)",
    ),
    (
        "normed stride",
        dict(normed=DeferredNorm(zeros(70, 3).T, zeros(2, 3))),
        ValueError,
        r"last dim of normed\.weighted must be contiguous",
    ),
]
QKV_ERRORS = [
    *NORMED_ERRORS,
    *(
        (f"{name} grad", {name: zeros(*shape, **GRAD)}, ValueError, f"but {name} requires grad")
        for name, shape in (("weight", (256, 70)), ("bias", (256,)), ("k_cache", (2, 20, 2, 32)), ("v_cache", (1,)))
    ),
    (
        "cache rank",
        dict(k_cache=zeros(2, 20, 64)),
        ValueError,
        r"k_cache must have shape \(batch, seqlen_cache, nheads",
    ),
    ("cache shapes", dict(v_cache=zeros(2, 21, 2, 32)), ValueError, r"v_cache must have shape.*got \(2, 21, 2, 32\)"),
    (
        "headdim",
        dict(k_cache=zeros(2, 20, 2, 48), v_cache=zeros(2, 20, 2, 48)),
        NotImplementedError,
        "headdim must be one of .*got 48",
    ),
    (
        "weight features",
        dict(weight=zeros(256, 64)),
        ValueError,
        r"weight must have shape \(\(nheads \+ 2 \* nheads_k\) \* headdim, in_features\) = \(\*, 70\), got \(256, 64\)",
    ),
    ("part of a head", dict(weight=zeros(250, 70)), ValueError, "for caches of 2 heads of 32 each, got 250"),
    ("too few heads", dict(weight=zeros(96, 70)), ValueError, "for caches of 2 heads of 32 each, got 96"),
    ("heads", dict(weight=zeros(224, 70)), ValueError, "multiple of nheads_k.*got 3 and 2"),
    ("weight dtype", dict(weight=zeros(256, 70, dtype=f16)), TypeError, f"weight {SAME}"),
    ("weight device", dict(weight=zeros(256, 70, device="meta")), ValueError, "weight must be on the device of normed"),
    ("k_cache dtype", dict(k_cache=zeros(2, 20, 2, 32, dtype=f16)), TypeError, f"k_cache {SAME}"),
    ("v_cache dtype", dict(v_cache=zeros(2, 20, 2, 32, dtype=f16)), TypeError, f"v_cache {SAME}"),
    ("bias shape", dict(bias=zeros(255)), ValueError, r"bias must have shape .* = \(256\), got \(255,\)"),
    ("bias dtype", dict(bias=zeros(256, dtype=f16)), TypeError, f"bias {SAME}"),
    ("bias stride", dict(bias=zeros(256, 2)[:, 0]), ValueError, "last dim of bias must be contiguous"),
    ("cos dtype", dict(cos=zeros(64, 16, dtype=f16)), TypeError, "cos must be float32, got torch.float16"),
    ("sin shape", dict(sin=zeros(63, 16)), ValueError, r"sin must have shape .*got \(63, 16\)"),
    (
        "no angles",
        dict(cos=zeros(0, 16), sin=zeros(0, 16)),
        ValueError,
        "cos and sin must have a row for each position",
    ),
    ("sin strides", dict(sin=zeros(64, 32)[:, :16]), ValueError, "cos and sin must have the same strides"),
    ("positions dtype", dict(positions=zeros(3)), TypeError, "positions must be int32 or int64, got torch.float32"),
    (
        "positions shape",
        dict(positions=zeros(4, dtype=i32)),
        ValueError,
        r"positions must have shape \(rows,\) = \(3\)",
    ),
    ("slots dtype", dict(slots=zeros(3, dtype=torch.int16)), TypeError, "slots must be int32 or int64"),
    ("slots shape", dict(slots=zeros(3, 1, dtype=i32)), ValueError, r"slots must have shape \(rows,\) = \(3\)"),
    ("weight stride", dict(weight=zeros(70, 256).T), ValueError, "last dim of weight must be contiguous"),
    ("k_cache stride", dict(k_cache=zeros(2, 20, 32, 2).mT), ValueError, "last dim of k_cache must be contiguous"),
    ("v_cache stride", dict(v_cache=zeros(2, 20, 32, 2).mT), ValueError, "last dim of v_cache must be contiguous"),
    *(
        (f"{name} expanded", {name: zeros(2, 1, 2, 32).expand(2, 20, 2, 32)}, ValueError, f"{name} is written in place")
        for name in ("k_cache", "v_cache")
    ),
    ("impl", dict(impl="torch"), ValueError, "impl must be one of"),
]
SWIGLU_ERRORS = [
    *NORMED_ERRORS,
    ("weight grad", dict(weight=zeros(16, 70, **GRAD)), ValueError, "but weight requires grad"),
    (
        "weight features",
        dict(weight=zeros(16, 71)),
        ValueError,
        r"weight must have shape \(2 \* size, in_features\) = ",
    ),
    ("odd", dict(weight=zeros(15, 70)), ValueError, r"weight must have shape .* an even first size, got 15"),
    ("weight dtype", dict(weight=zeros(16, 70, dtype=f16)), TypeError, f"weight {SAME}"),
    ("weight device", dict(weight=zeros(16, 70, device="meta")), ValueError, "weight must be on the device of normed"),
    ("weight stride", dict(weight=zeros(70, 16).T), ValueError, "last dim of weight must be contiguous"),
    ("impl", dict(impl="cuda"), ValueError, "impl must be one of"),
]
RESIDUAL_SHAPES = {"x": (3, 70), "weight": (8, 70), "residual": (3, 8), "norm_weight": (8,)}
RESIDUAL_ERRORS = [
    *(
        (f"{name} grad", {name: zeros(*shape, **GRAD)}, ValueError, f"but {name} requires grad")
        for name, shape in RESIDUAL_SHAPES.items()
    ),
    ("x dtype", dict(x=zeros(3, 70, dtype=i32)), TypeError, "x must be float16.*got torch.int32"),
    ("x rank", dict(x=zeros(70)), ValueError, r"x must have shape \(rows, in_features\).*got \(70,\)"),
    (
        "weight features",
        dict(weight=zeros(8, 71)),
        ValueError,
        r"weight must have shape \(size, in_features\) = \(\*, 70\)",
    ),
    ("no features", dict(x=zeros(3, 0), weight=zeros(8, 0)), ValueError, "x must have at least one column, got none"),
    ("residual shape", dict(residual=zeros(3, 7)), ValueError, r"residual must have shape \(rows, size\) = \(3, 8\)"),
    ("norm_weight shape", dict(norm_weight=zeros(7)), ValueError, r"norm_weight must have shape \(size,\) = \(8\)"),
    *(
        (f"{name} dtype", {name: zeros(*shape, dtype=f16)}, TypeError, f"{name} must have the dtype of x")
        for name, shape in RESIDUAL_SHAPES.items()
        if name != "x"
    ),
    ("device", dict(residual=zeros(3, 8, device="meta")), ValueError, "residual must be on the device of x, cpu"),
    *(
        (
            f"{name} stride",
            {name: zeros(*shape, 2)[..., 0]},
            ValueError,
            f"last dim of {name} must be contiguous",
        )
        for name, shape in RESIDUAL_SHAPES.items()
    ),
    (
        "expanded",
        dict(residual=zeros(8).expand(3, 8)),
        ValueError,
        "residual is written in place and must not be expan",
    ),
    ("impl", dict(impl="cuda"), ValueError, "impl must be one of"),
]
DEFERRED_ERRORS = [
    ("x grad", dict(x=zeros(3, 70, **GRAD)), ValueError, "but x requires grad"),
    ("weight grad", dict(weight=zeros(70, **GRAD)), ValueError, "but weight requires grad"),
    ("x dtype", dict(x=zeros(3, 70, dtype=i32)), TypeError, "x must be float16.*got torch.int32"),
    ("x rank", dict(x=zeros(70)), ValueError, r"x must have shape \(rows, size\).*got \(70,\)"),
    ("weight shape", dict(weight=zeros(71)), ValueError, r"weight must have shape \(size,\) = \(70\), got \(71,\)"),
    ("weight dtype", dict(weight=zeros(70, dtype=f16)), TypeError, "weight must have the dtype of x"),
    ("weight device", dict(weight=zeros(70, device="meta")), ValueError, "weight must be on the device of x, cpu"),
    ("weight stride", dict(weight=zeros(70, 2)[:, 0]), ValueError, "last dim of weight must be contiguous"),
    ("impl", dict(impl="cuda"), ValueError, "impl must be one of"),
]
ERRORS = {
    delayed_attention: ATTENTION_ERRORS,
    rope_cache_update: ROPE_ERRORS,
    linear_rope_cache_update: QKV_ERRORS,
    linear_swiglu: SWIGLU_ERRORS,
    linear_add_norm: RESIDUAL_ERRORS,
    deferred_norm: DEFERRED_ERRORS,
}


@pytest.mark.parametrize(
    "operator, changes, error, message",
    [
        pytest.param(operator, *case[1:], id=f"{operator.__name__} {case[0]}")
        for operator, cases in ERRORS.items()
        for case in cases
    ],
)
def test_bad_input(operator, changes, error, message):
    arguments = valid_arguments(operator)
    operator(**arguments)
    with pytest.raises(error, match=message):
        operator(**(arguments | changes))


@pytest.mark.parametrize("operator", [delayed_attention, rope_cache_update, linear_rope_cache_update])
def test_caches_with_heads_first_get_the_line_that_fixes_them(operator):
    arguments = valid_arguments(operator)
    heads_first = {name: arguments[name].transpose(1, 2).contiguous() for name in ("k_cache", "v_cache")}
    with pytest.raises(ValueError, match=r"k_cache\.transpose\(1, 2\)"):
        operator(**(arguments | heads_first))
    fixed = {name: cache.transpose(1, 2) for name, cache in heads_first.items()}
    assert torch.equal(operator(**(arguments | fixed)), operator(**arguments))
    with pytest.raises(ValueError, match=r"v_cache\.transpose\(1, 2\)"):
        operator(**(arguments | {"v_cache": heads_first["v_cache"]}))


@pytest.mark.parametrize("operator", [rope_cache_update, linear_rope_cache_update])
def test_other_kinds_of_rope_tables_get_the_line_that_fixes_them(operator):
    arguments = valid_arguments(operator)

    def call(cos, sin):
        return operator(**(arguments | {"cos": cos, "sin": sin}))

    full = [torch.cat((arguments[name],) * 2, dim=-1) for name in ("cos", "sin")]
    with pytest.raises(ValueError, match=r"got \(64, 32\).*pass cos\[:, : headdim // 2\] and sin\[:, : headdim // 2\]"):
        call(*full)
    with pytest.raises(ValueError, match=r"got \(1, 64, 32\).*pass cos\[0, :, : headdim // 2\]"):
        call(*(table[None] for table in full))
    headdim = 32
    assert torch.equal(call(*(table[:, : headdim // 2] for table in full)), operator(**arguments))

    for missing in ((None, None), (arguments["cos"], None)):
        with pytest.raises(TypeError, match=r"got None.*pass torch\.ones\(1, 16\) and torch\.zeros\(1, 16\)"):
            call(*missing)
    if operator is rope_cache_update:
        assert torch.equal(call(torch.ones(1, 16), torch.zeros(1, 16)), arguments["q"])


def cast(value, dtype):
    """Casts float32 tensors; the sums of a `DeferredNorm` stay in float32 or become float64."""
    if isinstance(value, DeferredNorm):
        return DeferredNorm(value.weighted.to(dtype), value.square_sums.to(torch.promote_types(dtype, torch.float32)))
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("operator", list(ERRORS))
def test_implementation_that_cannot_run(operator, monkeypatch):
    """An explicit choice never falls back: without a GPU, without the interpreter, or in a dtype without kernels."""
    arguments = valid_arguments(operator)

    def of(dtype):
        return {name: value if name in ("cos", "sin") else cast(value, dtype) for name, value in arguments.items()}

    operator(**of(torch.float64))
    with pytest.raises(NotImplementedError, match="no float64 kernels; use impl='reference'"):
        operator(impl="triton", **of(torch.float64))
    if not torch.cuda.is_available():
        operator(**of(torch.bfloat16))
        with pytest.raises(NotImplementedError, match="interpreter computes bfloat16 wrongly"):
            operator(impl="triton", **of(torch.bfloat16))
    monkeypatch.setattr("dkv.kernels.checks.InterpretedFunction", ())
    with pytest.raises(NotImplementedError, match="impl='triton' needs CUDA tensors, got cpu"):
        operator(impl="triton", **arguments)


OPERATORS = [
    add_rms_norm,
    commit_tokens,
    deferred_norm,
    delayed_attention,
    linear_add_norm,
    linear_rope_cache_update,
    linear_swiglu,
    lm_head_confidence,
    pack_positions,
    rope_cache_update,
    swiglu,
]


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_twin_has_the_signature_of_the_operator(operator):
    """Types included, and except for the arguments that only a run passes."""
    parameters, found = (parameters_of(f) for f in (operator, getattr(reference, operator.__name__)))
    assert parameters.pop("impl").default == "auto"
    assert parameters == {name: value for name, value in found.items() if name not in INTERNAL}


@pytest.mark.parametrize("name, launcher", vars(TRITON).items(), ids=list(vars(TRITON)))
def test_the_launcher_has_the_signature_of_the_twin(name, launcher):
    """Types included, and except for tiles, and for a capacity that the host would have to read."""
    parameters, found = parameters_of(getattr(reference, name)), parameters_of(launcher)
    if name == "pack_positions":
        found["capacity"] = parameters["capacity"]
    found.pop("config", None)
    assert found == parameters and list(found) == list(parameters)


def parameters_of(function):
    return dict(inspect.signature(function).parameters)


def test_grad_is_refused_only_under_grad_mode():
    arguments = valid_arguments(delayed_attention) | {"q": zeros(7, 4, 32, requires_grad=True)}
    with torch.no_grad():
        assert not delayed_attention(**arguments).requires_grad


def attention_arguments(device, impl, **options):
    case = AttentionCase.random([3, 4], seqlen=20, group=2, padding=1, device=device)
    optional = {"cache_leftpad": None, "cache_seqlens": None, "key_mask": None, "key_index": None} | options
    return (*case.tensors(), 4, *optional.values(), 0.25, None, True, impl)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_opcheck(device, impl):
    """Schema, fake implementation and dispatch, as torch.library checks them."""
    torch.library.opcheck(torch.ops.dkv.delayed_attention, attention_arguments(device, impl))
    without_lse = [*attention_arguments(device, impl)[:-2], False, impl]
    torch.library.opcheck(torch.ops.dkv.delayed_attention, without_lse)
    if impl == "reference":
        without_lse[:3] = [tensor.double() for tensor in without_lse[:3]]
        torch.library.opcheck(torch.ops.dkv.delayed_attention, without_lse)
    options = {
        "cache_leftpad": torch.tensor([1, 0], dtype=i32, device=device),
        "cache_seqlens": torch.tensor([20, 12], dtype=i32, device=device),
        "key_mask": torch.ones(2, 20, dtype=torch.bool, device=device),
        "key_index": torch.arange(8, dtype=i32, device=device).repeat(2, 1),
    }
    torch.library.opcheck(torch.ops.dkv.delayed_attention, attention_arguments(device, impl, **options))
    torch.library.opcheck(torch.ops.dkv.rope_cache_update, (*rope_inputs([3, -1, 0], device=device), impl))


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("operator", [deferred_norm, linear_rope_cache_update, linear_swiglu, linear_add_norm])
def test_opcheck_of_products(device, impl, operator):
    given = valid_arguments(operator)
    given = [given[name] for name in inspect.signature(operator).parameters if name in given]
    given = [list(value) if isinstance(value, DeferredNorm) else value for value in given]
    given = torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), given)
    torch.library.opcheck(getattr(torch.ops.dkv, operator.__name__), (*given, impl))


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_int64_cu_seqlens(device, impl):
    """As cumsum gives them; values beyond int32 are clamped like others."""
    case = AttentionCase.random([5, 0, 4], seqlen=40, padding=3, device=device)
    x = torch.zeros(3, 5, dtype=torch.int64, device=device)
    entries = torch.arange(12, device=device) % 15

    def results(bounds):
        for num_splits in (1, 2):
            options = {"num_splits": num_splits, "return_softmax_lse": True, "impl": impl}
            yield from delayed_attention(case.q, case.k_cache, case.v_cache, bounds, **options)
        yield from lm_head_confidence(case.q[:, 0], case.k_cache[0, :, 0], cu_seqlens=bounds, impl=impl)
        written = x.clone()
        yield commit_tokens(written, entries, case.q[:, 0, 0].contiguous(), entries, bounds, bounds[1:] // 2, impl=impl)
        yield written

    for bounds in ([0, 5, 5, 9], [1, 5, 5, 2**31 - 1], [-1, 5, 9, 2**40 + 3]):
        bounds = torch.tensor(bounds, device=device)
        narrow = bounds.clamp(max=2**31 - 1).int()
        for found, expected in zip(results(bounds), results(narrow), strict=True):
            assert torch.equal(found, expected)


def cached_layer(q, k, v, cos, sin, positions, slots, k_cache, v_cache, cu_seqlens_q):
    q = rope_cache_update(q, k, v, cos, sin, positions, slots, k_cache, v_cache)
    return delayed_attention(q * 1.0, k_cache, v_cache, cu_seqlens_q).flatten(1) + 1.0


def layer_with_a_copied_cache(*arguments):
    return cached_layer(*arguments[:7], arguments[7] + 1.0, *arguments[8:])


def compile_and_find_copies(function, arguments, cache, operators):
    """The compiled function's result, and the lines of its code with a buffer of the cache's size that is no input."""
    with torch.no_grad():
        out, code = torch._inductor.utils.run_and_get_code(torch.compile(function, fullgraph=True), *arguments)
    body = "\n".join(code).split("def call(")[1].split("\ndef ")[0]
    assert all(f"dkv.{operator.__name__}" in body for operator in operators)
    size = str(tuple(cache.shape))
    return out, [line for line in body.splitlines() if size in line and "assert_size_stride(arg" not in line]


def test_compiles_without_a_graph_break_or_a_copy_of_the_cache(device):
    arguments = [*rope_inputs([3, 39, 0, 20], device=device), torch.tensor([0, 2, 4], device=device)]
    expected_caches = [cache.clone() for cache in arguments[7:9]]
    expected = cached_layer(*arguments[:7], *expected_caches, arguments[9])

    operators = arguments[7], (rope_cache_update, delayed_attention)
    out, copies = compile_and_find_copies(cached_layer, arguments, *operators)
    torch.testing.assert_close(out, expected)
    for cache, want in zip(arguments[7:9], expected_caches, strict=True):
        assert torch.equal(cache, want)
    assert not copies
    assert compile_and_find_copies(layer_with_a_copied_cache, arguments, *operators)[1], "the check above cannot fail"


def fused_layer(x, attn_norm, qkv, o, mlp_norm, gate_up, down, next_norm, cu_seqlens_q, *rest):
    """A layer of a cached step by our own products. Writes to x and to the caches, its last two arguments."""
    normed = deferred_norm(x, attn_norm)
    q = linear_rope_cache_update(normed, 1e-5, qkv, *rest)
    attended = delayed_attention(q, *rest[-2:], cu_seqlens_q).flatten(1)
    normed = linear_add_norm(attended, o, x, mlp_norm)
    return linear_add_norm(linear_swiglu(normed, 1e-5, gate_up), down, x, next_norm)


def test_a_layer_of_products_compiles_without_a_graph_break_or_a_copy_of_the_cache(device):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(device)

    shapes = (4, 70), (70,), (256, 70), (70, 128), (70,), (96, 70), (70, 48), (70,)
    cu_seqlens_q = torch.tensor([0, 2, 4], dtype=i32, device=device)
    arguments = [*(normal(*shape) for shape in shapes), cu_seqlens_q, normal(256)]
    arguments += rope_inputs([3, 39, 0, 20], device=device)[3:]
    twins = [tensor.clone() for tensor in arguments]
    expected = fused_layer(*twins)
    operators = (deferred_norm, linear_rope_cache_update, delayed_attention, linear_add_norm, linear_swiglu)
    found, copies = compile_and_find_copies(fused_layer, arguments, arguments[-1], operators)
    assert isinstance(found, DeferredNorm) and not copies
    for one, other in zip((*found, *arguments), (*expected, *twins), strict=True):
        torch.testing.assert_close(one, other)
