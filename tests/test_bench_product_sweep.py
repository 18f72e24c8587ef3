"""product_sweep measures both ways of a product, leaves out what is wrong, and writes the table that the kernels read."""

import functools
import json
from types import SimpleNamespace

import pytest
import torch

import dkv
from benchmarks import product_sweep, warm
from benchmarks.harness import common, products
from benchmarks.harness.fake_gpu import fake_gpu, fake_model, fake_run
from benchmarks.harness.launches import Launch, on_gpu
from benchmarks.harness.models import dream, llada, model_config
from dkv.kernels import configs, reference

CUDA = torch.device("cuda", 0)
SIZES = {"hidden": 128, "mlp": 384, "layers": 1, "heads": 2, "vocabulary": 256, "mask": 255, "eos": 254}
MODELS = {"LLaDA": ("LLaDA", llada(**SIZES)), "Dream": ("Dream", dream(**SIZES, kv_heads=1))}
# the products of that LLaDA
LAYER = [("qkv", (384, 128)), ("residual", (128, 128)), ("gate_up", (768, 128)), ("residual", (128, 384))]


@pytest.fixture
def small(monkeypatch, standing_clock):
    """A CPU, and models that cost nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(product_sweep, "SCALED_DOWN", MODELS)


@pytest.fixture
def as_h100(monkeypatch, small):
    """A CPU that is taken for the GPU that the table is about; the twins run."""
    monkeypatch.setattr(configs, "architecture", lambda device: 90)
    monkeypatch.setattr(configs, "num_sms", lambda device: 132)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The path of a table in place of kernels/fused_products.json, empty as that one is before anything was measured."""
    monkeypatch.setattr(configs, "__file__", str(tmp_path / "configs.py"))
    configs._measured_products.cache_clear()
    path = tmp_path / "fused_products.json"
    path.write_text('{"products": []}')
    yield path
    configs._measured_products.cache_clear()


def swept(path, *options, rows="16,32", status=0):
    """(the JSON lines of a sweep behind the first one, the table behind it)."""
    out = path.with_name("sweep.jsonl")
    assert product_sweep.main(["--rows", rows, "--table", str(path), "--out", str(out), *options]) == status
    environment, *lines = map(json.loads, out.read_text().splitlines())
    assert environment["device"].startswith("CPU")
    configs._measured_products.cache_clear()
    return lines, json.loads(path.read_text())


@pytest.fixture
def measured(monkeypatch):
    """A function that makes times: of a launch as `us` says, of the library 100 us; nothing waits for a clock."""

    def make(us):
        def measure(case, launches, *rest):
            rows = [({"setting": "default"}, 120.0), ({"setting": "cublaslt"}, 100.0)]
            return rows + [({"config": vars(launch)}, us(case, launch)) for launch in launches], []

        monkeypatch.setattr(product_sweep, "measure", measure)

    return make


def test_a_sweep_writes_the_table_that_is_read(table, as_h100, measured, monkeypatch):
    """The fastest launch is picked up to its number of rows; ours pays where the sum over a layer says so."""
    # with 16 rows ours is the faster one but for down, with 32 only down is
    faster = lambda case: (case.x.shape[0] == 16) == (case.shape[1] != 384)
    measured(lambda case, launch: (60.0 if faster(case) else 120.0) + launch.num_stages)
    launch = {"block_n": 64, "block_r": 16, "block_k": 64, "num_warps": 4, "num_stages": 3}
    of_another_gpu = {"arch": 80, "kind": "qkv", "out_features": 384, "in_features": 128, "rows": 16, "config": launch}
    of_another_gpu |= {"us": 50, "library_us": 60}
    table.write_text(json.dumps({"products": [of_another_gpu]}))
    lines, written = swept(table)
    assert written["products"].pop(0) == of_another_gpu
    table.write_text(json.dumps(written))
    for row in written["products"]:
        assert all(row[key] for key in ("device", "date", "torch", "triton", "commit"))
    # two models, four products, two numbers of rows
    assert len(written["products"]) == 16 and {row["arch"] for row in written["products"]} == {90}
    assert all(row["library_us"] == 100 for row in written["products"])
    assert {line["setting"] for line in lines if "setting" in line} == {"default", "cublaslt"}
    for row in written["products"]:
        stages = row["config"]["num_stages"]
        tried = [line["config"] for line in lines if "config" in line and line["rows"] == row["rows"]]
        assert row["config"] in tried and row["us"] in (60 + stages, 120 + stages)
        shape = row["out_features"], row["in_features"]
        for rows in (row["rows"] - 5, row["rows"]):
            launch = configs.product_config(CUDA, torch.bfloat16, row["kind"], rows, shape)
            assert launch == configs.ProductConfig(**row["config"])
        assert stages == min(each["num_stages"] for each in tried)
    for rows, pays in ((1, True), (16, True), (17, False), (32, False), (33, False)):
        assert configs.fused_products_pay(CUDA, torch.bfloat16, rows, LAYER) is pays
    # no float32, no other GPU
    assert not configs.fused_products_pay(CUDA, torch.float32, 16, LAYER)
    monkeypatch.setattr(configs, "architecture", lambda device: 100)
    assert not configs.fused_products_pay(CUDA, torch.bfloat16, 16, LAYER)


