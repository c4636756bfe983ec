"""Probe poses in six degrees of freedom and the rigid motions between them.

A pose is [x, y, z, roll, pitch, yaw] in mm and degrees, the probe relative to the target plane
(target = zero), with R = Rz(yaw) Ry(pitch) Rx(roll), intrinsic ZYX. Rotations are computed by RoMa
(Bregier, "Deep Regression on Manifolds", 3DV 2021). The motion from pose 1 to pose 2 in the probe's
frame is A = P1^-1 P2, so P1 = P2 A^-1, and the motion that remains to the target is P^-1.
"""

from typing import NamedTuple

import roma
import torch
from torch import Tensor

AXES = ("x", "y", "z", "roll", "pitch", "yaw")
UNITS = ("mm", "mm", "mm", "deg", "deg", "deg")


class PoseError(NamedTuple):
    """`axes` [..., 6] absolute per axis (mm, deg), `translation` [...] mm, `rotation` [...] deg."""

    axes: Tensor
    translation: Tensor
    rotation: Tensor


def _checked(pose: Tensor) -> Tensor:
    if pose.shape[-1:] != (6,) or not pose.is_floating_point():
        raise ValueError(
            f"a pose is a float tensor [..., 6] ({', '.join(AXES)}); "
            f"got {pose.dtype} {list(pose.shape)}"
        )
    return pose


def to_matrix(pose: Tensor) -> Tensor:
    """Rigid transforms [..., 4, 4] (translation in mm) of poses [..., 6] in mm and degrees.

    Keeps dtype and device, and is differentiable. Raises ValueError on any other shape.
    """
    pose = _checked(pose)
    matrix = torch.zeros(*pose.shape[:-1], 4, 4, dtype=pose.dtype, device=pose.device)
    matrix[..., :3, :3] = roma.euler_to_rotmat("ZYX", pose[..., [5, 4, 3]], degrees=True)
    matrix[..., :3, 3] = pose[..., :3]
    matrix[..., 3, 3] = 1
    return matrix


def from_matrix(matrix: Tensor) -> Tensor:
    """Poses [..., 6] in mm and degrees of rigid transforms [..., 4, 4].

    Pitch lies in [-90, 90]. At ±90 (gimbal lock) only the combination of roll and yaw is defined:
    the rotation is still exact, its division between the two is a convention.
    """
    if matrix.shape[-2:] != (4, 4):
        raise ValueError(f"a rigid transform is [..., 4, 4]; got {list(matrix.shape)}")
    angles = roma.rotmat_to_euler("ZYX", matrix[..., :3, :3], degrees=True)
    return torch.cat((matrix[..., :3, 3], angles[..., [2, 1, 0]]), dim=-1)


def _inverse_matrix(matrix: Tensor) -> Tensor:
    rotation = matrix[..., :3, :3].transpose(-1, -2)
    inverse = matrix.clone()
    inverse[..., :3, :3] = rotation
    inverse[..., :3, 3] = -(rotation @ matrix[..., :3, 3:])[..., 0]
    return inverse


def _matrices(*given: Tensor) -> Tensor:
    # All in one call: for small batches the overhead of many small operations dominates.
    return to_matrix(torch.stack(torch.broadcast_tensors(*map(_checked, given))))


def compose(first: Tensor, then: Tensor) -> Tensor:
    """The pose [..., 6] reached from pose `first` by the motion `then` in the probe's frame."""
    start, motion = _matrices(first, then)
    return from_matrix(start @ motion)


def before(reached: Tensor, motion: Tensor) -> Tensor:
    """The pose [..., 6] from which `motion`, in the probe's frame, leads to `reached`."""
    end, made = _matrices(reached, motion)
    return from_matrix(end @ _inverse_matrix(made))


def inverse(pose: Tensor) -> Tensor:
    """The inverse [..., 6] of a pose or motion: `compose(pose, inverse(pose))` is zero."""
    return from_matrix(_inverse_matrix(to_matrix(pose)))


def relative(start: Tensor, end: Tensor) -> Tensor:
    """The motion [..., 6], in the probe's frame at `start`, that leads from `start` to `end`."""
    here, there = _matrices(start, end)
    return from_matrix(_inverse_matrix(here) @ there)


def remaining(pose: Tensor) -> Tensor:
    """The motion [..., 6] that remains from `pose` to the target plane: the guidance."""
    return inverse(pose)


def wrap(degrees: Tensor) -> Tensor:
    """Angles wrapped into [-180, 180) degrees."""
    return torch.remainder(degrees + 180, 360) - 180


def errors(predicted: Tensor, true: Tensor) -> PoseError:
    """`PoseError` between poses [..., 6]: per axis, translation and rotation.

    Euler angles are subtracted the short way round; the rotation error is the geodesic angle
    between the two orientations and does not depend on the choice of axes. Computed in float64.
    """
    predicted, true = _checked(predicted).double(), _checked(true).double()
    difference = predicted - true
    axes = torch.cat((difference[..., :3], wrap(difference[..., 3:])), dim=-1).abs()
    angle = roma.rotmat_geodesic_distance(
        to_matrix(predicted)[..., :3, :3], to_matrix(true)[..., :3, :3]
    )
    return PoseError(axes, difference[..., :3].norm(dim=-1), torch.rad2deg(angle))
