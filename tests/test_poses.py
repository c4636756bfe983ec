import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from dreamer import poses


def random_poses(count, dtype, pitch=85.0, seed=0):
    draw = torch.Generator().manual_seed(seed)
    pose = (torch.rand(count, 6, generator=draw, dtype=torch.float64) * 2 - 1) * torch.tensor(
        [50, 50, 50, 179, pitch, 179], dtype=torch.float64
    )
    return pose.to(dtype)


def test_matrix_by_hand():
    # Yaw of 90 degrees turns the probe's x into the plane's y; the position is copied.
    matrix = poses.to_matrix(torch.tensor([1.0, 2, 3, 0, 0, 90]))
    expected = torch.tensor([[0.0, -1, 0, 1], [1, 0, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]])
    torch.testing.assert_close(matrix, expected, atol=1e-6, rtol=0)


def test_order_of_rotations_by_hand():
    # R = Rz(90) Rx(90): x -> x -> y, y -> z -> z, z -> -y -> x.
    rotation = poses.to_matrix(torch.tensor([0.0, 0, 0, 90, 0, 90]))[:3, :3]
    expected = torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])
    torch.testing.assert_close(rotation, expected, atol=1e-6, rtol=0)


def test_motion_is_in_the_probes_frame_by_hand():
    # Turned by yaw 90, a slide of 10 mm along the probe's x moves it along the plane's y.
    turned = torch.tensor([0.0, 0, 0, 0, 0, 90])
    slide = torch.tensor([10.0, 0, 0, 0, 0, 0])
    there = poses.compose(turned, slide)
    torch.testing.assert_close(there, torch.tensor([0.0, 10, 0, 0, 0, 90]), atol=1e-5, rtol=0)
    torch.testing.assert_close(poses.relative(turned, there), slide, atol=1e-5, rtol=0)
    # What is still to be made from x = 10 mm, yaw 90: back along the probe's y, and turned back.
    left = poses.remaining(torch.tensor([10.0, 0, 0, 0, 0, 90]))
    torch.testing.assert_close(left, torch.tensor([0.0, 10, 0, 0, 0, -90]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-3), (torch.float64, 1e-9)])
def test_round_trips(dtype, close):
    pose, other = random_poses(500, dtype), random_poses(500, dtype, seed=1)
    assert (poses.from_matrix(poses.to_matrix(pose)) - pose).abs().max() < close
    motion = poses.relative(pose, other)
    gap = poses.errors(poses.compose(pose, motion), other)
    assert max(gap.translation.max(), gap.rotation.max()) < 5 * close
    nothing = poses.compose(pose, poses.inverse(pose))
    assert nothing.abs().max() < close
    # P1 = P2 A^-1, the identity on which the loss rests
    for back in (poses.compose(other, poses.inverse(motion)), poses.before(other, motion)):
        gap = poses.errors(back, pose)
        assert max(gap.translation.max(), gap.rotation.max()) < 5 * close


@pytest.mark.parametrize("pitch", [90.0, -90.0, 89.999, -89.999, 89.9999999])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 0.1), (torch.float64, 1e-5)])
def test_rotation_survives_gimbal_lock(pitch, dtype, close):
    pose = random_poses(200, dtype)
    pose[:, 4] = pitch
    again = poses.from_matrix(poses.to_matrix(pose))
    assert torch.isfinite(again).all()
    assert poses.errors(again, pose).rotation.max() < close


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_agrees_with_scipy(dtype, close):
    pose = random_poses(300, dtype)
    theirs = Rotation.from_euler("ZYX", pose[:, [5, 4, 3]].double().numpy(), degrees=True)
    ours = poses.to_matrix(pose)[:, :3, :3].double().numpy()
    assert np.abs(ours - theirs.as_matrix()).max() < close
    other = random_poses(300, dtype, seed=2)
    angle = theirs.inv() * Rotation.from_euler("ZYX", other[:, [5, 4, 3]].numpy(), degrees=True)
    np.testing.assert_allclose(
        poses.errors(pose, other).rotation, np.rad2deg(angle.magnitude()), atol=1e-3
    )


def test_errors_by_hand():
    # 3-4-0 mm is 5 mm; 179 against -179 degrees is 2 degrees, not 358.
    error = poses.errors(
        torch.tensor([[3.0, 4, 0, 0, 0, 179]]), torch.tensor([[0.0, 0, 0, 0, 0, -179]])
    )
    expected = torch.tensor([[3.0, 4, 0, 0, 0, 2]], dtype=torch.float64)
    torch.testing.assert_close(error.axes, expected)
    assert error.translation.item() == pytest.approx(5)
    assert error.rotation.item() == pytest.approx(2, abs=1e-4)


def test_composition_has_gradients():
    pose = random_poses(8, torch.float64, pitch=60).requires_grad_()
    motion = random_poses(8, torch.float64, pitch=60, seed=3)
    assert torch.autograd.gradcheck(lambda p: poses.compose(p, motion), pose, atol=1e-4)


@pytest.mark.parametrize("wrong", [torch.zeros(5), torch.zeros(2, 7), torch.zeros(6).int()])
def test_refuses_other_shapes(wrong):
    with pytest.raises(ValueError, match="a pose is a float tensor"):
        poses.to_matrix(wrong)


def test_refuses_other_matrices():
    with pytest.raises(ValueError, match="rigid transform"):
        poses.from_matrix(torch.eye(3))
