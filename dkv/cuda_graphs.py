"""`StepGraphs`: CUDA graphs of steps, which read and write only static memory, so that a step is one launch."""

import contextlib
import gc
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

MAX_GRAPHS = 32
STREAMS_IN_A_POOL = 32  # PyTorch has a pool for each priority
_RECORDING = threading.Lock()
_STREAMS = threading.Lock()
_TAKEN = set()  # (device index, handle) of the streams in use by a `RecordingStream`


class StepGraphs:
    """Runs functions by key: the first call is eager, which compiles and warms up, the second records, others replay.

    The graphs share one memory pool, because they never run at the same time: use the result of a function before the
    next call. Beyond `MAX_GRAPHS`, all graphs are dropped and recorded again when needed.

    Attributes:
        captured: the number of graphs recorded so far.
        capture_seconds: the time that recording took.
    """

    def __init__(self, device: torch.device):
        self.device, self._stream = device, RecordingStream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.captured, self.capture_seconds = 0, 0.0
        self._seen, self._graphs = set(), self._stream.graphs

    def run(self, key: Hashable, function: Callable[[], Any]) -> Any:
        """Calls function() or replays its recording, on the current stream; equal keys must mean equal work."""
        if key not in self._seen:
            self._seen.add(key)
            return function()
        if key not in self._graphs:
            if len(self._graphs) == MAX_GRAPHS:
                self._graphs.clear()
                # PyTorch gives up a pool once all of its graphs are gone
                self.pool = torch.cuda.graph_pool_handle()
            self._graphs[key] = self._capture(function)
        graph, result = self._graphs[key]
        with torch.cuda.device(self.device):
            graph.replay()
        return result

    def _capture(self, function):
        begin = time.perf_counter()
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            with self._stream.taking_turns_with(current), recording(graph, self.pool):
                result = function()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise RuntimeError(
                "a step could not be recorded as a CUDA graph: a policy with max_active must compute on the device "
                "without synchronising with it; correct the policy, or pass cuda_graphs=False."
            ) from error
        self.captured += 1
        self.capture_seconds += time.perf_counter() - begin
        return graph, result


class RecordingStream:
    """A stream that no other object records on during the life of this one.

    PyTorch hands out the streams of a pool in turn. A stream has a workspace for matrix products, whose address is in
    the graphs recorded on it; from PyTorch 2.12 on, the end of any of them frees it. Graphs that are dropped at
    different times must therefore not share a stream.

    Attributes:
        graphs: a dict for the graphs; they are dropped before the stream is free again.
    """

    def __init__(self, device: torch.device):
        self.device, self.graphs = device, {}
        self.stream = _untaken_stream(device)
        weakref.finalize(self, _give_back, self.graphs, _key(self.stream)).atexit = False

    @contextlib.contextmanager
    def taking_turns_with(self, current: torch.cuda.Stream) -> Iterator[None]:
        """Makes it the current stream, after the earlier work of another stream and before that stream's later work."""
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            # makes the workspace, which would otherwise lie in the first graph's memory, and this thread's library
            # handles, which cannot be made during a recording
            zeros = torch.zeros(2, 16, 16, dtype=torch.bfloat16, device=self.device)
            F.linear(zeros[0], zeros[1])
            F.linear(zeros[0], zeros[1], zeros[0, 0])
            yield
        current.wait_stream(self.stream)


def _untaken_stream(device):
    for _ in range(2):
        with _STREAMS:
            # tries every stream of both pools
            for priority in (0, -1):
                for _ in range(STREAMS_IN_A_POOL):
                    stream = torch.cuda.Stream(device, priority=priority)
                    if _key(stream) not in _TAKEN:
                        _TAKEN.add(_key(stream))
                        return stream
        gc.collect()  # frees the streams of objects that are dead but in a reference cycle
    raise RuntimeError(
        f"{len(_TAKEN)} sets of CUDA graphs are alive, one for each run or session, and PyTorch has no stream for "
        "another: free some by dkv.reset(model), or pass cuda_graphs=False."
    )


def _key(stream):
    return stream.device_index, stream.cuda_stream


def _give_back(graphs, key):
    graphs.clear()
    _TAKEN.discard(key)


def nobody_records() -> contextlib.AbstractContextManager:
    """A context in which no graph is recorded: a device-wide wait, or freeing memory, would break a recording."""
    return _RECORDING


@contextlib.contextmanager
def recording(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    """Records the launches on the current stream into a graph with memory of the pool; one thread at a time.

    `torch.cuda.graph` would empty the allocator's cache each time. Garbage collection is off meanwhile: it could free
    another CUDA graph, and that call would break the recording.
    """
    with _RECORDING:
        collects = gc.isenabled()
        gc.disable()
        try:
            try:
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                yield
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        finally:
            if collects:
                gc.enable()