# microseconds by kind, where the library takes 100 for each of the four
@pytest.mark.parametrize("us, fused", [({}, True), ({"qkv": 140, "gate_up": 190}, False), ({"residual": 150}, False)])
def test_generate_goes_by_the_table(us, fused, table, as_h100, measured, monkeypatch, unpoisoned):
    measured(lambda case, launch: us.get(case.kind, 60.0))
    swept(table)
    monkeypatch.undo()
    monkeypatch.setattr(configs, "__file__", str(table.with_name("configs.py")))
    for rows, ours in ((32, fused), (40, False)):
        with fake_gpu(90) as launches, torch.no_grad():
            current = fake_run(fake_model(MODELS["LLaDA"][1]), dkv.NoCache(), batch=1, prompt=8, gen_length=rows - 8)
            current.compute(current.next_room())
        names = {launch.name for launch in launches if isinstance(launch, Launch)}
        assert ("linear_swiglu" in names) is ours and ("swiglu" in names) is not ours


def test_a_wrong_candidate_is_left_out(table, as_h100, monkeypatch):
    """Also one that fails, or writes nothing: each is reported, the others make the table."""
    swiglu = reference.linear_swiglu

    def broken(normed, eps, weight, *, semaphores, config):
        fault = FAULTS.get((config.block_n, config.block_k))
        if fault == "fails":
            raise RuntimeError("out of resource: shared memory")
        out = swiglu(normed, eps, weight)
        return {"writes nothing": torch.empty(out.shape), "mixes up columns": out.roll(1, dims=1)}.get(fault, out)

    ours = SimpleNamespace(**{name: accepting(getattr(reference, name)) for name in NAMES}, linear_swiglu=broken)
    monkeypatch.setattr(products, "direct", lambda impl, tensor: ours)
    monkeypatch.setattr(product_sweep, "SCALED_DOWN", {"LLaDA": MODELS["LLaDA"]})
    lines, written = swept(table, rows="16", status=1)
    failed = {}
    for line in lines:
        assert ("error" in line) == ("us" not in line)
        if "error" in line:
            assert line["product"] == "gate, up"
            failed[line["config"]["block_n"], line["config"]["block_k"]] = line["error"]
    assert failed.keys() == FAULTS.keys()
    for tile, error in failed.items():
        expected = {"fails": "shared memory", "writes nothing": "by nan"}.get(FAULTS[tile], "off its twin by")
        assert expected in error
    (best,) = (row["config"] for row in written["products"] if row["kind"] == "gate_up")
    assert (best["block_n"], best["block_k"]) == (128, 128)


FAULTS = {(64, 64): "mixes up columns", (64, 128): "fails", (128, 64): "writes nothing"}
NAMES = ("deferred_norm", "add_rms_norm", "swiglu", "rope_cache_update", "linear_rope_cache_update", "linear_add_norm")


def accepting(twin):
    """The twin in place of a kernel, which takes a config."""
    return lambda *arguments, config=None, **options: twin(*arguments, **options)


def without_caches(twin, *arguments, **options):
    *others, k_cache, v_cache = arguments
    return twin(*others, k_cache.clone(), v_cache, **options)


def elsewhere(twin, normed, eps, weight, bias, cos, sin, positions, slots, *caches, **options):
    """Also where no token is."""
    for cache in caches:
        cache[0, (slots.max() + 1) % cache.shape[1]] = 1
    return twin(normed, eps, weight, bias, cos, sin, positions, slots, *caches, **options)


def without_residual(twin, x, weight, residual, norm_weight, **options):
    return twin(x, weight, residual.clone(), norm_weight, **options)


def without_squares(twin, *arguments, **options):
    weighted, square_sums = twin(*arguments, **options)
    return reference.DeferredNorm(weighted, square_sums.roll(1, 1))


@pytest.mark.parametrize(
    "name, operator, fault",
    [
        ("Q, K, V", "linear_rope_cache_update", without_caches),
        ("Q, K, V", "linear_rope_cache_update", elsewhere),
        ("output", "linear_add_norm", without_residual),
        ("down", "linear_add_norm", without_squares),
    ],
)
def test_the_check_sees_everything_that_a_kernel_leaves(name, operator, fault, small, monkeypatch):
    """Not the returned rows alone."""
    twins = {each: accepting(getattr(reference, each)) for each in (*NAMES, "linear_swiglu")}
    faulty = functools.partial(fault, getattr(reference, operator))
    for right, kernels in ((True, twins), (False, twins | {operator: accepting(faulty)})):
        monkeypatch.setattr(products, "direct", lambda impl, tensor, k=kernels: SimpleNamespace(**k))
        torch.manual_seed(0)
        made = products.cases(
            model_config(MODELS["Dream"][1]), 5, device=torch.device("cpu"), dtype=torch.float32, copies=1
        )
        case, launch = next((case, launches[0]) for found, case, launches in made if found == name)
        if right:
            case.check(launch)
        else:
            with pytest.raises(RuntimeError, match="off its twin"):
                case.check(launch)


