"""Training of one variant: losses, PyTorch Lightning modules, resuming, many processes.

Loss of the published system: SmoothL1(composed pose 1, pose 1) + lambda SmoothL1(imagined pose 2,
pose 2) in units of the poses' spread, where the composed pose 1 is the imagined pose 2 undone by
the action. For a world model that imagines pictures, not only poses, two terms join: the distance
of `next_features` to the (fixed) feature map of frame 2, and of `reconstruction` to that of
frame 1, each relative to the variance of the map it is compared with.
"""

import importlib.util
import io
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import yaml
from numpy.typing import NDArray
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dreamer import poses
from dreamer.data import Batch, Split, Transitions, statistics
from dreamer.model import CardiacDreamer, Dream, ModelConfig
from dreamer.phantom.render import APEX, HALF_ANGLE
from dreamer.runs import TrainingConfig, configure, has_bf16, make_split, versions, write_whole

log = logging.getLogger(__name__)

TERMS = ("composed", "imagined", "feature", "reconstruction")


def vary(image: Tensor, strength: float) -> Tensor:
    """Frames [B, 1, H, W] in [0, 1] as another setting would show them; poses stay as they are.

    Gain and contrast of each frame, a smooth field of brightness as from time-gain and shadow;
    `strength` is the standard deviation of their logarithms, a tenth of it that of added noise.
    """
    count, size = len(image), image.shape[-2:]
    gain, contrast = torch.exp(strength * torch.randn(2, count, 1, 1, 1, device=image.device))
    field = torch.randn(count, 1, 5, 5, device=image.device) * strength
    field = F.interpolate(field, size, mode="bilinear", align_corners=True).exp()
    noise = torch.randn_like(image) * (strength / 10)
    return (image.clamp_min(1e-3) ** contrast * gain * field + noise).clamp(0, 1)


def turn(batch: Batch, degrees: Tensor) -> Batch:
    """Pictures turned in themselves about the sector's tip, the poses following; `degrees` [B].

    A picture turned so is what the probe sees after a pitch, the turn about the axis that stands
    on the picture (`dreamer.phantom.render`); both frames of a pair turn alike. What turns into
    view from outside the sector is black.
    """
    size, count = batch.image1.shape[-1], len(degrees)
    angle = torch.deg2rad(degrees)
    cos, sin = torch.cos(angle), torch.sin(angle)
    tip = (torch.tensor(APEX, device=degrees.device) + 0.5) / 112 - 1  # in -1 ... 1
    rows = torch.stack((torch.stack((cos, sin), 1), torch.stack((-sin, cos), 1)), 1)
    shift = tip - rows @ tip
    grid = F.affine_grid(
        torch.cat((rows, shift[:, :, None]), 2), [count, 1, size, size], align_corners=False
    )
    whole = torch.eye(2, 3, device=degrees.device)[None]
    place = F.affine_grid(whole, [1, 1, size, size], align_corners=False)
    across = place[0] - tip
    inside = torch.atan2(across[..., 0], across[..., 1]).abs() <= HALF_ANGLE
    images = [
        F.grid_sample(i.float(), grid, align_corners=False).mul_(inside).round_().to(torch.uint8)
        for i in (batch.image1, batch.image2)
    ]
    change = torch.zeros(count, 6, device=degrees.device)
    change[:, 4] = degrees
    pose1, pose2 = (poses.compose(p, change) for p in (batch.pose1, batch.pose2))
    action = poses.compose(poses.compose(poses.inverse(change), batch.action), change)
    still = (batch.action == 0).all(1, keepdim=True)  # no motion stays exactly none
    return Batch(*images, pose1, torch.where(still, 0.0, action), pose2)


def _smooth(predicted: Tensor, true: Tensor, spread: Tensor, beta: float) -> Tensor:
    gap = predicted - true
    gap = torch.cat((gap[:, :3], poses.wrap(gap[:, 3:])), dim=1) / spread
    return F.smooth_l1_loss(gap, torch.zeros_like(gap), beta=beta)


def _variance(target: Tensor) -> Tensor:
    """Mean over channels of a map's variance; in training over the batches of all processes."""
    moments = torch.stack((target.mean((0, 2, 3)), target.square().mean((0, 2, 3))))
    # In validation a process may have fewer batches than another, and none to wait for.
    if torch.distributed.is_initialized() and torch.is_grad_enabled():
        torch.distributed.all_reduce(moments)
        moments /= torch.distributed.get_world_size()
    return (moments[1] - moments[0].square()).mean().clamp_min(1e-6)


