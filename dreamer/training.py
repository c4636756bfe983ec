"""Training of one variant: losses, PyTorch Lightning modules, resuming, several processes.

Loss of the published system, in units of the spread of the poses:

    SmoothL1(composed pose 1, pose 1) + SmoothL1(imagined pose 2, pose 2),

where the composed pose 1 is the imagined pose 2 moved back by the action. Two terms train the
imagined map itself: the squared error of `next_features` against the (fixed) map of frame 2, and of
`reconstruction` against that of frame 1, each relative to the variance of its target. Their
gradient does not reach the backbone, which would learn maps that are easy to predict.
"""

import io
import json
import logging
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
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from pytorch_lightning.plugins.io import TorchCheckpointIO
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dreamer import poses
from dreamer.data import Batch, Split, Transitions, statistics
from dreamer.files import write_whole
from dreamer.model import CardiacDreamer, Dream, ModelConfig
from dreamer.runs import TrainingConfig, configure, has_bf16, make_split, start_from, versions

log = logging.getLogger(__name__)

LAUNCH_FIELDS = {"data", "run", "model", "training", "token_type", "seed", "patients"}


# Losses


def pose_loss(predicted: Tensor, true: Tensor, spread: Tensor, beta: float) -> Tensor:
    """SmoothL1 between poses [B, 6] in units of `spread` [6]; angles take the short way round."""
    difference = predicted - true
    angles = poses.wrap(difference[:, 3:])
    difference = torch.cat((difference[:, :3], angles), dim=1) / spread
    return F.smooth_l1_loss(difference, torch.zeros_like(difference), beta=beta)


def map_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Squared error of a map [B, C, h, w] over the target's variance: 1 is the mean map's error.

    In training the variance is that of the batches of all processes together.
    """
    target = target.float()
    moments = torch.stack((target.mean((0, 2, 3)), target.square().mean((0, 2, 3))))
    # In validation a process may have fewer batches than another, which would wait for ever.
    if torch.distributed.is_initialized() and torch.is_grad_enabled():
        torch.distributed.all_reduce(moments)
        moments /= torch.distributed.get_world_size()
    variance = (moments[1] - moments[0].square()).mean().clamp_min(1e-6)
    return F.mse_loss(predicted.float(), target) / variance


POSE_TERMS = ("composed", "imagined")


def losses(
    dream: Dream, batch: Batch, target: Tensor | None, spread: Tensor, config: TrainingConfig
) -> dict[str, Tensor]:
    """The loss terms, unweighted: composed, imagined; with a `target` map feature, reconstruction.

    Poses are composed in float32 whatever the precision of the networks.
    """
    with torch.autocast(dream.pose.device.type, enabled=False):
        pose1 = poses.before(dream.pose, batch.action)
        terms = {
            "composed": pose_loss(pose1, batch.pose1, spread, config.beta),
            "imagined": pose_loss(dream.pose, batch.pose2, spread, config.beta),
        }
        if target is not None:
            terms["feature"] = map_loss(dream.next_features, target)
            terms["reconstruction"] = map_loss(dream.reconstruction, dream.features.detach())
    return terms


# Batches


class ReadyBatches(Dataset):
    """Whole batches: one item is one batch."""

    def __init__(
        self, data: Transitions, parts: list[NDArray], still: list[NDArray], back: list[NDArray]
    ):
        self.data, self.parts, self.still, self.back = data, parts, still, back

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> Batch:
        return self.data.batch(self.parts[number], self.still[number], self.back[number])


class TransitionsModule(pl.LightningDataModule):
    """Batches for training and validation.

    All random choices depend on (seed, epoch) alone: the order, which share `reverse` of the pairs
    is time-reversed, and which share `identity` becomes "no motion". An epoch is one pass, or
    `steps_per_epoch` batches, for which a small scan is passed several times. Each of several
    processes takes its share of the same global batch. Raises ValueError where a batch is larger
    than the training part.
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
        val_pairs: int = 0,
    ):
        super().__init__()
        if batch_size > len(split.train):
            raise ValueError(
                f"batch_size {batch_size} exceeds the {len(split.train)} training transitions"
            )
        self.data, self.split, self.batch_size = data, split, batch_size
        self.identity, self.seed, self.reverse = identity, seed, reverse
        self.steps = steps_per_epoch or len(split.train) // batch_size
        count = min(val_pairs, len(split.val)) or len(split.val)
        self.val = split.val[np.linspace(0, len(split.val) - 1, count).astype(int)]

    def _loader(self, indices: NDArray, still: NDArray, back: NDArray) -> DataLoader:
        trainer = self.trainer
        world, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
        if self.batch_size % world:
            raise ValueError(f"batch_size {self.batch_size}: not a multiple of {world} processes")
        starts = range(0, len(indices), self.batch_size)
        cuts = [slice(start + rank, start + self.batch_size, world) for start in starts]
        drawn = ([values[cut] for cut in cuts] for values in (indices, still, back))
        batches = ReadyBatches(self.data, *drawn)
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
        # Each transition as recorded and as "no motion", which is the single-frame prediction.
        indices = np.repeat(self.val, 2)
        still = np.arange(len(indices)) % 2 == 1
        return self._loader(indices, still, np.zeros(len(indices), bool))


