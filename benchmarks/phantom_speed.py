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


def measure(size: int, threads: int, frames: int = 24) -> float:
    """Milliseconds a frame, best of five."""
    patients = [Patient((0, n)) for n in range(threads)]
    plan = trajectories.plan(0, frames)
    pose, phase = torch.from_numpy(plan.pose[:frames]), torch.from_numpy(plan.phase[:frames])
    times = []
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in range(6):
            begin = time.perf_counter()
            list(pool.map(lambda patient: render(patient, pose, phase, size=size), patients))
            times.append((time.perf_counter() - begin) * 1000 / (frames * threads))
    return min(times[1:])


if __name__ == "__main__":
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    torch.set_num_threads(1)
    for size, aim in AIMS.items():
        print(f"{size} px, {threads} threads: {measure(size, threads):.2f} ms a frame (aim {aim})")
    memory = psutil.Process().memory_info()
    print(f"memory: {getattr(memory, 'peak_wset', memory.rss) / 2**30:.2f} GiB")