def test_a_budget_may_end_anywhere(table, as_h100, measured, monkeypatch, capsys):
    """The table has the whole layer of a model, or nothing of it."""
    measured(lambda case, launch: 50.0)
    looks = iter(range(1000))
    # the clock is looked at before each product: it stops in the second model's, at 32 rows
    monkeypatch.setattr(common.Clock, "spent", property(lambda clock: next(looks)))
    _, written = swept(table, "--budget", "13")
    found = [(row["rows"], row["kind"]) for row in written["products"]]
    assert len(found) == 12 and found[8:] == [(32, kind) for kind in products.KINDS.values()]
    assert "not run, the budget is used up" in capsys.readouterr().out
    table.write_text('{"products": []}')
    looks = iter(range(1000))
    assert swept(table, "--budget", "2", status=1)[1] == {"products": []}


def test_a_rehearsal_without_a_gpu(table, small):
    """The twins are timed; what comes out applies to no GPU."""
    _, written = swept(table, rows="3")
    assert len(written["products"]) == 8 and all(row["us"] > 0 and row["library_us"] > 0 for row in written["products"])
    assert {row["arch"] for row in written["products"]} == {None}


def test_the_library_alone(tmp_path, small, monkeypatch):
    """Every product of both models, and the heads; without a budget the first weight alone."""
    monkeypatch.setattr(products, "COLD_BYTES", 1)
    monkeypatch.setattr(common, "measure_ceilings", lambda: {"bandwidth": 1e10, "flops": 1e11})
    for budget, weights in (("1", 2 * 5), ("-1", 1)):
        out = tmp_path / "products.jsonl"
        assert product_sweep.main(["--library", "--rows", "1,3", "--budget", budget, "--out", str(out)]) == 0
        _, *rows = map(json.loads, out.read_text().splitlines())
        assert len(rows) == 2 * weights and all(row["setting"] == "default" for row in rows)
        assert all(row["us"] > 0 and row["gbps"] > 0 and row["fraction_of_floor"] > 0 for row in rows)
    with pytest.raises(SystemExit):
        product_sweep.main(["--rows", "1,x"])


@pytest.mark.parametrize("arch", [80, 86, 90, 120])
@pytest.mark.parametrize(
    "kind, shape", [("qkv", (12288, 4096)), ("gate_up", (37888, 3584)), ("residual", (4096, 4096))]
)
def test_candidates_fit_and_differ(kind, shape, arch):
    """Few enough to be compiled and timed; the launch that is taken today is among them."""
    limits = products.ARCHITECTURES[arch]
    tiles = configs.WEIGHT_TILES[kind]
    with on_gpu(arch):
        for rows in products.ROWS_GPU:
            found = products.candidates(CUDA, kind, rows, shape)
            assert found[0] == configs.product_config(CUDA, torch.bfloat16, kind, rows, shape)
            assert len(set(found)) == len(found) and 3 <= len(found) <= 1 + products.MAX_CANDIDATES
            for launch in found:
                assert launch.block_r >= min(rows, 64)
                bytes_of_a_stage = 2 * launch.block_k * (tiles * launch.block_n + launch.block_r)
                assert launch.num_stages * bytes_of_a_stage <= 1024 * limits.shared_per_block
            assert len({(launch.block_n, launch.block_k, launch.splits) for launch in found}) >= 2


def test_what_a_sweep_launches_is_compiled_beforehand(unpoisoned):
    """Every candidate of both models, and the launches of the library's way."""
    with fake_gpu(90) as launches, torch.no_grad():
        products.launch_all([16])
    found = [launch for launch in launches if isinstance(launch, Launch)]
    names = {launch.name for launch in found}
    assert names >= {"linear_rope_cache", "linear_swiglu", "linear_add_norm", "rope_cache", "swiglu", "add_rms_norm"}
    assert warm.parse_arguments(["--sweep"]).sweep == () and warm.parse_arguments(["--sweep"]).steps == []
    heads = {launch.arguments["NHEADS"] for launch in found if launch.name == "linear_rope_cache"}
    assert heads == {32, 28}
    with on_gpu(90):
        tried = set(products.candidates(CUDA, "gate_up", 16, (24576, 4096)))
    compiled = {tuple(launch.arguments[name] for name in TILE) for launch in found if launch.name == "linear_swiglu"}
    assert {(each.block_n, each.block_r, each.block_k, each.splits, each.num_stages) for each in tried} <= compiled


TILE = ("BLOCK_N", "BLOCK_R", "BLOCK_K", "SPLITS", "num_stages")
