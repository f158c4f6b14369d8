"""Merges tensors of files on a GPU: batch after batch goes up, is merged there, and comes back, some batches ahead.

    mapped file -> pinned ring -> GPU -> kernels -> pinned memory -> slab

Batches take turns on two streams, so that one is copied while another is merged; a thread feeds them, at most AHEAD of
whoever writes. GPU memory holds those batches alone, whatever the model's size. A tensor that does not fit by itself
or has adapters on it, and what must be known of the whole model first, stay with the CPU, with the same bits.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Sequence
from typing import Any

from peta_fast._engine import Engine
from peta_fast._tensor_plan import TensorPlan, is_whole_tensor
from peta_fast.buffers import Buffer
from peta_fast.errors import ResourceError
from peta_fast.ops import backend
from peta_fast.ops.delta_merge import Inputs, Job, MaskBuffer, Verdict, merge, prepare, with_majority

AHEAD = 2
"""Batches that may be finished or under way while one is being written."""
STAGING = 32 << 20
"""Bytes of each of the two pinned buffers of the ring."""
SHARE = 0.3
"""Of the GPU's free memory, that one batch may take: two are there at once."""


class Ring:
    """Two pinned buffers that go up in turns: one is filled while the other is copied."""

    def __init__(self, ops: Any, threads: int):
        self.ops, self.threads = ops, threads
        self.buffers = [ops.memory.pinned(STAGING) for _ in range(2)]
        self.free = [lambda: None, lambda: None]
        self.turn = 0

    def send(self, source: Buffer, target: int) -> None:
        """Copies host memory to the device, on the current stream; returns when the source has been read."""
        for start in range(0, source.nbytes, STAGING):
            count = min(STAGING, source.nbytes - start)
            place = self.turn = 1 - self.turn
            self.free[place]()
            backend().copy_bytes(self.buffers[place].address, source.address + start, count, self.threads)
            self.ops.copy_bytes(target + start, self.buffers[place].address, count)
            self.free[place] = self.ops.memory.mark()

    def close(self) -> None:
        """Waits until nothing reads the buffers any more."""
        for wait in self.free:
            wait()


