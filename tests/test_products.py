"""Products of few rows: against float64 and the operators that they replace; splits; the deferred norm."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter
from utils import DTYPES, assert_within_error_budget, pairwise, rope_tables

import dkv.kernels
from dkv.kernels import deferred_norm, reference
from dkv.kernels.configs import ProductConfig
from dkv.kernels.direct import TRITON
from dkv.kernels.reference import PART

EPS = 1e-5
IMPLS = pytest.mark.parametrize("impl", ["triton", "reference"])
HALF_AND_FULL = (torch.float32, torch.float16)
ROWS = (1, 16, 17)
# below and above PART; three whole steps of 64 channels, or the last one in part
FEATURES = (24, 130, 192)


def small(splits=1, block_n=64):
    return ProductConfig(block_n, 16, 64, num_warps=4, num_stages=2, splits=splits)


# the table's, and small tiles: with one split, several, and more than there are steps
CONFIGS = (None, *map(small, (1, 2, 99)))


def normal(*shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def linear_weight(out_features, in_features, **options):
    """A weight whose product with normal rows is normal."""
    return normal(out_features, in_features, **options) / in_features**0.5


def doubled(tensors):
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def run(name, *arguments, impl="triton", **options):
    """Runs a public operator, or its launcher if tiles or semaphores are given."""
    if any(option is not None for option in options.values()):
        assert impl == "triton"
        return getattr(TRITON, name)(*arguments, **options)
    return getattr(dkv.kernels, name)(*arguments, impl=impl)


def check_deferred(found, rows, norm_weight):
    """Compares a `DeferredNorm`: products with the weight by equality, sums up to the order of their terms."""
    assert torch.equal(found.weighted, (rows.float() * norm_weight.float()).to(rows.dtype))
    parts = -(-rows.shape[1] // PART)
    squares = F.pad(rows.double().square(), (0, parts * PART - rows.shape[1])).unflatten(1, (parts, PART)).sum(-1)
    torch.testing.assert_close(found.square_sums.double(), squares.T, rtol=PART * 2.0**-24, atol=0.0)
    assert found.square_sums.dtype == torch.float32
    assert found.weighted.is_contiguous() and found.square_sums.is_contiguous()


def qkv_inputs(slots, *, heads=(2, 1), headdim=16, in_features=70, biased=True, dtype=torch.float32, device="cpu"):
    """Rows, the weight of their norm, and the arguments after eps."""
    rows, out_features, options = len(slots), (heads[0] + 2 * heads[1]) * headdim, {"dtype": dtype, "device": device}
    bias = normal(out_features, **options) if biased else None
    positions = torch.randint(0, 64, (rows,), generator=torch.Generator().manual_seed(rows)).to(device)
    slots = torch.tensor(slots, device=device, dtype=torch.int64)
    caches = [normal(4, 20, heads[1], headdim, seed=seed, **options) for seed in (1, 2)]
    angles = rope_tables(headdim, device=device)
    norm_weight, weight = normal(in_features, **options), linear_weight(out_features, in_features, **options)
    return [normal(rows, in_features, **options), norm_weight, weight, bias, *angles, positions, slots, *caches]


def some_slots(rows):
    """Slots of a cache of 80; every sixth one is padding."""
    return [-1 if row % 6 == 4 else 79 - row for row in range(rows)]


def unfused_qkv(x, norm_weight, weight, bias, cos, sin, positions, slots, k_cache, v_cache):
    nheads_k, headdim = k_cache.shape[2:]
    heads = F.linear(reference.add_rms_norm(x, None, norm_weight, EPS), weight, bias)
    heads = heads.unflatten(-1, (weight.shape[0] // headdim, headdim))
    q, k, v = heads.tensor_split((heads.shape[1] - 2 * nheads_k, heads.shape[1] - nheads_k), dim=1)
    return reference.rope_cache_update(q, k, v, cos, sin, positions, slots, k_cache, v_cache)


def check_qkv(arguments, impl="triton", normed=None, **options):
    """Returns everything that was written."""
    x, norm_weight, *others, slots, k_cache, v_cache = arguments
    oracle, same_dtype = doubled(arguments), [*arguments[:-2], k_cache.clone(), v_cache.clone()]
    before = [cache.clone() for cache in (k_cache, v_cache)]
    normed = normed or reference.deferred_norm(x, norm_weight)
    q = run("linear_rope_cache_update", normed, EPS, *others, slots, k_cache, v_cache, impl=impl, **options)
    assert_within_error_budget(q, unfused_qkv(*oracle), unfused_qkv(*same_dtype))
    assert q.is_contiguous() and q.dtype == x.dtype

    num_slots = k_cache.shape[0] * k_cache.shape[1]
    written = (slots >= 0) & (slots < num_slots)
    assert (q[~written] == 0).all()
    kept = torch.ones(num_slots, dtype=torch.bool, device=x.device)
    kept[slots[written].long()] = False
    for cache, old, *expected in zip((k_cache, v_cache), before, oracle[-2:], same_dtype[-2:], strict=True):
        assert_within_error_budget(cache, *expected)
        assert torch.equal(cache.flatten(0, 1)[kept], old.flatten(0, 1)[kept]), "a slot that was not named has changed"
    return q, k_cache, v_cache


def swiglu_inputs(rows, size=70, in_features=70, **options):
    """Rows, the weight of their norm, and that of gate and up."""
    weight = 2 * linear_weight(2 * size, in_features, **options)
    return [normal(rows, in_features, **options), normal(in_features, **options), weight]


def unfused_swiglu(x, norm_weight, weight):
    return reference.swiglu(F.linear(reference.add_rms_norm(x, None, norm_weight, EPS), weight))


def check_swiglu(arguments, impl="triton", normed=None, **options):
    x, norm_weight, weight = arguments
    normed = normed or reference.deferred_norm(x, norm_weight)
    out = run("linear_swiglu", normed, EPS, weight, impl=impl, **options)
    assert_within_error_budget(out, unfused_swiglu(*doubled(arguments)), unfused_swiglu(*arguments))
    assert out.is_contiguous() and out.dtype == x.dtype
    return (out,)


def residual_inputs(rows, size=70, in_features=70, **options):
    """Rows, the weight, the residual stream, and the weight of the next norm."""
    x, weight = normal(rows, in_features, **options), linear_weight(size, in_features, **options)
    return [x, weight, normal(rows, size, seed=1, **options), normal(size, **options)]


def unfused_residual(x, weight, residual, norm_weight):
    return residual + F.linear(x, weight)


def check_residual(arguments, impl="triton", **options):
    oracle, same_dtype = unfused_residual(*doubled(arguments)), unfused_residual(*arguments)
    residual, norm_weight = arguments[2:]
    found = run("linear_add_norm", *arguments, impl=impl, **options)
    assert_within_error_budget(residual, oracle, same_dtype)
    # the norm is that of the rounded sum
    check_deferred(found, residual, norm_weight)
    return residual, *found


def products(rows, size=70, in_features=70, **options):
    """Each of the three products with inputs: a function of impl and options that returns all it has written."""
    qkv = qkv_inputs(some_slots(rows), heads=(1, 1), in_features=in_features, **options)
    swiglu, residual = (make(rows, size, in_features, **options) for make in (swiglu_inputs, residual_inputs))

    def with_copies(check, arguments):
        return lambda **how: check([t if t is None else t.clone() for t in arguments], **how)

    return {
        "qkv": with_copies(check_qkv, qkv),
        "swiglu": with_copies(check_swiglu, swiglu),
        "residual": with_copies(check_residual, residual),
    }


PRODUCTS = pytest.mark.parametrize("name", ["qkv", "swiglu", "residual"])


@PRODUCTS
@pairwise("rows, size, in_features, config, dtype", ROWS, (24, 64, 130), FEATURES, CONFIGS, HALF_AND_FULL)
def test_products(device, name, rows, size, in_features, config, dtype):
    products(rows, size, in_features, dtype=dtype, device=device)[name](config=config)


@pairwise("dtype, headdim, heads", HALF_AND_FULL, (16, 32, 64, 128), ((2, 2), (7, 1)))
def test_heads(device, dtype, headdim, heads):
    """LLaDA has as many query as K/V heads and no bias; Dream has seven times as many, and a bias."""
    options = {"heads": heads, "headdim": headdim, "biased": heads == (7, 1), "dtype": dtype, "device": device}
    check_qkv(qkv_inputs([5, 0, -1], **options))


@PRODUCTS
@pytest.mark.parametrize("dtype", DTYPES)
def test_more_rows_than_a_tile(device, name, dtype):
    """The weight has several tiles too, all but one with two parts of the square sums."""
    products(70, dtype=dtype, device=device)[name]()
    if name != "qkv":
        products(3, 130, dtype=dtype, device=device)[name](config=small(2, block_n=128))


@PRODUCTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 17, 70])
def test_twins(device, name, dtype, rows):
    products(rows, dtype=dtype, device=device)[name](impl="reference")


@IMPLS
@PRODUCTS
def test_no_rows(device, impl, name):
    products(0, device=device)[name](impl=impl)


@IMPLS
@pytest.mark.parametrize("dtype", HALF_AND_FULL)
@pytest.mark.parametrize("rows, size", [(0, 64), (1, 1), (3, 63), (2, 64), (3, 65), (2, 300), (3, 0)])
def test_deferred_norm(device, impl, dtype, rows, size):
    x, weight = normal(rows, size, dtype=dtype, device=device), normal(size, dtype=dtype, device=device)
    check_deferred(deferred_norm(x, weight, impl=impl), x, weight)
    # rows and columns with gaps, and transposed
    wide = normal(2 * rows, 3 * size, dtype=dtype, device=device)
    check_deferred(deferred_norm(wide[::2, ::3], weight, impl=impl), wide[::2, ::3], weight)
    check_deferred(deferred_norm(x.T.contiguous().T, weight, impl=impl), x, weight)


@IMPLS
def test_a_layer(device, impl):
    """A layer by our own kernels alone: each product takes the result of the one before."""
    rows, size, mlp = 3, 70, 40
    x, norm_weight, *others = qkv_inputs([1, 2, 3], in_features=size, device=device)
    check_qkv([x, norm_weight, *others], impl, deferred_norm(x, norm_weight, impl=impl))
    attended, o, residual, mlp_norm = residual_inputs(rows, size, 32, device=device)
    normed = run("linear_add_norm", attended, o, residual, mlp_norm, impl=impl)
    (h,) = check_swiglu([residual, mlp_norm, swiglu_inputs(rows, mlp, size, device=device)[2]], impl, normed)
    check_residual([h, linear_weight(size, mlp, device=device), residual, norm_weight], impl)


def any_shape(max_examples):
    """Decorates a test: runs it for a number of random shapes, tiles and splits."""
    shapes = given(
        name=st.sampled_from(["qkv", "swiglu", "residual"]),
        rows=st.integers(1, 33),
        # for a single value PyTorch's error may be zero by chance; test_bounds.py has fewer
        size=st.integers(16, 100),
        in_features=st.integers(1, 300),
        tile=st.tuples(st.sampled_from([64, 128]), st.sampled_from([16, 32, 64]), st.sampled_from([32, 64, 128])),
        splits=st.integers(1, 5),
        dtype=st.sampled_from(HALF_AND_FULL),
    )
    return lambda test: settings(max_examples=max_examples)(shapes(test))


def config_of(tile, splits, dtype):
    block_n, block_r, block_k = tile
    if dtype == torch.float32:
        # without tensor cores a large tile takes a minute to compile
        block_n, block_r, block_k = 64, min(block_r, 32), 32
    return ProductConfig(block_n, block_r, block_k, num_warps=4, num_stages=2, splits=splits)


@any_shape(max_examples=8)
def test_any_shape(device, name, rows, size, in_features, tile, splits, dtype):
    config = config_of(tile, splits, dtype)
    products(rows, size, in_features, dtype=dtype, device=device)[name](config=config)


@pytest.mark.full
@any_shape(max_examples=300)
def test_many_shapes(device, name, rows, size, in_features, tile, splits, dtype):
    config = config_of(tile, splits, dtype)
    products(rows, size, in_features, dtype=dtype, device=device)[name](config=config)


def test_no_split_is_without_a_channel():
    for steps in range(1, 20):
        for wanted in range(1, 25):
            splits = small(wanted).splits_of(64 * steps - 3)
            steps_of_a_split = -(-steps // splits)
            assert 1 <= splits <= min(wanted, steps) and (splits - 1) * steps_of_a_split < steps


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the order is the GPU's")
@PRODUCTS
def test_the_order_of_programs_changes_nothing(name, monkeypatch):
    """Any split of a tile may arrive last: the bits are the same, and the semaphore is zero again."""
    product = products(5, in_features=192)[name]
    set_grid_idx, found = interpreter.InterpreterBuilder.set_grid_idx, []
    for turn in (False, True):
        semaphores = torch.zeros(4, dtype=torch.int32)

        def turned(builder, x, y, z, turn=turn):
            set_grid_idx(builder, builder.grid_dim[0] - 1 - x if turn else x, y, z)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", turned)
        found.append(product(config=small(3), semaphores=semaphores))
        assert not semaphores.any()
    assert all(map(torch.equal, *found))


@PRODUCTS
def test_semaphores(device, name):
    """Configs of any shape can share them: results are those with new ones, and they end as zeros."""
    semaphores = torch.zeros(9, dtype=torch.int32, device=device)
    for rows, in_features, splits in ((17, 70, 2), (1, 192, 99)):
        product = products(rows, in_features=in_features, device=device)[name]
        expected = product(config=small(splits))
        assert all(map(torch.equal, product(config=small(splits), semaphores=semaphores), expected))
        assert not semaphores.any()
    with pytest.raises(ValueError, match=r"semaphores must have an element for each of \d tiles, got 1"):
        products(17, in_features=130, device=device)[name](config=small(2), semaphores=semaphores[:1])


@IMPLS
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_padding_entries(device, impl, dtype):
    """They write nothing, whatever their rows hold; all positions are clamped."""
    far = [2**31 - 1, -(2**31)] if dtype == torch.int32 else [2**32 + 3, 3 - 2**32]
    slots = [-1, 3, 80, *far, 79]
    arguments = qkv_inputs(slots, device=device)
    padding = torch.tensor([True, False, True, True, True, False], device=device)
    arguments[0][padding] = float("nan")
    arguments[6][:] = torch.tensor([-(10**6), 7, 10**6, -1, 0, 63], device=device)
    arguments[6:8] = [index.to(dtype) for index in arguments[6:8]]
    q, k_cache, _ = check_qkv(arguments, impl)
    assert (q[~padding] != 0).any(-1).all()
    clamped = [t if t is None else t.clone() for t in arguments]
    clamped[6] = torch.where(padding, clamped[6], torch.where(clamped[6] == 63, 2**31 - 1, -7).to(dtype))
    arguments[6] = torch.where(padding, arguments[6], torch.where(arguments[6] == 63, 63, 0).to(dtype))
    again = run("linear_rope_cache_update", reference.deferred_norm(*clamped[:2]), EPS, *clamped[2:], impl=impl)
    assert torch.equal(again, check_qkv(arguments, impl)[0])


@IMPLS
@pytest.mark.parametrize("heads", [(3, 0), (0, 2), (0, 0)])
def test_queries_or_keys_alone(device, impl, heads):
    q, k_cache, _ = check_qkv(qkv_inputs([3, -1, 39], heads=heads, device=device), impl)
    assert q.shape == (3, heads[0], 16) and k_cache.shape == (4, 20, heads[1], 16)


@IMPLS
@pytest.mark.parametrize("batch, seqlen", [(0, 5), (4, 0)])
def test_caches_without_a_slot(device, impl, batch, seqlen):
    arguments = qkv_inputs([0, -1, 3], device=device)
    arguments[-2:] = torch.zeros(2, batch, seqlen, 1, 16, device=device)
    assert (check_qkv(arguments, impl)[0] == 0).all()


def in_the_middle(x):
    """The same values as columns of wider rows, NaN elsewhere."""
    wide = torch.full((x.shape[0], x.shape[1] + 30), float("nan"), dtype=x.dtype, device=x.device)
    wide[:, 7 : 7 + x.shape[1]] = x
    return wide[:, 7 : 7 + x.shape[1]]


@IMPLS
def test_strided_tensors(device, impl):
    """Rows of wider tensors; caches with heads first, and every second column of a larger one."""
    qkv, swiglu, residual = (
        qkv_inputs([7, 30, 2], heads=(2, 2), device=device),
        swiglu_inputs(3, device=device),
        residual_inputs(3, device=device),
    )
    for arguments in (qkv, swiglu):
        weighted, square_sums = reference.deferred_norm(*arguments[:2])
        arguments[2] = in_the_middle(arguments[2])
        normed = reference.DeferredNorm(in_the_middle(weighted), square_sums)
        assert not (normed.weighted.is_contiguous() or arguments[2].is_contiguous())
        if arguments is qkv:
            qkv[-2] = qkv[-2].transpose(1, 2).contiguous().transpose(1, 2)
            qkv[-1] = torch.zeros(4, 40, 2, 16, device=device)[:, ::2]
            check_qkv(qkv, impl, normed)
        else:
            check_swiglu(swiglu, impl, normed)
    residual[:3] = map(in_the_middle, residual[:3])
    check_residual(residual, impl)


def raw(name, rows, **changes):
    """A product of few rows of float16, unchecked, of 70 columns and channels; some tensors changed in place before."""
    impl = changes.pop("impl")
    options = {"dtype": torch.float16, "device": changes.pop("device")}
    if name == "residual":
        arguments = dict(zip(("x", "weight", "residual", "norm_weight"), residual_inputs(rows, **options), strict=True))
    elif name == "swiglu":
        arguments = dict(zip(("x", "norm_weight", "weight"), swiglu_inputs(rows, **options), strict=True))
    else:
        x, norm_weight, *others = qkv_inputs(range(rows), **options)
        arguments = {"x": x, "norm_weight": norm_weight, "weight": others[0]}
    for key, change in changes.items():
        change(arguments[key])
    if name == "residual":
        found = run("linear_add_norm", *arguments.values(), impl=impl)
        return torch.cat((arguments["residual"], found.weighted, found.square_sums.T), 1)
    normed = deferred_norm(arguments["x"], arguments["norm_weight"], impl=impl)
    if name == "swiglu":
        return run("linear_swiglu", normed, EPS, arguments["weight"], impl=impl)
    q = run("linear_rope_cache_update", normed, EPS, *others, impl=impl)
    return torch.cat([q.flatten(1), *(cache.flatten(0, 1)[:rows].flatten(1) for cache in others[-2:])], 1)


@IMPLS
@PRODUCTS
def test_nan_stays_where_it_comes_from(device, impl, name):
    """In its rows and features, even the last ones, which programs repeat in place of missing ones."""

    def spoil(tensor):
        tensor[[0, -1]] = float("nan")

    clean, rows, features = (
        raw(name, 3, impl=impl, device=device, **how) for how in ({}, {"x": spoil}, {"weight": spoil})
    )
    assert clean.isfinite().all()
    assert rows[[0, 2]].isnan().all() and torch.equal(rows[1], clean[1])

    # a rotation mixes the two halves of a head, values are not rotated; each part of the square sums has one of them
    columns = {"qkv": [0, 8, 63], "swiglu": [0, 69], "residual": [0, 69, 70, 139, 140, 141]}[name]
    assert features.isnan().any(0).nonzero()[:, 0].tolist() == columns and features[:, columns].isnan().all()
    rest = [column for column in range(clean.shape[1]) if column not in columns]
    assert torch.equal(features[:, rest], clean[:, rest])


@IMPLS
@pytest.mark.parametrize("name", ["qkv", "swiglu"])
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_rows_that_overflow(device, impl, name):
    """A row whose product with the norm's weight overflows float16 becomes infinite or NaN; other rows stay right."""

    def grow(x):
        x[2, 5] = 300.0

    found = raw(name, 5, impl=impl, device=device, x=grow, norm_weight=lambda w: w[5].fill_(400.0))
    assert not found[2].isfinite().any()
    assert found[[0, 1, 3, 4]].isfinite().all()