# Model, optimiser


def matrix_weights(model: CardiacDreamer) -> set[nn.Parameter]:
    """Weights that Muon updates: of all linear and convolutional layers except those that meet
    frames, actions and poses (the stem, the action's layers, the last layer of the head)."""
    ends = [model.backbone.stages[0], model.head[-1], getattr(model.world, "action", None)]
    outer = {layer for end in ends if end is not None for layer in end.modules()}
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return {layer.weight for layer in layers if layer not in outer}


def orthogonalise(
    update: Tensor,
    steps: int,
    coefficients: list[tuple[float, float, float]],
    eps: float = 1e-7,
    safety_factor: float = 1.0,
    scale_eps: bool = False,
) -> Tensor:
    """Muon's Newton-Schulz iterations on a matrix [m, n] or a batch of them, in float32.

    timm's own run in bf16, which a CPU without bf16 emulates at a twentieth of float32's speed. The
    iterations multiply the update by polynomials of its Gram matrix, the smaller side squared, so
    they run on that matrix alone.
    """
    if scale_eps:
        raise NotImplementedError("scale_eps is not used here")
    x = update.mT if update.size(-2) > update.size(-1) else update
    x = x.float() / (x.float().norm(dim=(-2, -1), keepdim=True) * safety_factor).clamp(min=eps)
    gram, product = x @ x.mT, torch.eye(x.size(-2), device=x.device)
    for step in range(steps):
        a, b, c = coefficients[min(step, len(coefficients) - 1)]
        factor = a * torch.eye(x.size(-2), device=x.device) + b * gram + c * (gram @ gram)
        product = factor @ product
        gram = factor @ gram @ factor
    x = product @ x
    return x.mT if update.size(-2) > update.size(-1) else x