def losses(
    dream: Dream, batch: Batch, target: Tensor | None, spread: Tensor, config: TrainingConfig
) -> dict[str, Tensor]:
    """The loss terms, unweighted: composed, imagined; with a `target` map feature, reconstruction.

    The last two are squared errors over the target's variance, so that 1 is a constant guess. Poses
    are composed in float32 whatever the precision of the networks.
    """
    with torch.autocast(dream.pose.device.type, enabled=False):
        composed = poses.before(dream.pose, batch.action)
        terms = {
            "composed": _smooth(composed, batch.pose1, spread, config.beta),
            "imagined": _smooth(dream.pose, batch.pose2, spread, config.beta),
        }
        if target is not None:
            maps = {"feature": (dream.next_features, target)}
            maps["reconstruction"] = (dream.reconstruction, dream.features.detach())
            for name, (said, true) in maps.items():
                variance = _variance(true.float())
                terms[name] = F.mse_loss(said.float(), true.float()) / variance
    return terms


class Muon(torch.optim.AdamW):
    """AdamW, but the weights of the group marked `whole` move as matrices: by the momentum of their
    gradient with its singular values brought near one (Jordan et al., kellerjordan.github.io/posts/
    muon, 2024), in steps as large as AdamW's (Liu et al., arXiv:2502.16982, section 2.2).

    A convolution [O, I, k, k] is the matrix [O, I k k]; torch.optim.Muon takes none.
    """

    @staticmethod
    def inner_weights(model: CardiacDreamer) -> set[nn.Parameter]:
        """Weights of the layers between the nets' ends: not those for picture, action and pose."""
        ends = [model.backbone.stages[0], model.head[-1], getattr(model.world, "action", None)]
        outer = {layer for end in ends if end is not None for layer in end.modules()}
        layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        return {layer.weight for layer in layers if layer not in outer}

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            for p in group["params"] if group["whole"] else ():
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:  # AdamW looks for a step in every state that it loads
                    state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
                momentum = state["momentum"]
                momentum.lerp_(p.grad, 0.05)
                update = _orthogonal(p.grad.lerp(momentum, 0.95).flatten(1))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                reach = 0.2 * math.sqrt(max(update.shape))
                p.add_(update.view_as(p), alpha=-group["lr"] * reach)
                p.grad = None  # AdamW has nothing left to do here
        super().step()
        return loss