@IMPLS
@pytest.mark.parametrize("scale", [1e-18, 1e18])
@pytest.mark.parametrize("name", ["qkv", "swiglu"])
def test_rows_of_any_size(device, impl, name, scale):
    """eps matters for small squares; scaling after the product is as exact as before it."""
    if name == "qkv":
        check, arguments = check_qkv, qkv_inputs([1, 2, 3], device=device)
    else:
        check, arguments = check_swiglu, swiglu_inputs(3, device=device)
    arguments[0] *= scale
    check(arguments, impl, deferred_norm(*arguments[:2], impl=impl))


@IMPLS
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_roundings(device, impl, dtype):
    """Rows are rounded after the norm's weight, and results once; nothing is rounded in between."""

    def share_of_equal(result, oracle):
        return (result == oracle.to(dtype)).double().mean().item()

    arguments = swiglu_inputs(5, 130, dtype=dtype, device=device)
    x, norm_weight, weight = doubled(arguments)
    scale = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    weighted = (x * norm_weight).to(dtype).double()
    gate, up = (scale * (weighted @ weight.T)).chunk(2, -1)
    found = run("linear_swiglu", deferred_norm(*arguments[:2], impl=impl), EPS, arguments[2], impl=impl)
    assert share_of_equal(found, F.silu(gate) * up) > 0.99
    assert share_of_equal(found, unfused_swiglu(*arguments)) < 0.9

    arguments = qkv_inputs(range(5), heads=(4, 2), dtype=dtype, device=device)
    x, norm_weight, weight, bias, cos, sin, positions, slots, *caches = doubled(arguments)
    scale = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    weighted = (x * norm_weight).to(dtype).double()
    heads = (scale * (weighted @ weight.T) + bias).unflatten(-1, (8, 16))
    oracle = reference.rope_cache_update(*heads.split([4, 2, 2], 1), cos, sin, positions, slots, *caches)
    same_dtype = [t if t is None else t.clone() for t in arguments]
    found = run("linear_rope_cache_update", deferred_norm(*arguments[:2], impl=impl), EPS, *arguments[2:], impl=impl)
    assert share_of_equal(found, oracle) > 0.99
    assert share_of_equal(found, unfused_qkv(*same_dtype)) < 0.9
    for cache, expected in zip(arguments[-2:], caches, strict=True):
        assert share_of_equal(cache, expected) > 0.99

    arguments = residual_inputs(5, 130, dtype=dtype, device=device)
    x, weight, residual, norm_weight = doubled(arguments)
    run("linear_add_norm", *arguments, impl=impl)
    assert share_of_equal(arguments[2], residual + x @ weight.T) > 0.99
    assert share_of_equal(arguments[2], residual.to(dtype) + (x @ weight.T).to(dtype)) < 0.99


