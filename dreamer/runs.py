"""A run's folder: configuration, split, versions, model. Reading one does not load Lightning.

It holds config.json, split.json, versions.json, metrics.csv (one row per epoch), model.safetensors
(best on validation) and last.ckpt (to resume from). `dreamer.training` writes it.
"""

import importlib.metadata
import json
import logging
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors.torch import load_file, save
from torch import Tensor

from dreamer.data import Split, Statistics, Transitions, split_by_blocks, split_by_patient
from dreamer.files import write_whole
from dreamer.model import CardiacDreamer, ModelConfig

log = logging.getLogger(__name__)

ROUNDING = 0.1  # mm and degrees that a pose may move when weights are rounded to be shared
LARGE = 1_000_000  # weights from which a convolution is shared in 8 bit, with a scale per kernel
SCALE = ".scale"
VERSIONED = ("torch", "torchvision", "pytorch-lightning", "captum", "numpy", "roma")


class TrainingConfig(BaseModel):
    """How a run is trained and split. Unknown fields and values out of range are refused.

    `composed`, `imagined`, `feature`, `reconstruction`: loss weights. `identity`: share of training
    pairs that become "no motion"; `reverse`: share that is time-reversed. `batch_size`: of all
    processes together; an optimiser step takes `accumulate` of them. `steps_per_epoch`: batches, 0
    is one pass over the data. `optimizer`: AdamW as published, or Muon. The learning rate follows
    one cycle. `val_pairs`: transitions validated after each epoch, evenly among those of the
    validation part; 0 is all. `patience`: epochs without a better validation loss before stopping,
    0 never stops. `init`: folder of a run whose weights the training starts from, all that fit.
    `split`: patient, blocks (of time, in one scan) or auto (patient where there are three). `val`,
    `test`: patients, a number or names. `precision`: auto is bf16 where the machine has it.
    `devices`: on each of `nodes`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    epochs: int = Field(30, ge=1)
    steps_per_epoch: int = Field(0, ge=0)
    batch_size: int = Field(32, ge=1)
    learning_rate: float = Field(3e-4, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    clip: float = Field(1.0, gt=0)
    accumulate: int = Field(1, ge=1)
    optimizer: Literal["adamw", "muon"] = "adamw"
    composed: float = Field(1.0, ge=0)
    imagined: float = Field(1.0, ge=0)
    feature: float = Field(1.0, ge=0)
    reconstruction: float = Field(0.01, ge=0)
    beta: float = Field(1.0, gt=0)
    identity: float = Field(0.3, ge=0, le=1)
    reverse: float = Field(0.0, ge=0, le=1)
    patience: int = Field(0, ge=0)
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    split: Literal["auto", "patient", "blocks"] = "auto"
    val: int | list[str] = 12
    val_pairs: int = Field(0, ge=0)
    test: int | list[str] = 24
    blocks: int = Field(30, ge=6)
    gap: int = Field(2, ge=0)
    init: str = ""
    seed: int = Field(0, ge=0)
    devices: int = Field(1, ge=1)
    nodes: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _learns(self):
        if self.composed + self.imagined == 0:
            raise ValueError("composed and imagined are both 0: nothing would train the guidance")
        return self


def configure(
    token_type: str, model: Mapping[str, Any], training: Mapping[str, Any], seed: int | None = None
) -> tuple[ModelConfig, TrainingConfig]:
    """Both configurations from the parameters of a notebook, flat ones and sections.

    An empty `token_type` and a `seed` of None defer to the sections. Raises ValueError where a flat
    parameter and its section disagree, or a field is unknown or out of range.
    """
    model, training = dict(model), dict(training)
    flat = (("token_type", token_type or None, model), ("seed", seed, training))
    for name, value, section in flat:
        if value is not None and section.setdefault(name, value) != value:
            raise ValueError(
                f"{name} is {value!r} as a parameter and {section[name]!r} in its section; "
                "give it once, or the same twice"
            )
    return ModelConfig(**model), TrainingConfig(**training)


def make_split(data: Transitions, config: TrainingConfig) -> Split:
    """The split of a configuration; with `auto`, by patient where there are at least three."""
    by_patient = config.split == "patient"
    if config.split == "auto":
        by_patient = len(set(data.patient)) >= 3
        log.warning("split: %s", "by patient" if by_patient else "blocks within one scan")
    if by_patient:
        return split_by_patient(data, config.val, config.test, seed=0)
    return split_by_blocks(data, config.blocks, config.gap)


def has_bf16() -> bool:
    """Whether this machine multiplies bf16 matrices in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def versions() -> dict[str, str]:
    """Packages, Python, machine, device, commit and date of a measurement."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    cpu = f"{torch.backends.cpu.get_cpu_capability()} CPU, {torch.get_num_threads()} threads"
    present = {d.name for d in importlib.metadata.distributions()}
    return {n: importlib.metadata.version(n) for n in VERSIONED if n in present} | {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "commit": commit.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def load_config(folder: str | Path) -> tuple[ModelConfig, TrainingConfig]:
    """The configurations of a run. Raises FileNotFoundError where there is none."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing; is {folder} a run's folder?")
    config = json.loads(file.read_text())
    return ModelConfig(**config["model"]), TrainingConfig(**config["training"])