def _orthogonal(matrix: Tensor) -> Tensor:
    """A matrix with its singular values brought to 0.7 ... 1.2: five Newton-Schulz iterations.

    They go on in its Gram matrix, the smaller, and meet the matrix once, at the end.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    gram = x @ x.T
    whole: Tensor | None = None
    for turns in range(5):
        step = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        step.diagonal().add_(3.4445)
        whole = step if whole is None else step @ whole
        if turns < 4:  # the last needs no further one
            gram = step @ gram @ step
    x = whole @ x
    return x.T if tall else x


class _Batches(Dataset):
    """Ready batches: one item is one batch, so a worker or the main process fetches it whole."""

    def __init__(
        self,
        data: Transitions,
        parts: list[NDArray],
        identity: list[NDArray],
        reverse: list[NDArray],
    ):
        self.data, self.parts, self.identity, self.reverse = data, parts, identity, reverse

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> Batch:
        return self.data.batch(self.parts[number], self.identity[number], self.reverse[number])


class TransitionsModule(pl.LightningDataModule):
    """Batches for training and validation.

    What is drawn depends on (seed, epoch) alone: the order, which share `reverse` of the pairs is
    gone through backwards, and which share `identity` becomes "no motion". An epoch is one pass, or
    `steps_per_epoch` batches, for which a small scan is gone through several times. With several
    processes, each takes its share of the same global batch. Raises ValueError where a batch is
    larger than the training part.
    """

    def __init__(
        self,
        data: Transitions,
        split: Split,
        batch_size: int,
        identity: float = 0.0,
        seed: int = 0,
        steps_per_epoch: int = 0,
        reverse: float = 0.0,
    ):
        super().__init__()
        if batch_size > len(split.train):
            raise ValueError(
                f"batch_size {batch_size} exceeds the {len(split.train)} training transitions"
            )
        self.data, self.split, self.batch_size = data, split, batch_size
        self.identity, self.seed, self.reverse = identity, seed, reverse
        self.steps = steps_per_epoch or len(split.train) // batch_size

    def _loader(self, indices: NDArray, identity: NDArray, reverse: NDArray) -> DataLoader:
        trainer = self.trainer
        world, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
        if self.batch_size % world:
            raise ValueError(f"batch_size {self.batch_size}: not a multiple of {world} processes")
        starts = range(0, len(indices), self.batch_size)
        cut = [slice(start + rank, start + self.batch_size, world) for start in starts]
        drawn = ([values[c] for c in cut] for values in (indices, identity, reverse))
        batches = _Batches(self.data, *drawn)
        return DataLoader(batches, batch_size=None, pin_memory=torch.cuda.is_available())

    def train_dataloader(self) -> DataLoader:
        epoch = self.trainer.current_epoch if self.trainer else 0
        draw = np.random.default_rng((self.seed, epoch))
        count = self.steps * self.batch_size
        passes = range(-(-count // len(self.split.train)))
        order = np.concatenate([draw.permutation(self.split.train) for _ in passes])[:count]
        still, back = draw.random(count) < self.identity, draw.random(count) < self.reverse
        return self._loader(order, still, back)

    def val_dataloader(self) -> DataLoader:
        # Every transition once as it is and once as the identity: the single-frame prediction.
        indices = np.repeat(self.split.val, 2)
        still = np.arange(len(indices)) % 2 == 1
        return self._loader(indices, still, np.zeros(len(indices), bool))


class LitDreamer(pl.LightningModule):
    """A `CardiacDreamer` with its losses, optimiser and per-epoch metrics.

    Dropout depends on (seed, step, process) alone, so that a resumed run repeats an undisturbed
    one. Raises FloatingPointError, with the step, where a loss is not finite.
    """

    def __init__(self, model: CardiacDreamer, config: TrainingConfig):
        super().__init__()
        self.model, self.config = model, config
        self.validation: dict[str, float] = {}

    def _terms(self, batch: Batch) -> tuple[Dream, dict[str, Tensor]]:
        config, count = self.config, len(batch.action)
        device = batch.action.device
        if self.training and config.rotate > 0:
            batch = turn(batch, (2 * torch.rand(count, device=device) - 1) * config.rotate)
        image, action = batch.image1.float() / 255, batch.action
        if self.training and config.augment > 0:
            image = vary(image, config.augment)
        share = 1.0
        if self.training and config.mixup > 0:  # with the next of the batch, for lack of order
            share = float(torch.distributions.Beta(config.mixup, config.mixup).sample())
            other = Batch(*(field.roll(1, 0) for field in batch))
            image = share * image + (1 - share) * image.roll(1, 0)
            action = share * action + (1 - share) * other.action
        dream = self.model(image, action)
        target = None
        if self.model.world is not None and config.feature + config.reconstruction > 0:
            target = self._target(dream, batch)
        terms = losses(dream, batch, target, self.model.pose_std, config)
        if share < 1:
            swapped = None if target is None else target.roll(1, 0)
            others = losses(dream, other, swapped, self.model.pose_std, config)
            terms = {name: share * t + (1 - share) * others[name] for name, t in terms.items()}
        return dream, terms

    @torch.no_grad()
    def _target(self, dream: Dream, batch: Batch) -> Tensor:
        """The map of frame 2, without gradient; where nothing moved, it is that of frame 1."""
        target, moved = dream.features.detach().clone(), (batch.action != 0).any(dim=1)
        if self.config.mixup > 0 and self.training:
            moved[:] = True  # the map at hand is that of a mixture
        if moved.any():
            target[moved] = self.model.encode(batch.image2[moved].float() / 255).to(target.dtype)
        return target

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        at = (self.config.seed, self.current_epoch, batch_idx, self.trainer.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(at).generate_state(1)[0]))

    def on_train_epoch_start(self) -> None:
        self._train = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        _, terms = self._terms(batch)
        total = sum(getattr(self.config, name) * term for name, term in terms.items())
        if not torch.isfinite(total):
            raise FloatingPointError(
                f"step {self.global_step} (epoch {self.current_epoch}): the loss is not finite "
                f"({', '.join(f'{n} {t:.3g}' for n, t in terms.items())}); lower learning_rate"
            )
        self._train.append(torch.stack((total.detach(), *(t.detach() for t in terms.values()))))
        self.log("loss", total.detach(), prog_bar=True, logger=False)
        return total

    def on_validation_epoch_start(self) -> None:
        self._val = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if len(batch.action) == 0:  # fewer transitions than processes in the last batch
            return
        dream, terms = self._terms(batch)
        pose = sum(getattr(self.config, name) * terms[name] for name in ("composed", "imagined"))
        still = (batch.action == 0).all(dim=1)
        error = poses.errors(dream.pose[still].float(), batch.pose2[still])
        single = torch.cat((error.translation[:, None], error.rotation[:, None], error.axes), 1)
        means = torch.stack((pose, *terms.values())) * len(still)
        self._val.append((len(still), means.double(), int(still.sum()), single.sum(0)))

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            return
        sums = [sum(column) for column in zip(*self._val, strict=True)]
        flat = torch.cat(
            [torch.as_tensor(s, device=self.device).double().reshape(-1) for s in sums]
        )
        flat = self.trainer.strategy.reduce(flat, reduce_op="sum")
        terms = len(sums[1])
        means, singles = flat[1 : 1 + terms] / flat[0], flat[2 + terms :] / flat[1 + terms]
        names = ["val_loss", *(f"val_{n}" for n in TERMS[: terms - 1])]
        names += ["val_translation_mm", "val_rotation_deg"]
        names += [f"val_{a}_{u}" for a, u in zip(poses.AXES, poses.UNITS, strict=True)]
        self.validation = dict(zip(names, torch.cat((means, singles)).tolist(), strict=True))

    def epoch_row(self) -> dict[str, float]:
        """The finished epoch's metrics, training then validation, over all processes."""
        means = torch.stack(self._train).double().mean(0)
        means = self.trainer.strategy.reduce(means, reduce_op="mean").tolist()
        names = ["train_loss", *(f"train_{n}" for n in TERMS[: len(means) - 1])]
        return dict(zip(names, means, strict=True)) | self.validation

    def configure_optimizers(self) -> dict[str, Any]:
        config = self.config
        trainable = [p for p in self.parameters() if p.requires_grad]
        options = {"weight_decay": config.weight_decay, "fused": True}
        if config.optimizer == "muon":
            whole = Muon.inner_weights(self.model) & set(trainable)
            groups = [[p for p in trainable if (p in whole) == inner] for inner in (True, False)]
            groups = [{"params": g, "whole": k == 0} for k, g in enumerate(groups)]
            optimizer = Muon(groups, config.learning_rate, **options)
        else:
            optimizer = torch.optim.AdamW(trainable, config.learning_rate, **options)
        steps = int(self.trainer.estimated_stepping_batches)
        if config.schedule == "one-cycle":
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, config.learning_rate, total_steps=steps, cycle_momentum=False
            )
        elif config.schedule == "cosine":
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        elif config.schedule == "warm-restarts":
            cycle = -(-steps // config.restarts)
            schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, cycle)
        else:
            schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class _WholeCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoints, but a kill while one is written leaves the one before."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_whole(Path(path), content.getvalue())


