"""The promises of a run to a GPU: no step waits for the host, and steps can be recorded once and replayed.

Without a GPU, sizes are bounded on the CPU as they are there; the steps run on fake CUDA tensors, which have no values
to read; and a tape of the operations of a step stands for its CUDA graph.
"""

import contextlib
import copy
import gc
import weakref
from types import SimpleNamespace
from unittest import mock

import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny import EOS_ID as EOS
from tiny import FAMILIES, POLICIES, Alternating, generate, model, prompts
from tiny import MASK_ID as MASK
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils._pytree import tree_leaves, tree_map
from utils import pairwise

import dkv
from benchmarks.harness.fake_gpu import fake_gpu, fake_model, fake_run
from benchmarks.harness.launches import OnlyOnTheDevice
from benchmarks.harness.models import with_layers
from dkv import model_runner, rooms, run, session
from dkv.cuda_graphs import recording
from dkv.generation import prepare
from dkv.kernels import reference
from dkv.memory import memory_of
from dkv.schedule import Schedule


def options_of(policy, family):
    """Options of `generate` for a policy of POLICIES by name."""
    policy = POLICIES[policy](family)
    return {"policy": policy, "remasking": "random" if policy.needs_order else None}


def assert_same_run(one, other):
    assert torch.equal(one.history, other.history) and torch.equal(one.active, other.active)
    assert torch.equal(one.sequences, other.sequences)


DECODINGS = {
    "fixed": {},
    "guidance and noise": {"cfg_scale": 1.5, "temperature": 0.7},
    "threshold": {"steps": None, "threshold": 0.02, "temperature": 0.7, "top_p": 0.9},
    "early stop": {"eos_early_stop": True, "eos_token_id": list(range(0, 250, 2))},
}


@pairwise(
    "family, largest, policy, decoding",
    FAMILIES,
    [2048, 0],
    list(POLICIES),
    list(DECODINGS),
    # Greedy needs a known order
    where=lambda family, largest, policy, decoding: decoding != "threshold" or not policy.startswith("Greedy"),
)
def test_bounded_sizes_change_nothing(family, largest, policy, decoding, device, monkeypatch, sized_as_on_a_gpu):
    """With room for more positions than there are, known before or read, every step is the same."""
    ids, real = prompts(11, 4, 7, device=device)
    options = {"gen_length": 16, "block_length": 8, "steps": 12, **options_of(policy, family)} | DECODINGS[decoding]
    exact = generate(family, ids, real, device=device, **options)
    dkv.reset(model(family, device))
    sized_as_on_a_gpu()
    monkeypatch.setattr(rooms, "LARGEST_GRAPH", largest)
    assert_same_run(generate(family, ids, real, device=device, **options), exact)


@pairwise("family, policy, lengths", FAMILIES, list(POLICIES), [(16, 8, 16), (18, 5, 7), (12, 12, 30), (9, 2, 9)])
def test_forecasts_come_true(family, policy, lengths):
    """Counts exactly, active positions from above; a policy that caches promises less than everything."""
    gen_length, block_length, steps = lengths
    ids, real = prompts(30, 22)
    options = {"gen_length": gen_length, "block_length": block_length, "steps": steps, **options_of(policy, family)}
    current = prepare(model(family), ids, real, **options)
    promised = []
    for forecast in current.forecasts:
        state, policy = current.state, options["policy"]
        assert state.running.all()
        assert (state.masked.sum(1) == forecast.masks_before(0)).all()
        assert (state.in_block.sum(1) == forecast.block_masks).all()
        assert (state.block_step == forecast.block_step).all() and (state.block == forecast.block).all()
        before = state.masked.sum(1)
        promised.append(min(policy.max_active(forecast), forecast.length))
        assert current.active.sum(1).max() <= (promised[-1] if forecast.step else forecast.length)
        current.step()
        assert (before - state.masked.sum(1) == forecast.commits).all()
    assert not current.state.running.any()
    current.finish()
    if steps == 16 and not isinstance(policy, dkv.NoCache):
        assert min(promised[1:]) < current.longest


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 60),
    st.booleans(),
)
def test_forecasts_commit_everything_once(gen_length, block_length, steps, time_steps):
    schedule = Schedule(
        steps=steps,
        gen_length=gen_length,
        block_length=min(block_length, gen_length),
        time_steps=time_steps,
        eps=1e-3,
    )
    forecasts = schedule.forecasts(gen_length + 3, shifted=time_steps)
    assert sum(f.commits for f in forecasts) == gen_length
    assert len(forecasts) <= max(steps, len(schedule.lengths))
    assert [f.step for f in forecasts] == list(range(len(forecasts)))
    assert all(f.masks_before(0) >= f.block_masks >= f.commits for f in forecasts)