def _read(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A run's weights, with those in 8 bit multiplied by their scales."""
    scales = {name: scale for name, scale in weights.items() if name.endswith(SCALE)}
    weights = {name: value for name, value in weights.items() if name not in scales}
    for name, scale in scales.items():
        weights[name.removesuffix(SCALE)] = weights[name.removesuffix(SCALE)] * scale.float()
    return weights


def load_run(folder: str | Path, device: str | torch.device = "cpu") -> CardiacDreamer:
    """The model of a run, in evaluation mode, with its best weights.

    Raises FileNotFoundError where config.json or model.safetensors is missing, ValueError where
    the weights do not fit the configuration.
    """
    config, _ = load_config(folder)
    file = Path(folder) / "model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing; has the run finished its first epoch?")
    model = CardiacDreamer(config.model_copy(update={"weights": "none"}))
    try:
        model.load_state_dict(_read(load_file(file)))
    except RuntimeError as error:
        raise ValueError(f"{file}: does not fit {folder}/config.json: {error}") from error
    return model.eval().to(device)


@torch.no_grad()
def export_run(run: str | Path, folder: str | Path, images: Tensor) -> Path:
    """Copy a run to `folder` with weights in half precision, to be shared; returns the folder.

    Convolutions of LARGE or more weights are kept in 8 bit, with a scale for each kernel.
    `load_run` reads it like any run, in single precision again. The statistics are not rounded.
    Raises ValueError, and writes nothing, where a predicted pose of the frames `images`
    [B, 1, S, S] moves by more than ROUNDING.
    """
    model, still = load_run(run), torch.zeros(len(images), 6)
    before = model(images, still).pose
    rounded = model.state_dict()
    for name, value in model.state_dict().items():
        if value.is_floating_point() and name not in Statistics._fields:
            rounded[name] = value.half()
        if value.ndim == 4 and value.numel() >= LARGE:
            largest = value.abs().amax(dim=(2, 3), keepdim=True)
            rounded[name + SCALE] = scale = (largest / 127).clamp(min=1e-7).half()
            rounded[name] = (value / scale.float()).round().clamp(-127, 127).to(torch.int8)
    model.load_state_dict(_read(rounded))
    moved = (model(images, still).pose - before).abs().max().item()
    if not moved <= ROUNDING:
        raise ValueError(f"{run}: rounding moves a pose by {moved:.3g} mm or degrees")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "split.json", "versions.json"):
        write_whole(folder / name, (Path(run) / name).read_bytes())
    write_whole(folder / "model.safetensors", save(rounded))
    return folder


def start_from(model: CardiacDreamer, folder: str | Path) -> list[str]:
    """Load the weights of another run into `model`, all that fit; returns the names left out.

    Statistics stay those of the new data. Raises FileNotFoundError where the folder is no finished
    run, ValueError where nothing fits.
    """
    file = Path(folder) / "model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"training.init: {file} is missing; give the folder of a run")
    given, own = _read(load_file(file)), model.state_dict()
    fits = {
        name: value
        for name, value in given.items()
        if name not in Statistics._fields and name in own and own[name].shape == value.shape
    }
    if not fits:
        raise ValueError(f"training.init: no weight of {folder} fits this model")
    model.load_state_dict(fits, strict=False)
    return sorted(set(own) - set(fits) - set(Statistics._fields))