class _Record(pl.Callback):
    """After each epoch: a row of metrics.csv, the best weights, the state to resume from."""

    def __init__(self, folder: Path, on_epoch: Callable[[pd.DataFrame], None] | None):
        self.folder, self.on_epoch = folder, on_epoch
        self.rows: list[dict[str, float]] = []
        self.best, self.stale, self.waited, self.spent = float("inf"), 0, 0.0, 0.0

    def state_dict(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("rows", "best", "stale", "spent")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def on_train_epoch_start(self, trainer, module) -> None:
        self.start = self.since = time.perf_counter()
        self.waited = 0.0

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.waited += time.perf_counter() - self.since

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.since = time.perf_counter()
        self.trained = self.since - self.start

    def on_train_epoch_end(self, trainer, module) -> None:
        seconds = time.perf_counter() - self.start
        self.spent += seconds
        images = trainer.global_step * module.config.batch_size * module.config.accumulate
        row = module.epoch_row()
        self.rows.append(
            {"epoch": trainer.current_epoch + 1, "step": trainer.global_step, "images": images}
            | row
            | {"seconds": self.spent, "waiting_share": self.waited / self.trained}
        )
        better = row["val_loss"] < self.best
        self.best, self.stale = (row["val_loss"], 0) if better else (self.best, self.stale + 1)
        if module.config.patience and self.stale >= module.config.patience:
            trainer.should_stop = True
        if trainer.is_global_zero:
            table = pd.DataFrame(self.rows)
            if better:
                weights = {k: v.cpu().contiguous() for k, v in module.model.state_dict().items()}
                write_whole(self.folder / "model.safetensors", save(weights))
            write_whole(self.folder / "metrics.csv", table.to_csv(index=False).encode())
            log.info("epoch %d: %s", len(table), {k: round(v, 4) for k, v in row.items()})
            if trainer.logger is not None:
                trainer.logger.log_metrics(row, trainer.global_step)
            if self.on_epoch is not None:
                self.on_epoch(table)
        trainer.save_checkpoint(self.folder / "last.ckpt", weights_only=False)


def _claim(folder: Path, config: dict[str, Any]) -> None:
    """Make the run's folder, or check that the one there is of the same configuration."""
    file = folder / "config.json"
    if file.is_file():
        there = json.loads(file.read_text())
        differing = [
            f"{part}.{key}: {there.get(part, {}).get(key)!r} there, {value!r} here"
            for part in config
            for key, value in config[part].items()
            if there.get(part, {}).get(key) != value
        ]
        if differing:
            raise ValueError(
                f"{file}: this run belongs to another configuration ({'; '.join(differing)}); "
                "choose another run folder, or remove this one"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: holds something else than a run; choose another run folder")
    folder.mkdir(parents=True, exist_ok=True)


def _tensorboard(folder: Path) -> TensorBoardLogger | bool:
    """A log for TensorBoard in the run's folder, where one of its packages is installed."""
    there = any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX"))
    return TensorBoardLogger(folder, name="", version="tensorboard") if there else False


def _spread() -> bool:
    """Whether this is one of several processes that torchrun or Slurm's srun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("SLURM_NTASKS", 1)) > 1


def _launch(
    model: ModelConfig,
    training: TrainingConfig,
    data: Transitions,
    folder: Path,
    on_epoch: Callable[[pd.DataFrame], None] | None,
) -> pd.DataFrame:
    """`fit` in one process for each device, by torchrun: a notebook's kernel cannot be forked."""
    if training.nodes > 1:
        raise ValueError(
            f"training.nodes is {training.nodes}: start this with srun or torchrun on every node; "
            "the README's section on clusters says how"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    told = {
        "data": str(data.folder.resolve()),
        "run": str(folder.resolve()),
        "patients": dict(zip(data.scan.tolist(), data.patient.tolist(), strict=True)),
        "model": model.model_dump(mode="json"),
        "training": training.model_dump(mode="json"),
    }
    file = folder.with_name(f"{folder.name}.launch.json")
    write_whole(file, json.dumps(told, indent=1).encode())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={training.devices}", "-m", "dreamer.training", str(file)]
    table, seen = folder / "metrics.csv", None
    with subprocess.Popen(command) as processes:
        try:
            while processes.poll() is None:
                time.sleep(0.5)
                if on_epoch and table.is_file() and (at := table.stat().st_mtime_ns) != seen:
                    seen = at
                    on_epoch(pd.read_csv(table))
        except BaseException:
            processes.terminate()
            raise
    if processes.returncode:
        raise RuntimeError(f"{folder}: a process of the training failed; its error stands above")
    return pd.read_csv(table)


def fit(
    model: ModelConfig,
    training: TrainingConfig,
    data: Transitions,
    folder: str | Path,
    on_epoch: Callable[[pd.DataFrame], None] | None = None,
) -> pd.DataFrame:
    """Train one run in `folder`, or go on with it where it stopped; returns its metrics by epoch.

    `on_epoch` is called with the table so far after every epoch. With `devices` over one, processes
    are started for them, unless torchrun or Slurm has done so. Raises ValueError if the folder
    belongs to another configuration, OSError with too little disk, FloatingPointError on a loss
    that is not finite (what was reached before is kept).
    """
    folder = Path(folder)
    if training.devices * training.nodes > 1 and not _spread():
        return _launch(model, training, data, folder, on_epoch)
    if training.precision == "bf16" and not has_bf16():
        raise ValueError("training.precision: this machine has no bf16; use fp32 or auto")
    if data.frames.shape[-1] != model.image_size:
        raise ValueError(
            f"the data's frames have {data.frames.shape[-1]} px, model.image_size is "
            f"{model.image_size}; read them with Transitions(..., image_size={model.image_size})"
        )
    split = make_split(data, training)
    config = {
        "model": model.model_dump(mode="json"),
        "training": training.model_dump(mode="json"),
        "data": {"folder": data.folder.name, "transitions": len(data), "digest": data.digest},
    }
    first = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0
    if first:
        _claim(folder, config)

    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(LeafSpec|srun|num_workers).*")
    pl.seed_everything(training.seed, verbose=False)
    net = CardiacDreamer(model, statistics(data, split.train))
    if model.backbone == "resnet34" or model.width % 8 == 0:
        # Trains a fifth faster. In this layout oneDNN's backward of a strided 1x1 convolution of 4
        # channels corrupts the heap on AVX2 machines.
        net.backbone.to(memory_format=torch.channels_last)
    needed = 6 * sum(p.nbytes for p in net.parameters()) + 2**20
    if first and (free := shutil.disk_usage(folder).free) < needed:
        raise OSError(f"{folder}: {free / 2**20:.0f} MiB free, {needed / 2**20:.0f} needed")
    parts = {name: sorted(set(data.patient[getattr(split, name)])) for name in split._fields[:3]}
    for name, content in (
        ("split", {"kind": split.kind} | parts),
        ("versions", versions()),
        ("config", config),
    ):
        if first:
            write_whole(folder / f"{name}.json", json.dumps(content, indent=1).encode())

    identity = training.identity if net.world is not None else 1.0
    batches = TransitionsModule(
        data,
        split,
        training.batch_size,
        identity,
        training.seed,
        training.steps_per_epoch,
        training.reverse,
    )
    record = _Record(folder, on_epoch)
    bf16 = training.precision == "bf16" or (training.precision == "auto" and has_bf16())
    # A weight of zero leaves the reconstruction's head without a gradient.
    idle = net.world is not None and training.reconstruction == 0
    many = "ddp_find_unused_parameters_true" if idle else "ddp"
    trainer = pl.Trainer(
        strategy=many if _spread() else "auto",
        accumulate_grad_batches=training.accumulate,
        max_epochs=training.epochs,
        devices=training.devices,
        num_nodes=training.nodes,
        precision="bf16-mixed" if bf16 else "32-true",
        gradient_clip_val=training.clip,
        sync_batchnorm=torch.cuda.is_available() and training.devices * training.nodes > 1,
        use_distributed_sampler=False,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        callbacks=[record],
        plugins=[_WholeCheckpoints()],
        logger=_tensorboard(folder),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=on_epoch is None,
    )
    last = folder / "last.ckpt"
    by_hand = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(
            LitDreamer(net, training),
            datamodule=batches,
            ckpt_path=last if last.is_file() else None,
            weights_only=True,
        )
    except SystemExit as stopped:  # what Lightning makes of Ctrl-C; a notebook's kernel lives on
        raise KeyboardInterrupt from stopped
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, by_hand)
    return pd.read_csv(folder / "metrics.csv")


def main() -> None:
    """One process of a training that torchrun or srun starts: `... -m dreamer.training FILE`.

    FILE is YAML or JSON with the parameters of notebook 02: data, run, model, training and, as
    needed, token_type, seed, patients.
    """
    [file] = sys.argv[1:]
    told = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    if unknown := set(told) - {
        "data",
        "run",
        "model",
        "training",
        "token_type",
        "seed",
        "patients",
    }:
        raise SystemExit(f"{file}: unknown parameter {', '.join(sorted(unknown))}")
    model, training = configure(
        told.get("token_type", ""),
        told.get("model", {}),
        told.get("training", {}),
        told.get("seed"),
    )
    fit(
        model,
        training,
        Transitions(told["data"], model.image_size, told.get("patients")),
        told["run"],
    )


if __name__ == "__main__":
    main()
