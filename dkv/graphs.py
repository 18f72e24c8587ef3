"""CUDA graphs of steps that read and write static memory only: a step becomes one launch."""

import contextlib
import gc
import threading
import time
from collections import OrderedDict

import torch

MOST_GRAPHS = 32
_RECORDING = threading.Lock()
LARGEST_GRAPH = 2048  # packed positions; with more, launches cost nothing beside the work


class StepGraphs:
    """Runs functions by key: eagerly at first, which compiles and warms up, then recorded and replayed.

    The graphs share one memory pool, since they never run at the same time: what a function returns must be used before
    the next call. Beyond `MOST_GRAPHS` the one that was replayed least recently is dropped.

    Attributes:
        captured: graphs recorded so far; capture_seconds: the time that took.
    """

    def __init__(self, device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.captured, self.capture_seconds = 0, 0.0
        self._seen, self._graphs = set(), OrderedDict()

    def run(self, key, function):
        """Does what function() does, on the current stream, and returns what it does; the same for the same key."""
        if key not in self._seen:
            self._seen.add(key)
            return function()
        if key not in self._graphs:
            self._graphs[key] = self._capture(function)
            if len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        graph, result = self._graphs[key]
        with torch.cuda.device(self.device):
            graph.replay()
        return result

    def _capture(self, function):
        begin = time.perf_counter()
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream), recording(graph, self.pool):
                result = function()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise RuntimeError(
                "a step could not be recorded as a CUDA graph: a policy with max_active must compute on the device "
                "alone, without reading from it; correct it, or pass cuda_graphs=False."
            ) from error
        current.wait_stream(self.stream)
        self.captured += 1
        self.capture_seconds += time.perf_counter() - begin
        return graph, result


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
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                yield
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        finally:
            if collects:
                gc.enable()


def bucket(count):
    """The next of 16, 32, 48, 64, 128, 192, 256, 512, ...: few sizes, and little padding where a step is short."""
    unit = 16 if count <= 64 else 64 if count <= 256 else 256
    return max(-(-count // unit), 1) * unit
