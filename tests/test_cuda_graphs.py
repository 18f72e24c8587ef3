"""`dkv.cuda_graphs`, as far as it needs no GPU: no two sets of graphs share a stream, and too many are dropped together."""

import contextlib
import gc
import itertools
import weakref
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from dkv import cuda_graphs
from dkv.cuda_graphs import RecordingStream, StepGraphs

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def streams(monkeypatch):
    """PyTorch's pools of streams, without a GPU: two of 32 that are handed out in turn."""
    pools = {priority: itertools.cycle(range(32)) for priority in (0, -1)}

    def stream(device, priority=0):
        return SimpleNamespace(device_index=0, cuda_stream=1000 * (2 + priority) + next(pools[priority]))

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(cuda_graphs, "_TAKEN", set())


def handles(alive):
    return sorted(one.stream.cuda_stream for one in alive)


def test_no_two_objects_record_on_one_stream(streams):
    alive = [RecordingStream(DEVICE) for _ in range(64)]
    assert len(set(handles(alive))) == 64
    with pytest.raises(RuntimeError, match=r"64 sets of CUDA graphs are alive.*dkv.reset\(model\)"):
        RecordingStream(DEVICE)
    freed = handles(alive[10:12])
    # a reference cycle does not keep its stream
    alive[10].itself = alive[10]
    del alive[10:12]
    assert handles([RecordingStream(DEVICE) for _ in range(2)]) == freed


def test_a_stream_is_free_only_when_its_graphs_are_gone(streams):
    alive = [RecordingStream(DEVICE) for _ in range(64)]
    refused = []

    class DyingGraph:
        def __del__(self):
            try:
                RecordingStream(DEVICE)
            except RuntimeError:
                refused.append(True)

    alive[0].graphs["key"] = DyingGraph()
    del alive[0]
    assert refused == [True] and RecordingStream(DEVICE)


def test_too_many_graphs_are_dropped_together(streams, monkeypatch):
    """From PyTorch 2.12 on the end of one graph frees the workspace of all that were recorded on its stream."""
    graphs, pools, new_pools = [], [], itertools.count()

    class StubGraph:
        def __init__(self):
            graphs.append(weakref.ref(self))
            self.replay = mock.Mock()

    def recording(graph, pool):
        pools.append(pool)
        return contextlib.nullcontext()

    nothing = mock.MagicMock()
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 3)
    monkeypatch.setattr(cuda_graphs, "recording", recording)
    monkeypatch.setattr(RecordingStream, "taking_turns_with", nothing)
    for name, stub in {"CUDAGraph": StubGraph, "graph_pool_handle": lambda: next(new_pools)}.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    for name in ("current_stream", "device"):
        monkeypatch.setattr(torch.cuda, name, nothing)
    steps = StepGraphs(DEVICE)
    for _ in ("eagerly", "recorded"):
        for key in range(5):
            assert steps.run(key, lambda key=key: key) == key
    assert steps.captured == 5 and [graph() is None for graph in graphs] == [True] * 3 + [False] * 2
    # a pool all of whose graphs are gone is not used again
    assert pools == [0, 0, 0, 1, 1]


@pytest.mark.gpu
def test_graphs_outlive_those_of_others(device):
    """With more sets of graphs than PyTorch has streams in a pool, and the memory of the first ones used again."""
    weight = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    x, bias = torch.randn(16, 4096, device=device, dtype=torch.bfloat16), weight[0].clone()
    wanted = torch.nn.functional.linear(x, weight), torch.nn.functional.linear(x, weight, bias)
    found = [tuple(map(torch.empty_like, wanted)) for _ in range(36)]

    def products(outputs):
        outputs[0].copy_(torch.nn.functional.linear(x, weight))
        outputs[1].copy_(torch.nn.functional.linear(x, weight, bias))

    sets = [StepGraphs(torch.device(device, 0)) for _ in found]
    for _ in range(2):  # eagerly, then recorded
        for one, outputs in zip(sets, found, strict=True):
            one.run("products", lambda outputs=outputs: products(outputs))
    del one, sets[:4]
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    garbage = [torch.full((2**22,), float("nan"), device=device) for _ in range(64)]
    for one, outputs in zip(sets, found[4:], strict=True):
        for output in outputs:
            output.fill_(float("nan"))
        one.run("products", lambda: None)
        for output, want in zip(outputs, wanted, strict=True):
            torch.testing.assert_close(output, want)
    del garbage