def make_optimizer(model: CardiacDreamer, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW as published, or Muon (Jordan et al., 2024) with AdamW for what is no matrix."""
    # No fused=True: Lightning refuses gradient clipping with it under bf16.
    trained = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(trained, config.learning_rate, weight_decay=config.weight_decay)
    from timm.optim import muon

    if not has_bf16():  # timm has no setting for it
        muon.zeropower_via_newtonschulz = orthogonalise
    matrices = matrix_weights(model)
    inner = [p for p in trained if p in matrices]
    outer = [p for p in trained if p not in matrices]
    return muon.Muon(
        # Without Nesterov momentum the fallback is AdamW, with it NAdamW.
        [{"params": inner}, {"params": outer, "use_fallback": True, "nesterov": False}],
        config.learning_rate,
        weight_decay=config.weight_decay,
        momentum=0.95,
        nesterov=True,
        # Steps as large as AdamW's, 0.2 sqrt(max(rows, columns)): Liu et al., arXiv:2502.16982.
        adjust_lr_fn="match_rms_adamw",
        betas=(0.9, 0.999),
    )


class LitDreamer(pl.LightningModule):
    """A `CardiacDreamer` with its losses, optimiser and metrics per epoch.

    Dropout depends on (seed, epoch, step, process) alone, so that a resumed run repeats an
    undisturbed one. Raises FloatingPointError, with the step, where a loss is not finite.
    """

    def __init__(self, model: CardiacDreamer, config: TrainingConfig):
        super().__init__()
        self.model, self.config = model, config

    def terms(
        self, batch: Batch, features: Tensor | None = None
    ) -> tuple[Dream, dict[str, Tensor]]:
        """The prediction for a batch and its loss terms; `features`: frame 1's map [B, C, h, w]."""
        if features is None:
            features = self.model.encode(batch.image1)
        dream, target = self.model.imagine(features, batch.action), None
        if self._learns_maps:
            target = self._target(features, batch)
        return dream, losses(dream, batch, target, self.model.pose_std, self.config)

    @property
    def _learns_maps(self) -> bool:
        return self.model.world is not None and self.config.feature + self.config.reconstruction > 0

    @torch.no_grad()
    def _target(self, features: Tensor, batch: Batch) -> Tensor:
        """The map of frame 2, without gradient; without motion it is that of frame 1."""
        target, moved = features.detach().clone(), (batch.action != 0).any(dim=1)
        if moved.any():
            target[moved] = self.model.encode(batch.image2[moved]).to(target.dtype)
        return target

    def weighted(self, terms: dict[str, Tensor], names: tuple[str, ...]) -> Tensor:
        """The sum of the named terms, each with its weight in the configuration."""
        return sum(getattr(self.config, name) * terms[name] for name in names if name in terms)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        at = (self.config.seed, self.current_epoch, batch_idx, self.trainer.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(at).generate_state(1)[0]))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        features = self.model.encode(batch.image1)
        # The maps' losses train the world model alone, or the backbone would learn maps that are
        # easy to predict: they see a copy of the features, and only the poses' gradient goes on.
        copy = features.detach().requires_grad_() if self._learns_maps else features
        _, terms = self.terms(batch, copy)
        total = self.weighted(terms, tuple(terms))
        if not torch.isfinite(total):
            values = ", ".join(f"{name} {term:.3g}" for name, term in terms.items())
            raise FloatingPointError(
                f"step {self.global_step} (epoch {self.current_epoch}): the loss is not finite "
                f"({values}); lower learning_rate"
            )
        self.log("loss", total.detach(), prog_bar=True)
        each = {"train_loss": total, **{f"train_{name}": term for name, term in terms.items()}}
        each = {name: value.detach() for name, value in each.items()}
        self.log_dict(each, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)
        if copy is features:
            return total
        guidance = self.weighted(terms, POSE_TERMS)
        with torch.autocast(features.device.type, enabled=False):
            (gradient,) = torch.autograd.grad(guidance, copy, retain_graph=True)
            # The added term has the poses' gradient, which the copy has cut off.
            return total + (features.float() * gradient.float()).sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if len(batch.action) == 0:  # fewer transitions than processes in the last batch
            return
        dream, terms = self.terms(batch)
        loss = self.weighted(terms, POSE_TERMS)
        values = {"val_loss": loss, **{f"val_{name}": term for name, term in terms.items()}}
        self.log_dict(values, sync_dist=True, batch_size=len(batch.action))
        # Single-frame predictions. A process whose part of the batch has none logs with weight 0:
        # all processes must reduce the same metrics.
        still = (batch.action == 0).all(dim=1)
        count = int(still.sum())
        error = poses.errors(dream.pose[still].float(), batch.pose2[still])
        names = ["val_translation_mm", "val_rotation_deg"]
        names += [f"val_{axis}_{unit}" for axis, unit in zip(poses.AXES, poses.UNITS, strict=True)]
        sums = [error.translation.sum(), error.rotation.sum(), *error.axes.sum(0)]
        means = {n: (s / max(count, 1)).float() for n, s in zip(names, sums, strict=True)}
        self.log_dict(means, sync_dist=True, batch_size=count)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = make_optimizer(self.model, self.config)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            self.config.learning_rate,
            total_steps=int(self.trainer.estimated_stepping_batches),
            cycle_momentum=False,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


# The run's folder


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoint files, written whole: a kill leaves the one before."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_whole(Path(path), content.getvalue())


