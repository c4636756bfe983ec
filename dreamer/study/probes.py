"""Probes: what can be read from a map, from tokens or from a pose, and what the phantom knows."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from dreamer.attribution import encode
from dreamer.data import Transitions
from dreamer.model import CardiacDreamer
from dreamer.phantom import Patient, read_card

LEAST = 0.1  # share of a cell that a structure must fill to be in it
PENALTIES = 10.0 ** np.arange(-3, 2.1, 0.5)  # over the mean eigenvalue


def linear(one: Tensor, other: Tensor) -> Tensor:
    """Inner products [N, M] of inputs [N, ...], [M, ...]: ridge regression on all their values."""
    return one.flatten(1).float() @ other.flatten(1).float().T


def gaussian(spread: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A kernel of poses [N, 6], [M, 6]: their similarity [N, M] in units of their `spread` [6]."""
    return lambda one, other: torch.exp(
        -torch.cdist(one / spread, other / spread).square() / len(spread)
    )


class Probe:
    """Kernel ridge regression from inputs [N, ...] to targets by name, each [N, ...].

    It has one weight per training frame, whatever the size of the inputs. The penalty of each
    target is chosen on validation frames. `prior`: means of the targets, without the first axis.
    """

    def __init__(
        self,
        train: tuple[Tensor, Mapping[str, Tensor]],
        val: tuple[Tensor, Mapping[str, Tensor]],
        kernel: Callable[[Tensor, Tensor], Tensor] = linear,
    ):
        inputs, targets = train
        self.kernel, self.mean = kernel, inputs.float().mean(0)
        self.inputs = inputs - self.mean
        self.prior = {name: target.float().mean(0) for name, target in targets.items()}
        values, vectors = torch.linalg.eigh(self._similar(inputs))
        held_out, self.weights = self._similar(val[0]) @ vectors, {}
        for name, target in targets.items():
            along = vectors.T @ (target - self.prior[name]).flatten(1).double()
            wanted = (val[1][name] - self.prior[name]).flatten(1).double()
            shrink = [1 / (values + penalty * values.mean()) for penalty in PENALTIES]
            loss = [((held_out * s) @ along - wanted).square().mean() for s in shrink]
            self.weights[name] = vectors @ (along * shrink[np.argmin(loss)][:, None])

    def _similar(self, inputs: Tensor) -> Tensor:
        return self.kernel(inputs - self.mean, self.inputs).double()

    def __call__(self, inputs: Tensor) -> dict[str, Tensor]:
        """Predictions by name, each [N, ...]."""
        similar = self._similar(inputs)
        return {
            name: (similar @ weight).float().view(-1, *self.prior[name].shape) + self.prior[name]
            for name, weight in self.weights.items()
        }


class Known(NamedTuple):
    """N frames: `image` uint8 [N, 1, S, S], `map` [N, C, h, w], `pose` [N, 6], and `truth`, what
    the phantom knows of them, by name; empty for other data.

    visible, shadowed [N, structures, h, w]: 1 where a structure fills a tenth of a cell, seen or in
    shadow; shadow [N, 1, h, w]: 1 where more of a cell is shadowed than seen; contact [N, 1]: share
    of the probe's face on the skin.
    """

    image: Tensor
    map: Tensor
    pose: Tensor
    truth: dict[str, Tensor]


def known(model: CardiacDreamer, data: Transitions, index: NDArray[np.int64]) -> Known:
    """The second frames of the transitions `index`. Raises KeyError where the truth lacks one."""
    rows, pose = data.rows[index, 1], data.pose2[index]
    maps, truth = encode(model, data.images(rows)).cpu(), {}
    if phantom := card(data):
        grid, count = maps.shape[2:], len(phantom["structures"])
        filled = torch.zeros(2, len(index), count, *grid)  # visible and shadowed
        for scan, at in groups(data.scan[index]):
            with np.load(data.folder / scan / "truth.npz") as file:
                order = pd.Series(range(len(file["frames"])), file["frames"])
                where = order.loc[data.frame[index[at], 1]].to_numpy()
                labels, visible = (torch.from_numpy(file[k][where]) for k in ("labels", "visible"))
            for part, shown in zip(filled, (visible, ~visible), strict=True):
                one_hot = F.one_hot((labels * shown).long(), count + 1)[..., 1:].float()
                part[at] = F.adaptive_avg_pool2d(one_hot.permute(0, 3, 1, 2), grid)
        area = filled.sum(2, keepdim=True)
        truth = dict(zip(("visible", "shadowed"), (filled >= LEAST).float(), strict=True))
        truth["shadow"] = (area[1] > area[0]).float()
        truth["contact"] = contact(data, index, pose)[:, None]
    return Known(data.images(rows), maps, pose, truth)


def contact(data: Transitions, index: NDArray[np.int64], pose: Tensor) -> Tensor:
    """Share [N, ...] of the probe's face on the skin at poses [N, ..., 6] over the virtual patients
    of the transitions `index`."""
    arguments, share = card(data)["arguments"], torch.zeros(pose.shape[:-1])
    for scan, at in groups(data.scan[index]):
        seed = [arguments["seed"], int(scan.rsplit("_", 1)[1])]
        share[at] = Patient(seed, arguments.get("vary")).contact(pose[at]).float()
    return share


def average_precision(score: Tensor, wanted: Tensor) -> Tensor:
    """Mean precision at the positives along the last axis; NaN where there are none."""
    hit = wanted.gather(-1, score.argsort(dim=-1, descending=True, stable=True)).double()
    precision = hit.cumsum(-1) / torch.arange(1, hit.shape[-1] + 1)
    return (precision * hit).sum(-1) / hit.sum(-1)


def average_precisions(score: Tensor, wanted: Tensor, patient: NDArray[np.str_]) -> Tensor:
    """Average precision [patients, S] of scores [N, S, h, w] over the cells of a patient's frames;
    `score` may lack the first axis."""
    parts = [(score.expand_as(wanted)[at], wanted[at]) for _, at in groups(patient)]
    flat = [[rearrange(x, "n s h w -> s (n h w)") for x in part] for part in parts]
    return torch.stack([average_precision(*part) for part in flat])


def card(data: Transitions) -> dict:
    """The phantom's card; empty for other data."""
    return read_card(data.folder) or {}


def groups(names: NDArray[np.str_]) -> list[tuple[str, NDArray[np.int64]]]:
    """Each name, in order, and where it stands."""
    return [(str(name), np.flatnonzero(names == name)) for name in np.unique(names)]
