"""What both operators promise as operators: their errors, their registration with PyTorch, their use under compile."""

import inspect

import pytest
import torch
from utils import AttentionCase, rope_inputs

from dkv.kernels import (
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


def attention(**changes):
    """A valid call with some arguments replaced."""
    case = AttentionCase.random([3, 4], seqlen=20, group=2)
    arguments = dict(zip(("q", "k_cache", "v_cache", "cu_seqlens_q"), case.tensors(), strict=True))
    return delayed_attention(**(arguments | changes))


ROPE_NAMES = ("q", "k", "v", "cos", "sin", "positions", "slots", "k_cache", "v_cache")


def rope(**changes):
    return rope_cache_update(**(dict(zip(ROPE_NAMES, rope_inputs([3, 39, 0]), strict=True)) | changes))


def zeros(*shape, dtype=torch.float32, **kw):
    return torch.zeros(shape, dtype=dtype, **kw)


i32 = torch.int32
ATTENTION_ERRORS = [
    ("q rank", dict(q=zeros(7, 128)), ValueError, r"q must have shape \(total, nheads, headdim\).*got \(7, 128\)"),
    ("q dtype", dict(q=zeros(7, 4, 32, dtype=i32)), TypeError, "q must be float16.*got torch.int32"),
    ("headdim", dict(q=zeros(7, 4, 80)), NotImplementedError, r"headdim must be one of \(16, 32, 64, 128\), got 80"),
    ("cache headdim", dict(k_cache=zeros(2, 20, 2, 64)), ValueError, r"k_cache must have shape.*got \(2, 20, 2, 64\)"),
    ("cache shapes", dict(v_cache=zeros(2, 21, 2, 32)), ValueError, r"v_cache must have shape.*got \(2, 21, 2, 32\)"),
    ("heads", dict(q=zeros(7, 5, 32)), ValueError, "multiple of nheads_k.*got 5 and 2"),
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
        dict(cu_seqlens_q=zeros(3, dtype=torch.int64)),
        TypeError,
        r"cu_seqlens_q must be int32.*\.to\(torch.int32",
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
    ("descale", dict(k_descale=zeros(2, 20, 2)), NotImplementedError, "reserved for 8-bit caches"),
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
        dict(cos=zeros(64, 32)),
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
    ("descale", dict(v_descale=zeros(2, 20, 2)), NotImplementedError, "reserved for 8-bit caches"),
    ("impl", dict(impl="torch"), ValueError, "impl must be one of"),
    ("grad", dict(k_cache=zeros(2, 20, 2, 32, requires_grad=True)), ValueError, "but k_cache requires grad"),
]


@pytest.mark.parametrize(
    "call, changes, error, message",
    [pytest.param(attention, *case[1:], id=f"attention {case[0]}") for case in ATTENTION_ERRORS]
    + [pytest.param(rope, *case[1:], id=f"rope {case[0]}") for case in ROPE_ERRORS],
)
def test_bad_input(call, changes, error, message):
    call()
    with pytest.raises(error, match=message):
        call(**changes)


@pytest.mark.parametrize("call", [attention, rope])
def test_implementation_that_cannot_run(call, monkeypatch):
    """An explicit choice never falls back: without a GPU, without the interpreter, or in a dtype without kernels."""
    float64 = {name: value.double() for name, value in zip(ROPE_NAMES, rope_inputs([1, 2, 3]), strict=True)}
    if call is rope:
        doubles = {name: float64[name] for name in ("q", "k", "v", "k_cache", "v_cache")}
    else:
        doubles = {"q": zeros(7, 4, 32).double(), **{n: zeros(2, 20, 2, 32).double() for n in ("k_cache", "v_cache")}}
    call(**doubles)
    with pytest.raises(NotImplementedError, match="no float64 kernels; use impl='reference'"):
        call(impl="triton", **doubles)
    if not torch.cuda.is_available():
        halves = {name: value.bfloat16() for name, value in doubles.items()}
        call(**halves)
        with pytest.raises(NotImplementedError, match="interpreter computes bfloat16 wrongly"):
            call(impl="triton", **halves)
    monkeypatch.setattr("dkv.kernels.checks.InterpretedFunction", ())
    with pytest.raises(NotImplementedError, match="impl='triton' needs CUDA tensors, got cpu"):
        call(impl="triton")


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
    """But for types, and for the counters and semaphores, which a run alone has."""
    parameters, found = (untyped(f) for f in (operator, getattr(reference, operator.__name__)))
    assert parameters.pop("impl").default == "auto"
    found.pop("counters", None)
    found.pop("semaphores", None)
    assert parameters == found


@pytest.mark.parametrize("name, launcher", vars(TRITON).items(), ids=list(vars(TRITON)))
def test_the_launcher_has_the_signature_of_the_twin(name, launcher):
    """But for what no kernel takes yet, a capacity that the host would have to ask for, and other tiles."""
    parameters, found = untyped(getattr(reference, name)), untyped(launcher)
    parameters = {name: value for name, value in parameters.items() if name not in ("k_descale", "v_descale")}
    if name == "pack_positions":
        found["capacity"] = found["capacity"].replace(default=None)
    found.pop("launch", None)
    assert found == parameters and list(found) == list(parameters)


def untyped(function):
    parameters = inspect.signature(function).parameters
    return {name: value.replace(annotation=inspect.Parameter.empty) for name, value in parameters.items()}


def test_grad_is_refused_only_under_grad_mode():
    q = zeros(7, 4, 32, requires_grad=True)
    with torch.no_grad():
        assert not attention(q=q).requires_grad


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


def cached_layer(q, k, v, cos, sin, positions, slots, k_cache, v_cache, cu_seqlens_q):
    q = rope_cache_update(q, k, v, cos, sin, positions, slots, k_cache, v_cache)
    return delayed_attention(q * 1.0, k_cache, v_cache, cu_seqlens_q).flatten(1) + 1.0


def layer_with_a_copied_cache(*arguments):
    return cached_layer(*arguments[:7], arguments[7] + 1.0, *arguments[8:])


def compile_and_find_copies(function, arguments):
    """The compiled function's result, and the lines of its code that handle a buffer of the cache's size but no input."""
    with torch.no_grad():
        out, code = torch._inductor.utils.run_and_get_code(torch.compile(function, fullgraph=True), *arguments)
    body = "\n".join(code).split("def call(")[1].split("\ndef ")[0]
    assert "dkv.rope_cache_update" in body and "dkv.delayed_attention" in body
    size = str(tuple(arguments[7].shape))
    return out, [line for line in body.splitlines() if size in line and "assert_size_stride(arg" not in line]


def test_compiles_without_a_graph_break_or_a_copy_of_the_cache(device):
    arguments = [*rope_inputs([3, 39, 0, 20], device=device), torch.tensor([0, 2, 4], dtype=i32, device=device)]
    expected_caches = [cache.clone() for cache in arguments[7:9]]
    expected = cached_layer(*arguments[:7], *expected_caches, arguments[9])

    pointers = [cache.data_ptr() for cache in arguments[7:9]]
    out, copies = compile_and_find_copies(cached_layer, arguments)
    torch.testing.assert_close(out, expected)
    for cache, pointer, want in zip(arguments[7:9], pointers, expected_caches, strict=True):
        assert cache.data_ptr() == pointer and torch.equal(cache, want)
    assert not copies
    assert compile_and_find_copies(layer_with_a_copied_cache, arguments)[1], "the check above cannot fail"