def test_a_policy_without_a_promise(device, sized_as_on_a_gpu):
    """The host reads the sizes at each step, whatever is known beforehand."""
    options = {"gen_length": 12, "block_length": 6, "policy": Alternating(), "device": device}
    ids, real = prompts(11, 4, 7, device=device)
    want = generate("dream", ids, real, **options)
    dkv.reset(model("dream", device))
    sized_as_on_a_gpu()
    assert_same_run(generate("dream", ids, real, **options), want)
    assert memory_of(model("dream", device)).run.graphs is None


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.full) for seed in (2, 3))])
def test_in_a_known_order_no_step_lacks_room(seed, device, monkeypatch, sized_as_on_a_gpu):
    """The tokens of the next step are predicted by positions that this one need not recompute."""
    options = {"gen_length": 24, "block_length": 12, "policy": dkv.Decode(None, shift="right"), "remasking": "random"}
    options["order"] = torch.rand(3, 24, generator=torch.Generator().manual_seed(seed)).argsort(1).to(device)
    ids, real = prompts(11, 4, 7, device=device)
    want = generate("dream", ids, real, device=device, **options)
    dkv.reset(model("dream", device))
    sized_as_on_a_gpu()
    monkeypatch.setattr(rooms, "TILE", 1)
    assert_same_run(generate("dream", ids, real, device=device, **options), want)


def test_what_reads_from_the_device_is_not_recorded(monkeypatch):
    """A window around what is decoded next, in a policy that has an `active` of its own."""

    class Wider(dkv.Greedy):
        def active(self, state):
            return super().active(state) | state.masked

    monkeypatch.setattr(model_runner.ModelRunner, "can_be_recorded", True)
    monkeypatch.setattr(run, "StepGraphs", lambda device: SimpleNamespace(captured=0, capture_seconds=0.0))
    options = {"gen_length": 4, "remasking": "random"}
    for policy, recorded in ((dkv.Greedy(3, 2), True), (Wider(3, 2), False)):
        current = prepare(model("llada"), prompts(5)[0], policy=policy, **options)
        assert (current.graphs is not None) == recorded


def test_a_promise_that_is_too_small_is_an_error(sized_as_on_a_gpu):
    class Optimist(dkv.NoCache):
        def max_active(self, forecast):
            return 4

    sized_as_on_a_gpu()
    with pytest.raises(
        RuntimeError, match=r"Optimist\(\).max_active promised fewer positions of a row than were active: \d+"
    ):
        generate("llada", prompts(40)[0], gen_length=8, policy=Optimist())


class Recorded(TorchDispatchMode):
    """Operations on tensors, for a replay on new values: what a CUDA graph of them would do.

    Tensors that no operation made are the static memory; a read of a value by the host is an error, as in a capture.
    """

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func) and "nonzero" not in str(func), f"{func} reads from the device"
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def replay(self, outputs):
        """Does the operations again; returns what stands for the recorded `outputs` now."""
        current = {}

        def of_now(leaf):
            return current.get(id(leaf), leaf) if isinstance(leaf, torch.Tensor) else leaf

        for func, args, kwargs, recorded in self.operations:
            result = func(*tree_map(of_now, args), **tree_map(of_now, kwargs))
            for old, new in zip(tree_leaves(recorded), tree_leaves(result), strict=True):
                if isinstance(old, torch.Tensor) and id(old) not in current:
                    current[id(old)] = new
        return tree_map(of_now, outputs)


