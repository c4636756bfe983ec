"""What must be measured in a process of its own: unwarmed passes, and peaks of memory.

Each measurement runs in a new process, forked from one that has only imported the libraries, so
that no thread pool, device, kernel or page of weights is warm; where the system cannot fork, a new
interpreter.
"""

import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch.utils.benchmark import timer as clock

from dreamer.study.costs import BATCH, inputs
from dreamer.study.fast import InParts, fast
from dreamer.model import Attention, CardiacDreamer, ModelConfig
from dreamer.runs import has_bf16

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def apart(task: Callable, *arguments: Any) -> Any:
    """`task(*arguments)` in a process of its own; its result, or its exception raised here."""
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(["dreamer.study.cold", "torchvision.models"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_limited, torch.get_num_threads(), task, arguments).result()


def _limited(threads: int, task: Callable, arguments: Sequence[Any]) -> Any:
    torch.set_num_threads(threads)
    return task(*arguments)


def build(config: ModelConfig, device: torch.device | str = "cpu") -> CardiacDreamer:
    """A model for inference with random weights, the same at every call."""
    torch.manual_seed(0)
    return CardiacDreamer(config).eval().to(device)


def single(configs: Sequence[ModelConfig], device: str) -> dict[str, dict[str, float]]:
    """One pass of each configuration, batch 4, one after the other, nothing warmed up.

    By variant: `clock`, seconds by the claim's protocol (time.time, no waiting for the device);
    `waited`, seconds until the result was there; in MiB `memory`, what CUDA's allocator holds then,
    and, above the imported libraries, `weights` at rest and the `peak`.
    """
    found, before = {}, Peak(device).read()
    for config in configs:
        model, given = build(config, device), inputs(config, BATCH, device)
        highest = Peak(device)
        got = {"weights": highest.read() - before}
        with torch.no_grad():
            begun = time.time()
            dream = model(*given)
            got["clock"] = time.time() - begun
            got["memory"] = torch.cuda.memory_allocated() / 2**20 if device == "cuda" else 0.0
            dream.pose.cpu()
            got["waited"] = time.time() - begun
        found[config.token_type] = got | {"peak": highest.read() - before}
        del model, given, dream
    return found


def stepper(model: CardiacDreamer, batch: int, dtype: str) -> Callable[..., None]:
    """A training step to call, of `batch` frames or fewer: forward, backward, AdamW; autocast where
    `dtype` is bfloat16."""
    device = model.pose_std.device
    (image, action), model = inputs(model.config, batch, device), model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    low = dtype != "float32"

    def step(frames: int = batch) -> None:
        with torch.autocast(device.type, DTYPES[dtype], enabled=low):
            dream = model(image[:frames], action[:frames])
        loss = F.smooth_l1_loss(dream.pose, action[:frames])
        loss = loss + dream.next_features.float().pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


class Peak:
    """The peak of memory in MiB since it was made: CUDA's allocator, or the whole process."""

    def __init__(self, device: str):
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew

    def read(self) -> float:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        if sys.platform == "linux":
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) / 2**10
        info = psutil.Process().memory_info()  # Windows knows its peak
        if hasattr(info, "peak_wset"):
            return info.peak_wset / 2**20
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)


def peak(config: ModelConfig, device: str, path: str, dtype: str) -> dict[str, float]:
    """Of the second of two runs at batch 4, in `path` fast or training, `seconds`; in MiB above the
    imported libraries `weights` at rest and the `peak` of both.

    The first run takes one frame: it warms up, and a training step's makes AdamW's state.
    """
    before = Peak(device).read()
    model = build(config, device)
    if path == "fast":
        model = fast(model, DTYPES[dtype])
    highest = Peak(device)
    weights = highest.read() - before
    if path == "training":
        run = stepper(model, BATCH, dtype)
    else:
        image, action = inputs(config, BATCH, device)
        run = lambda frames=BATCH: model(image[:frames], action[:frames])  # noqa: E731
    run(1)
    begun = clock()
    run()
    return {"seconds": clock() - begun, "weights": weights, "peak": highest.read() - before}


def attention_peak(config: ModelConfig, tokens: int, way: str, device: str) -> float:
    """MiB above weights and input of one attention layer, batch 16.

    `way`: fused; explicit (as where maps are recorded); or in parts, the fast path's on CPUs, in
    bf16 where the machine has it.
    """
    torch.manual_seed(0)
    layer = Attention(config.d_model, config.num_heads, 0.0).eval().to(device)
    x = torch.randn(16, tokens, config.d_model, device=device)
    layer.recorded = way == "explicit"
    if way == "in parts":
        dtype = torch.bfloat16 if has_bf16() else torch.float32  # emulated, it takes minutes
        layer, x = InParts(layer).to(dtype), x.to(dtype)
    with torch.no_grad():
        layer(x[:1, :2])
        highest = Peak(device)
        before = highest.read()
        layer(x)
        return highest.read() - before
