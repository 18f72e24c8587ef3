"""CUDA graphs of steps that read and write static memory only: a step becomes one launch."""

import contextlib
import gc
import threading
import time
import weakref

import torch
import torch.nn.functional as F

MAX_GRAPHS = 32
STREAMS_IN_A_POOL = 32  # of PyTorch's, for each priority
_RECORDING = threading.Lock()
_STREAMS = threading.Lock()
_TAKEN = set()  # (device index, handle) of the streams that somebody records on


class StepGraphs:
    """Runs functions by key: eagerly at first, which compiles and warms up, then recorded and replayed.

    The graphs share one memory pool, since they never run at the same time: what a function returns must be used before
    the next call. Beyond `MAX_GRAPHS` all are dropped, and recorded again as they come up.

    Attributes:
        captured: graphs recorded so far; capture_seconds: the time that took.
    """

    def __init__(self, device):
        self.device, self._stream = device, RecordingStream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.captured, self.capture_seconds = 0, 0.0
        self._seen, self._graphs = set(), self._stream.graphs

    def run(self, key, function):
        """Does what function() does, on the current stream, and returns what it does; the same for the same key."""
        if key not in self._seen:
            self._seen.add(key)
            return function()
        if key not in self._graphs:
            if len(self._graphs) == MAX_GRAPHS:
                self._graphs.clear()
                # PyTorch takes a pool back for good once all of its graphs are gone
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
                "alone, without reading from it; correct it, or pass cuda_graphs=False."
            ) from error
        self.captured += 1
        self.capture_seconds += time.perf_counter() - begin
        return graph, result


class RecordingStream:
    """A stream on which nobody else records, for as long as this object lives.

    PyTorch's streams come from a pool, in turn, and the workspace of its matrix products belongs to a stream: graphs
    keep its address, and from PyTorch 2.12 on the end of any graph frees the workspace of the stream that it was
    recorded on. So graphs that are dropped at different times must not share a stream.

    Attributes:
        graphs: a dict to keep the graphs in; they are dropped before the stream is anybody else's.
    """

    def __init__(self, device):
        self.device, self.graphs = device, {}
        self.stream = _untaken_stream(device)
        weakref.finalize(self, _give_back, self.graphs, _key(self.stream)).atexit = False

    @contextlib.contextmanager
    def taking_turns_with(self, current):
        """Makes it the current stream, between what is done on another one before and after."""
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            # the workspace then lies in ordinary memory and not in that of the first graph, and the libraries' handles
            # of this thread are there: none can be made during a recording
            zeros = torch.zeros(2, 16, 16, dtype=torch.bfloat16, device=self.device)
            F.linear(zeros[0], zeros[1])
            F.linear(zeros[0], zeros[1], zeros[0, 0])
            yield
        current.wait_stream(self.stream)


def _untaken_stream(device):
    for _ in range(2):
        with _STREAMS:
            # both pools, each of which goes round
            for priority in (0, -1):
                for _ in range(STREAMS_IN_A_POOL):
                    stream = torch.cuda.Stream(device, priority=priority)
                    if _key(stream) not in _TAKEN:
                        _TAKEN.add(_key(stream))
                        return stream
        # what is dead, but in a cycle
        gc.collect()
    raise RuntimeError(
        f"{len(_TAKEN)} sets of CUDA graphs are alive, each of a run or a session, more than PyTorch has streams for: "
        "free some by dkv.reset(model), or pass cuda_graphs=False."
    )


def _key(stream):
    return stream.device_index, stream.cuda_stream


def _give_back(graphs, key):
    graphs.clear()
    _TAKEN.discard(key)


def nobody_records():
    """A context in which no graph is recorded: waiting for a whole device, or giving memory back, would break one."""
    return _RECORDING


@contextlib.contextmanager
def recording(graph, pool):
    """Records what is launched on the current stream into a `torch.cuda.CUDAGraph` with memory of the pool.

    `torch.cuda.graph` would empty the allocator's cache each time. One thread records at a time. Python
    collects no garbage meanwhile: with it could go another graph, whose end is a call that breaks a recording.
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