class TapedGraphs:
    """Stands for `StepGraphs`: the first run of a key is eager, the second recorded, the others replayed."""

    def __init__(self):
        self.captured, self.capture_seconds, self.replays, self.seen, self.tapes = 0, 0.0, 0, set(), {}

    def run(self, key, function):
        if key not in self.seen:
            self.seen.add(key)
            return function()
        if key in self.tapes:
            self.replays += 1
            tape, outputs = self.tapes[key]
            return tape.replay(outputs)
        tape = Recorded()
        with tape:
            outputs = function()
        self.tapes[key] = tape, outputs
        self.captured += 1
        return outputs


class TapedOperators:
    """The PyTorch twins, which read from the device: each is one operation on a tape."""

    def __getattr__(self, name):
        function = getattr(reference, name)

        def call(*args, **kwargs):
            modes = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, Recorded)]
            with _disable_current_modes():
                result = function(*args, **kwargs)
            for tape in modes:
                tape.operations.append((function, args, kwargs, result))
            return result

        return call


def take_tapes(monkeypatch, owner):
    """Instances of `owner` get `TapedGraphs` for graphs, and each of our operators is one operation on the tapes."""
    monkeypatch.setattr(model_runner, "direct", lambda impl, tensor: TapedOperators())
    taped = property(lambda self: self.__dict__.setdefault("taped", TapedGraphs()), lambda self, value: None)
    monkeypatch.setattr(owner, "graphs", taped, raising=False)


@pytest.mark.parametrize(
    "family, options",
    [
        ("llada", {"policy": dkv.Decode(4), "block_length": 8}),
        ("llada", {"policy": dkv.DualCache(), "block_length": 8, "temperature": 0.7}),
        ("dream", {"policy": dkv.PrefillDecode(3)}),
        ("dream", {"policy": dkv.Decode(4, shift="un"), "alg_temp": 0.5, "cfg_scale": 1.0}),
    ],
    ids=["Decode", "DualCache and noise", "PD", "Decode un, noise and guidance"],
)
def test_replayed_steps_are_the_steps(family, options, monkeypatch, sized_as_on_a_gpu):
    """Two batches of other lengths, one after the other, on the same recorded steps."""
    if torch.cuda.is_available():
        pytest.skip("on a GPU, test_graphs_change_nothing takes real graphs")
    llm, options = model(family, "cpu"), options | {"gen_length": 16, "steps": 16}
    sized_as_on_a_gpu()
    eager = [generate(family, ids, real, **options) for ids, real in (prompts(9, 5), prompts(6, 12, seed=1))]
    dkv.reset(llm)
    take_tapes(monkeypatch, run.Run)
    for (ids, real), want in zip((prompts(9, 5), prompts(6, 12, seed=1)), eager, strict=True):
        assert_same_run(generate(family, ids, real, **options), want)
    idle = memory_of(llm).run
    assert idle.graphs.replays >= 16, "hardly a step was replayed"
    dkv.reset(llm)


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_steps_under_a_foreign_loop(family, monkeypatch, device):
    """Two prompts one after the other, through the same session memory; and one the loop changes under its feet."""
    llm = copy.deepcopy(model(family, device))

    @torch.no_grad()
    def outputs():
        found = []
        for seed, steps in ((0, 8), (1, 8), (2, 3)):
            x = F.pad(prompts(9, 9, seed=seed, device=device)[0], (0, 8), value=MASK)
            for step in range(steps):
                found.append(llm(x).logits)
                guess = found[-1][:, 8 + step if family == "dream" else 9 + step].argmax(-1)
                x = x.clone()
                x[:, 9 + step] = guess
        return found

    with monkeypatch.context() as without_graphs:
        without_graphs.setattr(rooms, "LARGEST_GRAPH", 0)
        dkv.replace_attention(llm, dkv.Decode(4), block_length=4)
        want = outputs()
        dkv.restore_attention(llm)
    if device == "cpu":
        take_tapes(monkeypatch, session.Session)
    dkv.replace_attention(llm, dkv.Decode(4), block_length=4)
    for one, other in zip(outputs(), want, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True, atol=1e-4, rtol=1e-4)
    graphs = memory_of(llm).sessions.kept[-1].graphs
    assert graphs.captured > 0 and (device == "cuda" or graphs.replays >= 10)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", POLICIES)
