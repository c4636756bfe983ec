"""Probes whose answer is known, and what the phantom knows of a frame."""

import json
import shutil

import numpy as np
import pytest
import torch

from dreamer.data import Transitions
from dreamer.model import CardiacDreamer, ModelConfig
from dreamer.phantom import Patient, generate
from dreamer.study import probes
from dreamer.study.probes import Probe, average_precision, average_precisions, gaussian, known


def test_average_precision_by_hand():
    score = torch.tensor([[0.9, 0.8, 0.7], [0.1, 0.2, 0.3], [0.1, 0.2, 0.3]])
    wanted = torch.tensor([[1.0, 0, 1], [1, 0, 0], [0, 0, 0]])
    found = average_precision(score, wanted)
    assert found[:2].tolist() == pytest.approx([(1 + 2 / 3) / 2, 1 / 3]) and found[2].isnan()


def test_average_precision_of_a_patient_is_over_all_cells_of_its_frames():
    score = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.6]])[:, None, None]  # [3, 1, 1, 2]
    wanted = torch.tensor([[1.0, 0], [0, 0], [0, 1]])[:, None, None]
    found = average_precisions(score, wanted, np.array(["b", "b", "a"]))
    assert found[:, 0].tolist() == pytest.approx([1, 1])  # patients in order of their names
    found = average_precisions(score.flip(-1), wanted, np.array(["b", "b", "a"]))
    assert found[:, 0].tolist() == pytest.approx([1 / 2, 1 / 4])
    prior = average_precisions(torch.tensor([[[0.2, 0.7]]]), wanted, np.array(["a", "a", "a"]))
    assert prior[0, 0] == pytest.approx((1 / 3 + 2 / 4) / 2)  # frames in turn where scores tie


def drawn(count, seed, noise=0.0):
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 3, 2, generator=draw) + 5
    weight = torch.arange(12.0).view(6, 2)
    linear = inputs.flatten(1) @ weight + 7
    chance = torch.randn(count, 1, 2, generator=draw)
    return inputs, {"linear": linear, "chance": chance + 3}


def test_a_probe_reads_what_is_linear_and_falls_back_on_the_prior():
    (train, wanted), val, (test, true) = drawn(60, 0), drawn(40, 1), drawn(20, 2)
    probe = Probe((train, wanted), val)
    found = probe(test)
    assert (found["linear"] - true["linear"]).abs().max() < 0.1
    torch.testing.assert_close(probe.prior["chance"], wanted["chance"].mean(0))
    spread = (found["chance"] - probe.prior["chance"]).abs().max()
    assert found["chance"].shape == (20, 1, 2) and spread < 0.2  # the largest penalty was chosen


def test_a_probe_is_ridge_regression(monkeypatch):
    monkeypatch.setattr(probes, "PENALTIES", np.array([0.5]))
    (train, wanted), val, (test, _) = drawn(30, 0), drawn(10, 1), drawn(5, 2)
    x, y = (v.flatten(1).double() for v in (train, wanted["linear"]))
    away, height = x - x.mean(0), y - y.mean(0)
    gram = away.T @ away
    ridge = 0.5 * gram.trace() / len(x) * torch.eye(6)  # over the mean eigenvalue of [30, 30]
    weight = torch.linalg.solve(gram + ridge, away.T @ height)
    by_hand = (test.flatten(1) - x.mean(0)) @ weight + y.mean(0)
    found = Probe((train, wanted), val)(test)["linear"]
    torch.testing.assert_close(found, by_hand.float(), rtol=1e-3, atol=1e-3)


def test_a_gaussian_kernel_by_hand():
    spread = torch.tensor([1.0, 2, 4, 1, 1, 1])
    one, other = torch.zeros(1, 6), torch.tensor([[0, 2.0, 4, 0, 0, 0]])
    assert gaussian(spread)(one, other).item() == pytest.approx(np.exp(-2 / 6))


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probes")
    generate(folder / "data", 2, 4, size=48)
    config = ModelConfig(backbone="compact", channels=8, width=4, image_size=48, d_model=16,
                         num_heads=2, num_layers=1, guidance=(8, 8))  # fmt: skip
    return CardiacDreamer(config).eval(), Transitions(folder / "data", cache=folder), folder


def test_the_truth_of_second_frames(phantom):
    model, data, _ = phantom
    index = np.array([6, 1])
    found = known(model, data, index)
    assert torch.equal(found.image, data.images(data.rows[index, 1]))
    assert torch.equal(found.pose, data.pose2[index]) and found.map.shape == (2, 8, 3, 3)
    names = json.loads((data.folder / "phantom.json").read_text())["structures"]
    for number, at in enumerate(index):
        with np.load(data.folder / data.scan[at] / "truth.npz") as file:
            row = file["frames"].tolist().index(data.frame[at, 1])
            label, visible = file["labels"][row], file["visible"][row]
        cell = (slice(16, 32), slice(16, 32))  # the middle one of nine
        share = np.array([(label[cell] == k + 1)[visible[cell]].sum() / 256 for k in range(23)])
        assert found.truth["visible"][number, :, 1, 1].tolist() == (share >= 0.1).tolist()
        hidden = np.array([(label[cell] == k + 1)[~visible[cell]].sum() / 256 for k in range(23)])
        assert found.truth["shadowed"][number, :, 1, 1].tolist() == (hidden >= 0.1).tolist()
        assert found.truth["shadow"][number, 0, 1, 1] == (hidden.sum() > share.sum())
        patient = Patient([0, int(data.scan[at][-4:])])
        assert found.truth["contact"][number, 0] == patient.contact(data.pose2[at]).float()
    assert len(names) == 23 and found.truth["visible"].any()


def test_contact_is_lost_off_the_skin_of_each_patient(phantom):
    pose = torch.zeros(2, 3, 6)
    pose[:, 1, 2] = -20.0  # mm off the skin
    found = probes.contact(phantom[1], np.array([0, 7]), pose)
    assert found.tolist() == [[1, 0, 1], [1, 0, 1]]
    assert Patient(0, {"contact": 20}).contact(torch.zeros(6)) == 0


def test_other_data_have_no_truth_and_a_missing_frame_is_refused(phantom, tmp_path):
    model, data, _ = phantom
    shutil.copytree(data.folder, tmp_path / "data")
    copy = Transitions(tmp_path / "data", cache=tmp_path)
    file = next(tmp_path.glob("data/*/truth.npz"))
    arrays = dict(np.load(file))
    np.savez(file, **arrays | {"frames": np.array([f"{name}x" for name in arrays["frames"]])})
    with pytest.raises(KeyError):
        known(model, copy, np.arange(len(copy)))
    (tmp_path / "data" / "phantom.json").unlink()
    assert known(model, copy, np.arange(2)).truth == {}
