"""The ahead-of-time lint: what it passes, and that each of its checks can fail. Compiles for GPUs, and needs none."""

import json
from unittest import mock

import kernel_lint
import pytest
import torch
import triton
import triton.language as tl
from kernel_lint import LintCase, matrix_rows, streamed_bytes
from triton.language.extra.cuda import gdc_wait

from benchmarks.harness.launches import Launch, PointerArgument, key_of, on_gpu, recording, specialised
from dkv.kernels import attention, configs, gate_up, lm_head, norm, qkv, residual
from dkv.kernels.configs import AttentionConfig


@pytest.fixture(scope="module")
def compilers():
    """One process: this one interprets kernels, those there compile them."""
    with kernel_lint.workers(1) as pool:
        yield pool


def lint_tile(arch, tile):
    """Lints attention, LLaDA's shapes, with a tile that no table has."""
    case = LintCase("delayed_attention", arch, queries=tile.block_m)
    with mock.patch.object(attention, "attention_config", lambda *arguments: tile):
        return kernel_lint.lint_case(case)


def lint_odd_stride(arch):
    """Lints attention over a cache whose columns are 129 elements apart."""
    with recording(arch) as launches:
        q = torch.empty((16, 32, 128), dtype=torch.bfloat16, device="cuda:0")
        cache = torch.empty((1, 1024, 32, 129), dtype=torch.bfloat16, device="cuda:0").narrow(3, 0, 128)
        cu_seqlens_q = torch.empty(2, dtype=torch.int32, device="cuda:0")
        attention._launch(q, cache, cache, cu_seqlens_q, max_seqlen_q=16, num_splits=1)
    return kernel_lint.inspect(launches[0], arch, tensor_cores=True)