class Record(pl.Callback):
    """Writes metrics.csv and the best weights after each epoch; its rows are in the checkpoint.

    Lightning's CSVLogger deletes an existing metrics.csv when a run resumes.
    """

    def __init__(self, folder: Path, on_epoch: Callable[[pd.DataFrame], Any] | None):
        self.folder, self.on_epoch = folder, on_epoch
        self.rows: list[dict[str, float]] = []
        self.best, self.spent = float("inf"), 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "best": self.best, "spent": self.spent}

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
        self.spent += time.perf_counter() - self.start
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        metrics.pop("loss", None)
        images = trainer.global_step * module.config.batch_size * module.config.accumulate
        row = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step, "images": images}
        row |= dict(sorted(metrics.items()))
        row |= {"seconds": self.spent, "waiting_share": self.waited / self.trained}
        self.rows.append(row)
        better = metrics["val_loss"] < self.best
        self.best = min(self.best, metrics["val_loss"])
        if not trainer.is_global_zero:
            return
        if better:
            weights = {k: v.cpu().contiguous() for k, v in module.model.state_dict().items()}
            write_whole(self.folder / "model.safetensors", save(weights))
        table = pd.DataFrame(self.rows)
        write_whole(self.folder / "metrics.csv", table.to_csv(index=False).encode())
        log.info("epoch %d: %s", len(table), {k: round(v, 4) for k, v in metrics.items()})
        if self.on_epoch is not None and self.on_epoch(table):
            trainer.should_stop = True


def _claim(folder: Path, config: dict[str, Any]) -> None:
    """Make the run's folder, or check that an existing one is of the same configuration."""
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
        raise ValueError(f"{folder}: is not empty and not a run; choose another run folder")
    folder.mkdir(parents=True, exist_ok=True)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    write_whole(file, json.dumps(content, indent=1, default=str).encode())


# Processes