def test_graphs_change_nothing(family, policy, device):
    ids, real = prompts(11, 4, 7, device=device)
    options = {"gen_length": 32, "block_length": 8, **options_of(policy, family), "device": device}
    cases = [options, options | {"cfg_scale": 1.5, "temperature": 0.7}]
    if not options["remasking"]:
        cases.append(options | {"threshold": 0.02})
    for case in cases:
        eager = generate(family, ids, real, cuda_graphs=False, **case)
        # what came up once in the first run is recorded in the second; the third only replays
        graphed = [generate(family, ids, real, **case) for _ in range(3)]
        for one in graphed:
            assert_same_run(one, eager)
        assert graphed[0].stats.graphs + graphed[1].stats.graphs > 0 and graphed[2].stats.graphs == 0


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", POLICIES)
def test_no_step_synchronises(family, policy, device):
    ids, real = prompts(11, 4, 7, device=device)
    options = {"gen_length": 16, "block_length": 8, **options_of(policy, family)}
    prepare(model(family, device), ids, real, cuda_graphs=False, **options).finish()  # compiles
    current = prepare(model(family, device), ids, real, cuda_graphs=False, **options)
    current.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        while current.running():
            current.step()
            current.last_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    current.finish()


def fake_tiny_run(family, policy, dtype=torch.bfloat16, **settings):
    """A run of a tiny model on the fake GPU: of two layers, since the last one is not like the others."""
    llm = fake_model(with_layers(tiny.CONFIGS[family](), 2), dtype)
    options = {"gen_length": 16, "block_length": 8, "steps": 6} | settings
    return fake_run(llm, policy, batch=3, prompt=24, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", [dkv.Decode(4), dkv.Greedy()], ids=repr)
def test_a_fake_run_is_planned_as_a_real_one(family, policy):
    with fake_gpu():
        found = fake_tiny_run(family, policy).key
    options = {"gen_length": 16, "block_length": 8, "steps": 6, "policy": policy, "cuda_graphs": False}
    options["remasking"] = "random" if policy.needs_order else None
    assert found == prepare(tiny.tiny_model(family), torch.ones(3, 24, dtype=torch.int64), **options).key


@pytest.mark.parametrize(
    "dtype, impl, recorded",
    [
        (torch.bfloat16, "auto", True),
        (torch.float32, "triton", True),
        (torch.float64, "auto", False),
        (torch.bfloat16, "reference", False),
    ],
)
def test_only_kernels_are_recorded(dtype, impl, recorded):
    """The PyTorch twins read from the device."""
    with fake_gpu(), mock.patch.object(run, "StepGraphs"):
        current = fake_tiny_run("llada", dkv.Decode(4), dtype=dtype, impl=impl, cuda_graphs=True)
    assert (current.graphs is not None) == recorded


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_a_recording_ends(error):
    """Whatever happens, and without the collector, which may take another graph, in between."""
    graph = mock.Mock()
    if error:
        graph.capture_end.side_effect = RuntimeError("the recording broke")
    with pytest.raises(error) if error else contextlib.nullcontext():
        with recording(graph, pool=None):
            assert not gc.isenabled()
            if error:
                raise error
    graph.capture_begin.assert_called_once_with(pool=None, capture_error_mode="thread_local")
    graph.capture_end.assert_called_once_with()
    assert gc.isenabled()


SETTINGS = {
    "plain": {},
    "noise": {"temperature": 0.7, "alg_temp": 0.3},
    "guidance": {"cfg_scale": 2.0},
    "guidance and noise": {"cfg_scale": 2.0, "temperature": 0.7},
    "threshold": {"steps": None, "threshold": 0.9},
    "factor and early stop": {"steps": None, "factor": 1.0, "eos_early_stop": True, "eos_token_id": EOS},
    "filters": {"top_p": 0.9, "top_k": 20, "confidence_eos_eot_inf": True, "eos_token_id": EOS},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "policy, settings", [(policy, "plain") for policy in POLICIES] + [("Decode", s) for s in SETTINGS if s != "plain"]
)
def test_no_step_waits_for_the_host(family, policy, settings):
    """Whole runs on fake CUDA tensors: no value is read, and no tensor lies on the CPU.

    Where the sizes depend on the tokens they are read once between two steps; within a step nothing is.
    """
    with fake_gpu(), torch.no_grad():
        current = fake_tiny_run(family, POLICIES[policy](family), **SETTINGS[settings])
        with OnlyOnTheDevice():
            if current.key.has_forecasts:
                while current.running():
                    current.step()
                    current.last_step()
                assert current.steps == len(current.forecasts) == 6
            else:
                for room in (rooms.Room(128, 64, 32), rooms.Room(48, 32, 16)):
                    current.compute(room)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            current.sizes.tolist()


def test_the_memory_of_a_run_serves_the_next(device):
    """Prompts of other lengths within the same capacity, on memory full of NaN; freed by reset."""
    llm, options = (
        model("llada", device),
        {"gen_length": 8, "block_length": 4, "policy": dkv.Decode(4), "device": device},
    )
    dkv.generate(model("dream", device), prompts(5, device=device)[0], gen_length=4)
    generate("llada", *prompts(9, 5, device=device), **options)
    idle = weakref.ref(memory_of(llm).run)
    for layer in idle().cache.k + idle().cache.v:
        layer.fill_(float("nan"))
    ids, real = prompts(3, 14, seed=1, device=device)
    reused = generate("llada", ids, real, **options)
    assert memory_of(llm).run is idle()
    dkv.reset(llm)
    gc.collect()
    assert idle() is None and memory_of(model("dream", device)).run is not None, "the run of another model stays"
    assert_same_run(generate("llada", ids, real, **options), reused)


def test_two_runs_at_once_on_one_model(device):
    """Each has memory of its own: step by step in turn they do what they do alone."""
    options = {"gen_length": 8, "policy": dkv.Decode(3)}
    inputs = [prompts(9, 5, device=device), prompts(6, 12, seed=1, device=device)]
    alone = [dkv.generate(model("dream", device), *each, **options).sequences for each in inputs]
    both = [prepare(model("dream", device), *each, **options) for each in inputs]
    while both[0].running():
        for current in both:
            current.step()
    for current, want in zip(both, alone, strict=True):
        assert not current.running() and torch.equal(current.finish()[0], want)


def test_a_run_that_fails_or_is_dropped_gives_its_memory_back(device):
    class Failing(dkv.Policy):
        fails = False

        def active(self, state):
            if self.fails and bool((state.step == 3).any()):
                raise KeyError("mine")
            return torch.ones_like(state.masked)

    llm, policy, ids = model("llada", device), Failing(), prompts(6, device=device)[0]
    want = dkv.generate(llm, ids, gen_length=8, policy=policy).sequences
    kept, policy.fails = weakref.ref(memory_of(llm).run), True
    with pytest.raises(KeyError, match="mine"):
        dkv.generate(llm, ids + 1, gen_length=8, policy=policy)
    policy.fails = False
    with prepare(llm, ids + 2, gen_length=8, policy=policy) as dropped:
        dropped.step()
    del dropped
    assert torch.equal(dkv.generate(llm, ids, gen_length=8, policy=policy).sequences, want)
    assert memory_of(llm).run is kept()