@triton.jit
def _scores_kernel(q_ptr, k_ptr, out_ptr, BLOCK: tl.constexpr, TENSOR_CORES: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    square = offs[:, None] * BLOCK + offs[None, :]
    q = tl.load(q_ptr + square)
    k = tl.load(k_ptr + square)
    if TENSOR_CORES:
        scores = tl.dot(q, tl.trans(k))
    else:
        scores = tl.sum(q[:, None, :].to(tl.float32) * k[None, :, :].to(tl.float32), 2)
    tl.store(out_ptr + square, scores)


def lint_scores(arch, dtype, in_kernel, expected):
    """Lints a product of two 16x16 matrices: by tl.dot or not, where tensor cores are expected or not."""
    with recording(arch) as launches:
        q, k = (torch.empty((16, 16), dtype=dtype, device="cuda:0") for _ in "qk")
        out = torch.empty((16, 16), dtype=torch.float32, device="cuda:0")
        _scores_kernel[(1,)](q, k, out, BLOCK=16, TENSOR_CORES=in_kernel)
    return kernel_lint.inspect(launches[0], arch, tensor_cores=expected)


@triton.jit(do_not_specialize=["splits"])
def _merge_splits_kernel(
    partial_out_ptr,
    partial_lse_ptr,
    out_ptr,
    splits,
    BLOCK_M: tl.constexpr,
    HEADDIM: tl.constexpr,
    SPLITS: tl.constexpr,
):
    offs_m = tl.arange(0, BLOCK_M)
    square = offs_m[:, None] * HEADDIM + tl.arange(0, HEADDIM)[None, :]
    acc = tl.zeros([BLOCK_M, HEADDIM], dtype=tl.float32)
    for split in range(splits):
        weight = tl.exp2(tl.load(partial_lse_ptr + split * BLOCK_M + offs_m))
        acc += weight[:, None] * tl.load(partial_out_ptr + split * BLOCK_M * HEADDIM + square)
    tl.store(out_ptr + square, acc)


def lint_merge_in_turn(arch):
    """Lints a merge that takes one split after the other."""
    with recording(arch) as launches:
        partial_out, out = (torch.empty(shape, device="cuda:0") for shape in ((4, 16, 128), (16, 128)))
        _merge_splits_kernel[(1,)](partial_out, torch.empty((4, 16), device="cuda:0"), out, 4, 16, 128, SPLITS=1)
    return kernel_lint.inspect(launches[0], arch)


@triton.jit
def _double_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr, WAITS: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    if WAITS == "first":
        gdc_wait()
    x = tl.load(x_ptr + offs)
    if WAITS == "between":
        gdc_wait()
    tl.store(out_ptr + offs, 2 * x)


def lint_wait(arch, waits):
    """Lints a kernel that uses PDL and waits first, between its load and its store, or never."""
    with recording(arch) as launches:
        x, out = (torch.empty(128, dtype=torch.float32, device="cuda:0") for _ in "xo")
        _double_kernel[(1,)](x, out, BLOCK=128, WAITS=waits, launch_pdl=True)
    return kernel_lint.inspect(launches[0], arch)


def some_tuned_cases():
    """On Hopper the largest tile of attention, of the head the largest and with noise the smallest, and every other
    kernel for LLaDA; on Ampere the smallest tile of attention and of the head."""
    hopper, ampere = (kernel_lint.tuned_cases((arch,)) for arch in (90, 80))
    attention = [case for case in hopper if case.kernel == "delayed_attention" and not case.options["pdl"]]
    head = [case for case in hopper if case.kernel == "lm_head"]
    others = {case.kernel + str(case.options.get("step")): case for case in hopper[::-1]}
    others = [case for case in others.values() if case.kernel not in ("delayed_attention", "lm_head")]
    ampere = [next(case for case in ampere if case.kernel == kernel) for kernel in ("delayed_attention", "lm_head")]
    return [attention[-1], head[3], head[4], *others, *ampere]


@pytest.mark.parametrize(
    "cases", [some_tuned_cases(), pytest.param(kernel_lint.tuned_cases(), marks=pytest.mark.full)], ids=["some", "all"]
)
def test_tuned_cases_pass(compilers, cases):
    rows = list(compilers.map(kernel_lint.lint_case, cases))
    for row in rows:
        kernel_lint.compare(row, kernel_lint.load_baseline())
    assert not [kernel_lint.format_row(row) for row in rows if row.failures]
    assert {row.kernel for row in rows} == set(kernel_lint.CALLS)
    for row in rows:
        assert 0 < row.registers <= 255 and row.instructions > 100 and row.blocks >= 1


@pytest.mark.parametrize(
    "lint, arguments, failure",
    [
        # 128 x 128 float32 accumulators in 4 warps
        (lint_tile, (80, AttentionConfig(128, 64, num_warps=4, num_stages=2)), "spills inside loops"),
        (lint_tile, (86, AttentionConfig(16, 64, num_warps=4, num_stages=4)), "102 KiB of shared memory, sm_86 has 99"),
        (lint_odd_stride, (80,), "only 0% of the streamed bytes come in loads of 16"),
        (lint_scores, (80, torch.float16, False, True), "no tensor-core instruction"),
        # wgmma takes four warps
        (lint_tile, (90, AttentionConfig(64, 32, num_warps=2, num_stages=2)), "HMMA where wgmma is possible"),
        # float32 operands are rounded to TF32 unless input_precision says otherwise
        (lint_scores, (80, torch.float32, True, False), "must be exact in float32"),
        (lint_merge_in_turn, (90,), "100% of the loads are issued after a wait for others"),
        (lint_wait, (90, "between"), "1 of its accesses to memory are before its wait"),
        (lint_wait, (120, "between"), "1 of its accesses to memory are before its wait"),
        (lint_wait, (90, "never"), "2 of its accesses to memory are before its wait"),
    ],
)
def test_every_check_can_fail(compilers, lint, arguments, failure):
    row = compilers.submit(lint, *arguments).result()
    assert failure in "; ".join(row.failures)


def test_scores_kernel_passes_where_it_should(compilers):
    row = compilers.submit(lint_scores, 80, torch.float16, True, True).result()
    assert not row.failures and set(row.tensor_core_instructions) == {"HMMA"}


def test_a_kernel_that_waits_first_passes(compilers):
    assert not compilers.submit(lint_wait, 90, "first").result().failures


def test_a_case_that_does_not_compile_fails(compilers):
    row = compilers.submit(kernel_lint.lint_case, LintCase("delayed_attention", 80, d=100)).result()
    assert len(row.failures) == 1 and row.failures[0].startswith("does not compile: CompilationError")
    assert "FAIL" in kernel_lint.format_row(row)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted here")
def test_interpreted_kernels_are_refused():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        LintCase("delayed_attention", 80).record()


SASS = """
.text._kernel:
        /*0000*/                   LDG.E.128 R4, [R2.64] ;
        /*0010*/              @!P0 STL.64 [R1+0x4], R2 ;
.L_x_0:
        /*0020*/                   LDG.E.U16 R4, [R2.64] ;
        /*0030*/               @P0 LDGSTS.E.BYPASS.128 [R89+0x8000], [R174.64], P3 ;
        /*0040*/                   HMMA.16816.F32.BF16 R72, R92.reuse, R90, R100 ;
        /*0050*/              @!P1 LDL.LU R7, [R1] ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/                   BRA `(.L_x_0) ;
.L_x_1:
        /*0080*/                   STL [R1], R0 ;
        /*0090*/                   STG.E.128 [R2.64], R4 ;
        /*00a0*/              @!P2 BRA `(.L_x_1) ;
        /*00b0*/                   EXIT ;
.L_x_2:
        /*00c0*/                   BRA `(.L_x_2);
"""


def test_sass_counts_what_is_inside_loops_that_load():
    sass = kernel_lint.Sass(SASS)
    assert len(sass.opcodes) == 13
    assert sass.loads == [2, 16] and sass.wide_bytes(16) == 16 and sass.wide_bytes(2) == 18
    assert sass.loop_spills == 1
    assert sass.tensor_core_instructions == {"HMMA": 1}


def test_accesses_before_a_wait():
    """A prefetch is none; without a wait all of them are."""
    wait = "        /*0005*/                   ACQBULK ;\n"
    prefetch = "        /*0004*/               @P0 CCTL.E.PF2 [R8] ;\n"
    head, rest = SASS.split("        /*0010*/")
    assert kernel_lint.Sass(head + prefetch + wait + "        /*0010*/" + rest).accesses_before_wait == 1
    assert kernel_lint.Sass(SASS).accesses_before_wait == 4


def test_only_innermost_loops_say_how_wide_loads_are():
    """What is loaded on the way into a loop, ahead of its first turn, is not streamed."""
    inner = SASS.split(".L_x_2:")[0]
    outer = inner.replace(".text._kernel:", ".text._kernel:\n.L_x_9:") + "        /*0100*/  BRA `(.L_x_9) ;\n"
    sass = kernel_lint.Sass(outer)
    assert sass.loads == [2, 16] and sass.loop_spills == 3


def test_loads_that_are_issued_after_a_wait():
    """Whatever reads a register that a load will fill waits for it; an address counts too, and a wide load has four."""
    loads = """
        /*0000*/                   LDG.E R8, desc[UR4][R2.64] ;
        /*0010*/                   MOV R20, 0xff800000 ;
        /*0020*/               @P0 LDG.E.128 R4, desc[UR8][R2.64+0x100] ;
        /*0030*/               @P0 LDG.E R20, desc[UR7][R2.64+0x200] ;
"""
    rest = """
        /*0050*/                   LDG.E R11, desc[UR4][R12.64] ;
        /*0060*/                   LDG.E R16, desc[UR4][R14.64] ;
"""
    uses = (
        "FADD R9, -R10, R7",
        "LDG.E R11, desc[UR4][R20.64]",
        "SHFL.BFLY PT, R9, R8, 0x8, 0x1f",
        "IADD3 R9, R10, R3, RZ",
    )
    late = [kernel_lint.Sass(f"{loads}        /*0040*/   {use} ;{rest}").late_loads for use in uses]
    assert late == [2, 3, 2, 0]
    assert kernel_lint.Sass(SASS).late_loads == 2, "every load of a loop may be waited for before the next turn"


def test_streamed_bytes():
    """Tensors that are not there do not count, nor tiles too small for wide loads; rows of the left operand."""

    def recorded(name, num_warps, **arguments):
        kernel = mock.Mock()
        kernel.fn.__name__ = f"_{name}_kernel"
        return Launch(kernel, (1,), arguments | {"num_warps": num_warps})

    bf16, fp32 = (PointerArgument(dtype, 0, 1) for dtype in (torch.bfloat16, torch.float32))
    pointers = {"x_ptr": bf16, "residual_ptr": bf16, "weight_ptr": bf16}
    assert streamed_bytes(recorded("add_rms_norm", 8, BLOCK=4096, **pointers)) == (96, 16)
    assert streamed_bytes(recorded("add_rms_norm", 8, BLOCK=4096, **pointers | {"residual_ptr": None})) == (64, 16)
    empty = PointerArgument(torch.bfloat16, 0, 0)
    assert streamed_bytes(recorded("add_rms_norm", 8, BLOCK=4096, **pointers | {"residual_ptr": empty})) == (64, 16)
    assert streamed_bytes(recorded("swiglu", 4, BLOCK=128, gate_up_ptr=fp32)) == (8, 4)
    sizes = {"BLOCK_R": 16, "BLOCK_V": 128, "BLOCK_D": 64}
    head = recorded("lm_head", 8, VOCAB_FIRST=True, hidden_ptr=bf16, weight_ptr=bf16, **sizes)
    assert streamed_bytes(head) == (64, 16) and matrix_rows(head) == 128
    assert matrix_rows(recorded("lm_head", 8, VOCAB_FIRST=False, **sizes)) == 16
    assert streamed_bytes(recorded("pack_positions", 4, BLOCK=1024)) == (0, 16)


def test_resident_blocks():
    hopper, ada = kernel_lint.ARCHITECTURES[90], kernel_lint.ARCHITECTURES[89]
    # by registers: 168 x 32 a warp, 12 of them; by shared memory: 113 KiB each with what the system takes; by warps
    assert kernel_lint.resident_blocks(hopper, registers=168, shared=0, warps=4) == 3
    assert kernel_lint.resident_blocks(hopper, registers=32, shared=112 * 1024, warps=4) == 2
    assert kernel_lint.resident_blocks(hopper, registers=32, shared=0, warps=4) == 16
    assert kernel_lint.resident_blocks(ada, registers=32, shared=0, warps=4) == 12
    assert kernel_lint.resident_blocks(ada, registers=255, shared=0, warps=8) == 1


def test_comparison_with_the_baseline(tmp_path):
    def row(**changes):
        figures = dict(registers=100, stack=8, shared=1024)
        return kernel_lint.LintRow("k", "c", 90, 64, "", **(figures | changes), **rest)

    rest = dict(loop_spills=0, blocks=1, tensor_core_instructions={}, load_bytes=16, wide_share=1.0, instructions=9)
    with mock.patch.object(kernel_lint, "BASELINES", tmp_path / "compile"):
        assert kernel_lint.load_baseline() == {}
        kernel_lint.save_baseline([row(failures=[])], complete=True)
        baseline = kernel_lint.load_baseline()

    def compared(**changes):
        changed = row(failures=[], **changes)
        kernel_lint.compare(changed, baseline)
        return changed.changes, changed.failures

    assert compared() == ([], [])
    assert compared(registers=104, shared=0) == (["registers +4", "shared -1024 B"], [])
    assert compared(stack=16) == ([], ["spills 16 B, before 8 B"])
    assert compared(stack=0) == ([], [])


def test_cases_cover_the_tables_of_products():
    """Every tile, once with one split and once with several, and where there is PDL both ways."""
    for arch in kernel_lint.ARCHITECTURES:
        cases = [case for case in kernel_lint.all_cases((arch,)) if case.kernel in kernel_lint.PRODUCTS]
        table = configs.PRODUCT[{80: 80, 90: 90, 100: 90}.get(arch, 86)]
        for kernel in kernel_lint.PRODUCTS:
            rows = {case.options["rows"] for case in cases if case.kernel == kernel and case.dtype == "bf16"}
            assert len(rows) == len(table[1 if kernel == "linear_add_norm" else 2])
            for count in rows:
                options = [case.options for case in cases if case.kernel == kernel and case.options["rows"] == count]
                assert {options["splits"] for options in options} >= {1, 4}
                assert {options["pdl"] for options in options} == ({False, True} if arch >= 90 else {False})


def test_cases_cover_the_tables():
    """A tile that enters a table enters the cases by itself, and every tile that is there can be picked."""
    device = torch.device("cuda:0")
    for arch in kernel_lint.ARCHITECTURES:
        for name, dtype in kernel_lint.DTYPES.items():
            queries = kernel_lint.tile_queries(arch, name, group=1)
            with on_gpu(arch):
                tiles = {configs.attention_config(device, dtype, count) for count in queries}
            assert tiles == set(configs.attention_table(arch, dtype))
            for noise in (False, True):
                rows = kernel_lint.head_rows(arch, name, noise)
                with on_gpu(arch):
                    tiles = {configs.lm_head_config(device, dtype, count, noise) for count in rows}
                assert tiles == set(configs.lm_head_table(arch, dtype, noise))
    cases = kernel_lint.all_cases()
    assert len({f"{case.kernel} {case} {case.arch}" for case in cases}) == len(cases)
    sizes = {"delayed_attention": "d", "merge_splits": "d", "rope_cache": "d", "linear_rope_cache": "headdim"}
    for kernel, headdim in sizes.items():
        assert {(case.dtype, case.options[headdim]) for case in cases if case.kernel == kernel} == {
            (dtype, headdim) for dtype in kernel_lint.DTYPES for headdim in (16, 32, 64, 128)
        }


def test_launchers_never_wait_for_the_gpu(compilers):
    """Under fake tensors a launcher cannot read a value; every option of every launcher gets through."""
    cases = [LintCase(kernel, 90, "fp32") for kernel in kernel_lint.CALLS if kernel != "merge_splits"]
    cases += [
        LintCase(kernel, 90, splits=2, bounds=bounds, key_mask=mask, key_index=index)
        for kernel in ("delayed_attention", "merge_splits")
        for bounds, mask, index in ((True, False, False), (False, True, False), (False, False, True))
    ]
    cases += [
        LintCase("add_rms_norm", 90, residual=False),
        LintCase("lm_head", 90, rows=256, noise=True, round_logits=True),
        LintCase("commit_tokens", 90, "fp32", rule="threshold"),
        LintCase("commit_tokens", 90, "fp32", rule="factor"),
    ]
    assert list(compilers.map(launches_by_name, cases)) == [case.kernel for case in cases]


def loads_and_shared_memory(case):
    """The bytes of each load in the loop, and the shared memory of the tiles in flight."""
    found = []

    class Kept(kernel_lint.Sass):
        def __init__(self, text):
            super().__init__(text)
            found.append(self)

    with mock.patch.object(kernel_lint, "Sass", Kept):
        row = kernel_lint.lint_case(case)
    return found[0].loads, row.shared


@pytest.mark.parametrize("arch", [90])
def test_key_mask_and_key_index_leave_the_loop_as_it_is(compilers, arch):
    """A mask is loaded once a tile of 64, not for each layout that needs it; K and V stay in flight behind an index."""
    options = ({}, {"key_mask": True}, {"key_index": True})
    cases = [LintCase("delayed_attention", arch, queries=32, splits=2, **option) for option in options]
    (_, shared), (masked, masked_shared), (indexed, indexed_shared) = compilers.map(loads_and_shared_memory, cases)
    assert sorted(masked) == [1, 1] + [16] * 16
    assert masked.count(16) == indexed.count(16)
    assert shared == masked_shared == indexed_shared


@pytest.mark.parametrize("heads", [(32, 0), (0, 4)])
def test_rope_of_queries_or_keys_alone_compiles(compilers, heads):
    row = compilers.submit(kernel_lint.lint_case, LintCase("rope_cache", 90, heads=heads)).result()
    assert row.registers > 0 and row.stack == 0


def specialisations(calls):
    """How many different kernels of each name Triton's JIT makes for some calls: the arguments of `empty_head`."""
    kinds = {}
    with recording(90) as launches:
        for call in calls:
            empty_head(**call)
    for each in launches:
        source, _, options = specialised(each, 90)
        kinds.setdefault(each.name, set()).add(key_of(source, options))
    return {name: len(keys) for name, keys in kinds.items()}


def empty_head(rows=32, *, noise=False, scales=False, batch=None, offset=0, **options):
    """A launch on the fake GPU; tensors of rows begin `offset` elements behind an aligned address."""

    def of_rows(dtype):
        return torch.empty(rows + offset, dtype=dtype, device="cuda:0").narrow(0, offset, rows)

    hidden, weight = (torch.empty(n, 4096, dtype=torch.bfloat16, device="cuda:0") for n in (rows, 126464))
    if noise:
        options |= {"noise_scale": 1.0, "noise_key": of_rows(torch.int64)} | options
    if scales:
        options |= {name: of_rows(torch.float32) for name in ("logit_scale", "noise_scale")[: 1 + noise]}
    if batch is not None:
        counts = torch.empty(batch + 1 + offset, dtype=torch.int32, device="cuda:0")
        options["cu_seqlens"] = counts.narrow(0, offset, batch + 1)
    lm_head._launch(hidden, weight, **options)


IDS = ((), (0,), (1,), (16,), (126463,), (1, 2, 3), range(7))
VALUES = [
    *({"exclude_ids": tuple(ids)} for ids in IDS),
    *({"rows": rows} for rows in (17, 18, 31)),
    *({"batch": batch} for batch in (0, 1, 8, 16)),
    *({"batch": 3, "offset": offset} for offset in (1, 2)),
]


def test_values_compile_no_head_anew(compilers):
    """One kernel for all ids, numbers of rows that take the same tile, counts, scales and keys."""
    groups = [
        [{}, *VALUES, {"logit_scale": 0.5}, {"logit_scale": 1}, {"exclude_ids": None}],
        [{"noise": True, **call} for call in ({}, {"noise_scale": 0.5}, *VALUES)],
        [{"noise": True, "scales": True, **call} for call in ({}, *VALUES)],
        # one row, which Triton takes for a constant elsewhere; any number of blocks
        [{"rows": rows} for rows in (1, 2, 16)],
        [{"rows": rows, "batch": batch} for rows in (65, 128, 129, 4096, 100_000) for batch in (None, 4)],
        # what is different
        [{"rows": 16}, {"rows": 32}, {"noise": True}, {"scales": True}],
    ]
    counts = list(compilers.map(specialisations, groups))
    assert counts == [{"lm_head": 1, "merge_confidence": 1}] * 5 + [{"lm_head": 4, "merge_confidence": 3}]


def products_of(rows, seqlen):
    """How many different kernels the products compile for these numbers of rows and lengths of the cache."""
    kinds = {}
    for count in rows:
        for length in seqlen:
            with recording(90) as launches:
                like = {"dtype": torch.bfloat16, "device": "cuda:0"}
                x, places = torch.empty(count, 512, **like), torch.empty(count, dtype=torch.int64, device="cuda:0")
                angles = torch.empty(length, 64, dtype=torch.float32, device="cuda:0")
                caches = [torch.empty(3, length, 1, 128, **like) for _ in "kv"]
                weight, norm_weight = torch.empty(512, 512, **like), torch.empty(512, **like)
                normed = norm._launch_deferred_norm(x, norm_weight)
                qkv._launch(normed, 1e-5, weight, None, angles, angles, places, places, *caches)
                gate_up._launch(normed, 1e-5, weight)
                residual._launch(x, weight, torch.empty_like(x), norm_weight)
            for each in launches:
                source, _, options = specialised(each, 90)
                kinds.setdefault(each.name, set()).add(key_of(source, options))
    return {name: len(keys) for name, keys in kinds.items()}


def test_values_compile_no_product_anew(compilers):
    """One kernel of each for all numbers of rows that take the same tile, and all lengths of the cache."""
    found = compilers.submit(products_of, (1, 2, 3, 8, 15, 16), (1, 77, 1024)).result()
    assert found == {"deferred_norm": 1, **dict.fromkeys(kernel_lint.PRODUCTS, 1)}
    # of two blocks of rows, too
    assert compilers.submit(products_of, (129, 160, 255, 256), (1,)).result() == found
    different = compilers.submit(products_of, (16, 32), (1,)).result()
    assert different == {"deferred_norm": 1, **dict.fromkeys(kernel_lint.PRODUCTS, 2)}


def launches_by_name(case):
    return case.record().name


@pytest.mark.parametrize(
    "read", [lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: x.cpu(), lambda x: bool(x.any())]
)
def test_a_host_read_is_noticed(read):
    with recording(90), pytest.raises(Exception, match="_local_scalar_dense|touches the CPU"):
        read(torch.empty(3, dtype=torch.int32, device="cuda:0"))


def test_command_line(tmp_path, capsys):
    """The exit status says whether a case failed; --baseline keeps the figures."""

    def lint(cases, baseline, processes):
        assert {case.arch for case in cases} == {90}
        row = kernel_lint.LintRow(
            "k", "c", 90, 64, "64x64", 100, 8, 0, 1024, 2, {"HGMMA": 8}, 16, 1.0, 9, list(failures)
        )
        kernel_lint.compare(row, baseline)
        yield row

    failures = []
    with mock.patch.object(kernel_lint, "lint", lint), mock.patch.object(kernel_lint, "BASELINES", tmp_path):
        assert kernel_lint.main(["--arch", "90", "--baseline"]) == 0
        (kept,) = json.loads(next(tmp_path.iterdir()).read_text()).values()
        assert kept["registers"] == 100
        failures = ["no tensor-core instruction"]
        assert kernel_lint.main(["--arch", "90"]) == 1
    printed = capsys.readouterr().out
    assert "FAIL: no tensor-core instruction" in printed and "1 compiled, 1 failed" in printed
    assert f"compared with triton-{triton.__version__}.json" in printed