class DeviceEngine(Engine):
    """The Engine whose merges run on a device. `feed` it the batches in the order they will be asked for."""

    def __init__(self, *arguments, device: str, **keywords):
        super().__init__(*arguments, **keywords)
        self.device, self.ops = device, backend(device)
        self.room = int(SHARE * self.ops.memory.free_bytes())
        self.done: queue.Queue = queue.Queue()
        self.turns = threading.Semaphore(AHEAD)
        self.expected: list[set[str]] = []
        self.stopped = False
        self.thread: threading.Thread | None = None

    def feed(self, batches: Sequence[list[TensorPlan]]) -> None:
        """Starts the thread. A batch that is too much for the device goes there in parts."""
        chosen, seen = [], set()
        for batch in batches:
            fresh = [t for t in batch if t.name not in seen and self._fits(t)]
            seen |= {t.name for t in fresh}
            chosen += self._parts(fresh)
        self.expected = [{t.name for t in batch} for batch in chosen]
        self.thread = threading.Thread(target=self._work, args=(chosen,), name="peta_fast device", daemon=True)
        self.thread.start()

    def _fits(self, tensor: TensorPlan) -> bool:
        if tensor.action not in ("merge", "average") or not tensor.size or is_whole_tensor(self.recipe):
            return False
        if any(ref.adapters for ref, _ in tensor.inputs):
            return False  # low-rank changes are formed by the CPU's kernels
        return _needed(tensor) < self.room

    def _parts(self, batch: list[TensorPlan]) -> list[list[TensorPlan]]:
        """Runs of tensors that fit together."""
        parts: list[list[TensorPlan]] = []
        left = 0.0
        for tensor in batch:
            needed = _needed(tensor)
            if not parts or needed > left:
                parts.append([])
                left = self.room
            parts[-1].append(tensor)
            left -= needed
        return parts

    def _work(self, batches: Sequence[list[TensorPlan]]) -> None:
        ring = None
        try:
            ring, streams = Ring(self.ops, self.threads), [self.ops.memory.new_stream() for _ in range(2)]
            for i, batch in enumerate(batches):
                self.turns.acquire()
                if self.stopped:
                    break
                with self.ops.memory.on(streams[i % 2]):
                    self.done.put(self._merge_there(batch, ring))
        except BaseException as error:  # reaches whoever asks for the batch
            self.done.put(error)
        finally:
            if ring is not None:
                with contextlib.suppress(ResourceError):  # of a broken GPU, which whoever waits is told of
                    ring.close()

    def _merge_there(self, batch: list[TensorPlan], ring: Ring):
        """Launches everything; what waits for it, the verdicts, and the results by name."""
        there: dict[tuple[int, int], Any] = {}  # tensors that share memory may differ in how much of it they have

        def up(buffer: Buffer) -> Buffer:
            if not buffer.nbytes:
                return Buffer(0, buffer.dtype, 0, None, self.device)
            key = (buffer.address, buffer.nbytes)
            if key not in there:
                there[key] = self.ops.memory.empty(buffer.nbytes)
                ring.send(buffer, there[key].address)
            held = there[key]
            return Buffer(held.address, buffer.dtype, buffer.size, held, self.device)

        requests = []
        for tensor in batch:
            here = self.inputs(tensor)
            masks = tuple(MaskBuffer(up(m.buffer), m.form) for m in here.masks)
            base = up(here.base) if here.base is not None else None
            models = tuple(up(m) for m in here.models)
            requests.append((self._spec(tensor), Inputs(tensor.name, tensor.shape, base, models, masks, here.labels)))
        keywords = {"seed": self.recipe.seed, "majority": self.majority, "model_ranks": self.model_ranks}
        prepared = [with_majority(p, self.majority) for p in prepare(requests, threads=self.threads, **keywords)]
        offsets, end = [], 0
        for tensor in batch:
            offsets.append(end)
            end += -(-tensor.nbytes // 256) * 256
        out, home = self.ops.memory.empty(end), self.ops.memory.pinned(end)
        jobs = [
            Job(p, 0, t.size, Buffer(out.address + at, t.dtype, t.size, out, self.device))
            for p, t, at in zip(prepared, batch, offsets, strict=True)
        ]
        verdicts: list[Verdict] = []
        merge(jobs, threads=self.threads, allow_nonfinite=self.allow_nonfinite, later=verdicts)
        self.ops.copy_bytes(home.address, out.address, end)
        results = {
            t.name: Buffer(home.address + at, t.dtype, t.size, home) for t, at in zip(batch, offsets, strict=True)
        }
        return self.ops.memory.mark(), verdicts, results

    def get_ready(self, tensors: list[TensorPlan]) -> None:
        wanted = {t.name for t in tensors} - set(self.ready)
        while self.expected and wanted & self.expected[0]:
            found = self.done.get()
            if isinstance(found, BaseException):
                raise found
            self.expected.pop(0)
            wait, verdicts, results = found
            wait()
            for verdict in verdicts:
                verdict.check()
            self.ready.update(results)
            self.turns.release()
        super().get_ready(tensors)

    def stop(self) -> None:
        """Ends the thread, whatever it still had to do."""
        self.stopped = True
        self.turns.release()
        if self.thread is not None:
            self.thread.join()
        while not self.done.empty():  # results that nobody took: their memory must outlast the copies into it
            found = self.done.get()
            if not isinstance(found, BaseException):
                with contextlib.suppress(ResourceError):
                    found[0]()


def _needed(tensor: TensorPlan) -> float:
    """Bytes of the device that merging a tensor there takes, about."""
    return 1.2 * (tensor.input_bytes + tensor.nbytes) + 8 * tensor.costs.rows * tensor.size
