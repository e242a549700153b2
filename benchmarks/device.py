"""Time and memory of one process, on the CPU or on a GPU: the same calls for Paddle, torch and neither.

On a GPU a mark is an event in the stream and memory is the allocator's; on a CPU they are the clock and the process's
resident memory. The GPU half is written from the two libraries' documentation and has not been run yet.
"""

import math
import time
from itertools import pairwise
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # for clear_refs, proc(5): the peak of resident memory begins anew at what is resident now


class Host:
    """The CPU. Seconds of the wall clock; bytes of resident memory, nan where the system does not tell."""

    name = "cpu"

    def mark(self) -> object:
        """This moment; what `seconds` takes."""
        return time.perf_counter()

    def seconds(self, marks: list) -> list[float]:
        """The times between marks, in order."""
        return [b - a for a, b in pairwise(marks)]

    def held(self) -> float:
        """Bytes in use now."""
        return self._status("VmRSS")

    def reset_peak(self) -> None:
        """Let the peak begin anew."""
        if CLEAR.exists():
            CLEAR.write_text(RESET_PEAK)

    def peak(self) -> float:
        """Most bytes in use since reset_peak."""
        return self._status("VmHWM")

    @staticmethod
    def _status(field: str) -> float:
        lines = STATUS.read_text().splitlines() if STATUS.exists() else []
        return next((int(line.split()[1]) * 1024.0 for line in lines if line.startswith(field)), math.nan)


class PaddleGPU(Host):
    name = "gpu"

    def __init__(self):
        import paddle

        self.paddle = paddle

    def mark(self) -> object:
        event = self.paddle.device.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, marks: list) -> list[float]:
        self.paddle.device.synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in pairwise(marks)]

    def held(self) -> float:
        return float(self.paddle.device.cuda.memory_allocated())

    def reset_peak(self) -> None:
        self.paddle.device.cuda.reset_max_memory_allocated()

    def peak(self) -> float:
        return float(self.paddle.device.cuda.max_memory_allocated())


class TorchGPU(Host):
    name = "cuda"

    def __init__(self):
        import torch

        self.torch = torch

    def mark(self) -> object:
        event = self.torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, marks: list) -> list[float]:
        self.torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in pairwise(marks)]

    def held(self) -> float:
        return float(self.torch.cuda.memory_allocated())

    def reset_peak(self) -> None:
        self.torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        return float(self.torch.cuda.max_memory_allocated())


def paddle_device(threads: int) -> Host:
    """What Paddle computes on; sets the number of threads, in the way that ours asks for it too."""
    import paddle

    from aquila_pd.ops import threads as thread_count

    thread_count.use(threads)
    return PaddleGPU() if paddle.device.get_device().startswith("gpu") else Host()


def torch_device(threads: int) -> Host:
    """What torch is to compute on; sets the number of threads."""
    import torch

    torch.set_num_threads(threads)
    return TorchGPU() if torch.cuda.is_available() else Host()