def _started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _started_by_srun() -> bool:
    """Whether srun started this process as one of several tasks of a job step.

    A notebook inside an interactive allocation also sees SLURM_NTASKS, which Lightning trusts, but
    its number of tasks in the step is 1 or missing.
    """
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def _launch(
    model: ModelConfig,
    training: TrainingConfig,
    data: Transitions,
    folder: Path,
    on_epoch: Callable[[pd.DataFrame], Any] | None,
) -> pd.DataFrame:
    """`fit` in one process per device, by torchrun: the kernel of a notebook cannot be forked."""
    if training.nodes > 1:
        raise ValueError(
            f"training.nodes is {training.nodes}: start this with srun or torchrun on every node; "
            "see the README, GPU and cluster"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    parameters = {
        "data": str(data.folder.resolve()),
        "run": str(folder.resolve()),
        "patients": {str(s): str(p) for s, p in zip(data.scan, data.patient, strict=True)},
        "model": model.model_dump(mode="json"),
        "training": training.model_dump(mode="json"),
    }
    file = folder.with_name(f"{folder.name}.launch.json")
    _write_json(file, parameters)
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
        raise RuntimeError(f"{folder}: a process of the training failed; its error is above")
    return pd.read_csv(table)


def _trainer(
    training: TrainingConfig, folder: Path, record: Record, many: str, progress: bool
) -> pl.Trainer:
    """The Trainer of a run, in this process or as one of several."""
    spread = _started_by_torchrun() or _started_by_srun()
    plugins: list[Any] = [WholeCheckpoints()]
    if not spread:
        plugins.append(LightningEnvironment())  # not that of a Slurm allocation around us
    elif _started_by_torchrun():
        plugins.append(TorchElasticEnvironment())
    last = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    callbacks: list[pl.Callback] = [record, last]
    if training.patience:
        callbacks.append(EarlyStopping("val_loss", patience=training.patience))
    bf16 = training.precision == "bf16" or (training.precision == "auto" and has_bf16())
    several = training.devices * training.nodes > 1
    return pl.Trainer(
        strategy=many if spread else "auto",
        accumulate_grad_batches=training.accumulate,
        max_epochs=training.epochs,
        devices=training.devices,
        num_nodes=training.nodes,
        precision="bf16-mixed" if bf16 else "32-true",
        gradient_clip_val=training.clip,
        sync_batchnorm=torch.cuda.is_available() and several,
        use_distributed_sampler=False,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        plugins=plugins,
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=progress,
    )


def fit(
    model: ModelConfig,
    training: TrainingConfig,
    data: Transitions,
    folder: str | Path,
    on_epoch: Callable[[pd.DataFrame], Any] | None = None,
) -> pd.DataFrame:
    """Train one run in `folder`, or resume it where it stopped; returns its metrics by epoch.

    Args:
        model, training: configurations.
        data: the transitions, read at the model's `image_size`.
        folder: the run's folder, see `dreamer.runs`.
        on_epoch: called with the table so far after every epoch; in a run of one process, a true
            answer stops it there, and the same call resumes it.

    With `devices` over one, processes are started for them, unless torchrun or srun has done so.
    Raises ValueError if the folder belongs to another configuration, OSError with too little disk,
    FloatingPointError on a loss that is not finite (the last good checkpoint is kept).
    """
    folder = Path(folder)
    spread = _started_by_torchrun() or _started_by_srun()
    if training.devices * training.nodes > 1 and not spread:
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
    first = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0) if spread else 0)) == 0
    if first:
        _claim(folder, config)

    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(LeafSpec|srun|num_workers|exists and is not).*")
    pl.seed_everything(training.seed, verbose=False)
    net = CardiacDreamer(model, statistics(data, split.train))
    if training.init:
        left_out = start_from(net, training.init)
        log.warning("starts from %s; left out: %s", training.init, ", ".join(left_out) or "nothing")
    if model.backbone == "resnet34" or model.width % 8 == 0:
        # A fifth faster. With 4 channels in this layout oneDNN's backward pass of a strided 1x1
        # convolution corrupts the heap on AVX2 machines.
        net.backbone.to(memory_format=torch.channels_last)
    needed = 6 * sum(p.nbytes for p in net.parameters()) + 2**20
    if first and (free := shutil.disk_usage(folder).free) < needed:
        raise OSError(f"{folder}: {free / 2**20:.0f} MiB free, {needed / 2**20:.0f} needed")
    parts = {name: getattr(split, name) for name in ("train", "val", "test")}
    patients = {name: sorted({str(p) for p in data.patient[i]}) for name, i in parts.items()}
    if first:
        _write_json(folder / "split.json", {"kind": split.kind, **patients})
        _write_json(folder / "versions.json", versions())
        _write_json(folder / "config.json", config)

    batches = TransitionsModule(
        data,
        split,
        training.batch_size,
        training.identity if net.world is not None else 1.0,
        training.seed,
        training.steps_per_epoch,
        training.reverse,
        training.val_pairs,
    )
    # With a weight of zero the reconstruction's head has no gradient.
    idle = net.world is not None and training.reconstruction == 0
    many = "ddp_find_unused_parameters_true" if idle else "ddp"
    trainer = _trainer(training, folder, Record(folder, on_epoch), many, on_epoch is None)
    last = folder / "last.ckpt"
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(
            LitDreamer(net, training),
            datamodule=batches,
            ckpt_path=last if last.is_file() else None,
            weights_only=True,
        )
    except SystemExit as stopped:  # Lightning's answer to Ctrl-C; a notebook's kernel must live on
        raise KeyboardInterrupt from stopped
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)
    return pd.read_csv(folder / "metrics.csv")


def main() -> None:
    """One process of a training under torchrun or srun: `python -m dreamer.training FILE`.

    FILE is YAML or JSON with the parameters of notebook 02: data, run, model, training and, where
    needed, token_type, seed, patients.
    """
    [file] = sys.argv[1:]
    given = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    if unknown := set(given) - LAUNCH_FIELDS:
        raise SystemExit(f"{file}: unknown parameter {', '.join(sorted(unknown))}")
    model, training = configure(
        given.get("token_type", ""),
        given.get("model", {}),
        given.get("training", {}),
        given.get("seed"),
    )
    data = Transitions(given["data"], model.image_size, given.get("patients"))
    fit(model, training, data, given["run"])


if __name__ == "__main__":
    main()
