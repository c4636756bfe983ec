"""How fast the phantom is drawn: milliseconds a frame, and the memory it takes.

    python benchmarks/phantom_speed.py [threads]

Frames of several patients, one patient a thread as `generate` does it; best of five. The aim is 4
ms at 112 px and 8 ms at 224 px on two threads, under 2 GB.
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import torch

from dreamer.phantom import Patient, render, trajectories

AIMS = {112: 4.0, 224: 8.0}


def measure(size: int, threads: int, frames: int = 24) -> tuple[float, float]:
    """Milliseconds a frame, and processor milliseconds a frame (for a busy machine), best of 5."""
    patients = [Patient((0, n)) for n in range(threads)]
    plan = trajectories.plan(0, frames)
    pose, phase = torch.from_numpy(plan.pose[:frames]), torch.from_numpy(plan.phase[:frames])
    times, work = [], []
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in range(6):
            begin, spent = time.perf_counter(), time.process_time()
            list(pool.map(lambda patient: render(patient, pose, phase, size=size), patients))
            times.append((time.perf_counter() - begin) * 1000 / (frames * threads))
            work.append((time.process_time() - spent) * 1000 / (frames * threads))
    return min(times[1:]), min(work[1:])


if __name__ == "__main__":
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    torch.set_num_threads(1)
    for size, aim in AIMS.items():
        wall, work = measure(size, threads)
        print(
            f"{size} px, {threads} threads: {wall:.2f} ms a frame (aim {aim:g}), "
            f"{work:.2f} ms of processor time"
        )
    memory = psutil.Process().memory_info()
    print(f"memory: {getattr(memory, 'peak_wset', memory.rss) / 2**30:.2f} GiB")