@pytest.mark.gpu
def test_offsets_beyond_int32():
    """Rows, weights, residual stream and caches whose offsets pass 2^31."""
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    storage = torch.zeros(2**31 + 2**16, **options)

    def apart(x):
        return storage.as_strided(x.shape, (2**31 // (x.shape[0] - 1) // 16 * 16, 1)).copy_(x)

    arguments = residual_inputs(3, **options)
    for place in range(3):
        check_residual([apart(t) if i == place else t.clone() for i, t in enumerate(arguments)])
    arguments = swiglu_inputs(3, **options)
    check_swiglu([*arguments[:2], apart(arguments[2])])
    arguments = qkv_inputs([3, 39, 0], **options)
    check_qkv([*arguments[:2], apart(arguments[2]), *(t if t is None else t.clone() for t in arguments[3:])])
    for place in (-1, -2):
        arguments = qkv_inputs([3, 39, 0], **options)
        arguments[place] = storage.as_strided((2, 20, 1, 16), (2**31, 16, 16, 1))
        arguments[-3 - place] = arguments[-3 - place][:2].clone()
        check_qkv(arguments)


@PRODUCTS
@pytest.mark.sanitizer
def test_small_run_for_the_sanitizer(device, name):
    products(3, in_features=130, dtype=torch.float16, device=device)[name](config=small(2))
