import hashlib
import json
import multiprocessing
import signal
import time

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from scans import write_scan

import dreamer
from dreamer import poses
from dreamer.data import Batch, Transitions
from dreamer.model import CardiacDreamer, Dream
from dreamer.training import (
    LitDreamer,
    TrainingConfig,
    configure,
    fit,
    load_config,
    load_run,
    losses,
    make_split,
    vary,
)

MODEL = {
    "backbone": "compact", "image_size": 32, "channels": 8, "width": 4, "d_model": 8,
    "num_heads": 2, "num_layers": 1, "guidance": [8, 8],
}  # fmt: skip
TRAINING = {"epochs": 3, "steps_per_epoch": 4, "batch_size": 8, "val": 1, "test": 1}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DREAMER_CACHE", str(tmp_path / "cache"))
    for number in range(4):
        write_scan(tmp_path / "scans", f"p{number}", seed=number)
    return tmp_path / "scans"


def run(folder, run_folder, token_type="patch", **fields):
    model, training = configure(token_type, MODEL, TRAINING | fields)
    return fit(model, training, Transitions(folder), run_folder)


def digest(run_folder):
    return hashlib.sha256((run_folder / "model.safetensors").read_bytes()).hexdigest()


# Losses


def dream(pose, next_features=None, reconstruction=None):
    zero = torch.zeros(len(pose), 2, 1, 1)
    nextf, recon = (zero if m is None else m for m in (next_features, reconstruction))
    return Dream(zero, recon, nextf, zero.mean((2, 3)), pose)


def test_pose_losses_by_hand():
    # True: pose 1 zero, a slide of 10 mm, pose 2 = 10 mm. Said: pose 2 = 13 mm, so that composed
    # pose 1 is 3 mm. With a spread of 2 mm both are 1.5 off on one axis of six: (1.5 - 0.5) / 6.
    pose2 = torch.tensor([[10.0, 0, 0, 0, 0, 0]])
    batch = Batch(None, None, torch.zeros(1, 6), pose2, pose2)
    said = dream(torch.tensor([[13.0, 0, 0, 0, 0, 0]]))
    terms = losses(said, batch, None, torch.full((6,), 2.0), TrainingConfig())
    assert terms["imagined"].item() == pytest.approx(1 / 6, abs=1e-6)
    assert terms["composed"].item() == pytest.approx(1 / 6, abs=1e-6)


def test_composition_is_rigid_not_a_subtraction():
    # Turned by yaw 90 at pose 2, a slide along the probe's x is undone along the plane's y.
    turned = torch.tensor([[0.0, 10, 0, 0, 0, 90]])
    action = torch.tensor([[10.0, 0, 0, 0, 0, 0]])
    pose1 = torch.tensor([[0.0, 0, 0, 0, 0, 90]])
    batch = Batch(None, None, pose1, action, turned)
    terms = losses(dream(turned), batch, None, torch.ones(6), TrainingConfig())
    assert terms["composed"].item() < 1e-9


def test_angles_take_the_short_way_in_the_loss():
    pose2 = torch.tensor([[0.0, 0, 0, 179, 0, 0]])
    batch = Batch(None, None, pose2, torch.zeros(1, 6), pose2)
    terms = losses(dream(-pose2), batch, None, torch.ones(6), TrainingConfig())
    assert terms["imagined"].item() == pytest.approx(1.5 / 6, abs=1e-3)


def test_feature_losses_are_relative_to_the_maps_variance():
    target = torch.tensor([[0.0, 5], [2.0, 9]])[..., None, None]  # variances 2 and 8, mean 5
    zero = torch.zeros(2, 6)
    batch = Batch(None, None, zero, zero, zero)
    said = dream(zero, next_features=target + 2.0, reconstruction=torch.ones(2, 2, 1, 1))
    terms = losses(said, batch, target, torch.ones(6), TrainingConfig())
    assert terms["feature"].item() == pytest.approx(4 / 5)
    assert terms["reconstruction"].item() == pytest.approx(1 / 1e-6)  # of a map that is all zero


def test_the_target_map_has_no_gradient(folder):
    data = Transitions(folder)
    model, training = configure("patch", MODEL, TRAINING)
    lit = LitDreamer(CardiacDreamer(model), training)
    _, terms = lit._terms(data.batch(np.arange(4)))
    terms["reconstruction"].backward()
    # Through its own map the backbone learns to be reconstructed only by way of the tokens.
    assert lit.model.world.tokens.heads["reconstruction"].weight.grad.abs().sum() > 0
    assert lit.model.head[0].weight.grad is None


def test_variation_keeps_the_picture_and_its_place():
    torch.manual_seed(0)
    image = torch.zeros(16, 1, 32, 32)
    image[:, :, 8:12, 20:24] = 0.5
    varied = vary(image, 0.3)
    assert varied.min() >= 0 and varied.max() <= 1 and not torch.equal(varied[0], varied[1])
    places = varied.flatten(1).topk(16).indices
    assert ((places // 32 >= 8) & (places // 32 < 12) & (places % 32 >= 20)).float().mean() > 0.95
    assert torch.equal(vary(image, 0.0), image.clamp_min(1e-3))


def test_variation_is_for_training_alone(folder):
    data = Transitions(folder)
    lit = LitDreamer(CardiacDreamer(configure("patch", MODEL, {})[0]), TrainingConfig(augment=0.5))
    batch = data.batch(np.arange(4))
    said = [lit.train(mode)._terms(batch)[0].pose for mode in (True, True, False, False)]
    assert not torch.equal(said[0], said[1]) and torch.equal(said[2], said[3])


# Configuration


def test_flat_and_sectioned_parameters():
    assert configure("", {}, {})[0].token_type == "patch"
    assert configure("channel", {}, {})[0].token_type == "channel"
    assert configure("", {"token_type": "channel"}, {"seed": 3})[1].seed == 3
    assert configure("patch", {"token_type": "patch"}, {}, seed=2)[1].seed == 2
    with pytest.raises(ValueError, match="token_type is 'patch' as a parameter and 'channel'"):
        configure("patch", {"token_type": "channel"}, {})
    with pytest.raises(ValueError, match="seed is 1 as a parameter and 2"):
        configure("", {}, {"seed": 2}, seed=1)


@pytest.mark.parametrize(
    "fields",
    [
        {"epoch": 3},
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": "fast"},
        {"schedule": "step"},
        {"identity": 1.5},
        {"precision": "fp8"},
        {"composed": 0.0, "imagined": 0.0},
    ],
)
def test_refuses_training_fields(fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        TrainingConfig(**fields)


# Runs


@pytest.mark.parametrize("token_type", ["patch", "channel", "none"])
def test_a_run_is_kept_and_loaded(folder, tmp_path, token_type):
    table = run(folder, tmp_path / "run", token_type)
    assert list(table["epoch"]) == [1, 2, 3] and list(table["step"]) == [4, 8, 12]
    assert table["images"].iloc[-1] == 96 and np.isfinite(table["val_rotation_deg"]).all()
    model = load_run(tmp_path / "run")
    assert model.config.token_type == token_type and not model.training
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert split["kind"] == "patient" and len(split["train"]) == 2
    versions = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert versions["torch"] == torch.__version__.split("+")[0] or versions["torch"]
    # The table's error is that of the weights that were kept, on the validation patients.
    data = Transitions(folder)
    val = make_split(data, load_config(tmp_path / "run")[1]).val
    batch = data.batch(val, np.ones(len(val), bool))
    with torch.no_grad():
        said = model(batch.image1.float() / 255, batch.action).pose
    error = poses.errors(said, batch.pose1).translation.mean().item()
    best = table.loc[table["val_loss"].idxmin()]
    assert error == pytest.approx(best["val_translation_mm"], rel=1e-4)
    assert dreamer.load_run is load_run


def test_a_finished_run_is_not_trained_again(folder, tmp_path):
    first = run(folder, tmp_path / "run")
    before = digest(tmp_path / "run")
    pd.testing.assert_frame_equal(run(folder, tmp_path / "run"), first)
    assert digest(tmp_path / "run") == before


def test_killed_and_resumed_equals_undisturbed(folder, tmp_path):
    fork = multiprocessing.get_context("fork")  # the libraries are loaded: a process in no time

    def start(where):
        process = fork.Process(
            target=run, args=(folder, tmp_path / where, "channel"), kwargs={"epochs": 6}
        )
        process.start()
        return process

    whole = start("whole")
    table = tmp_path / "cut" / "metrics.csv"
    for epochs in (1, 3):
        process = start("cut")
        while process.is_alive() and not (table.is_file() and len(pd.read_csv(table)) >= epochs):
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert len(pd.read_csv(table)) < 6
    last = start("cut")
    for process in (whole, last):
        process.join()
        assert process.exitcode == 0
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")
    tables = [pd.read_csv(tmp_path / r / "metrics.csv") for r in ("whole", "cut")]
    tables = [t.drop(columns=["seconds", "waiting_share"]) for t in tables]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    states = [
        torch.load(tmp_path / r / "last.ckpt", weights_only=True)["state_dict"]
        for r in ("whole", "cut")
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_patience_stops_early(folder, tmp_path):
    table = run(folder, tmp_path / "run", epochs=30, patience=2, learning_rate=0.1)
    assert len(table) < 30
    assert table["val_loss"].idxmin() == len(table) - 3


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine", "constant"])
def test_schedules(folder, tmp_path, schedule):
    run(folder, tmp_path / "run", schedule=schedule)
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    rate = state["optimizer_states"][0]["param_groups"][0]["lr"]
    assert rate == pytest.approx(3e-4) if schedule == "constant" else rate < 1e-4


def test_refuses_another_configuration(folder, tmp_path):
    run(folder, tmp_path / "run")
    with pytest.raises(ValueError, match=r"another configuration \(training.batch_size: 8 there"):
        run(folder, tmp_path / "run", batch_size=4)
    with pytest.raises(ValueError, match=r"model.token_type: 'patch' there, 'channel' here"):
        run(folder, tmp_path / "run", token_type="channel")


def test_refuses_a_folder_of_something_else(folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        run(folder, tmp_path / "run")


def test_refuses_frames_of_another_size(folder, tmp_path):
    model, training = configure("patch", MODEL | {"image_size": 48}, TRAINING)
    with pytest.raises(ValueError, match=r"frames have 32 px, model.image_size is 48"):
        fit(model, training, Transitions(folder), tmp_path / "run")


def test_refuses_bf16_where_there_is_none(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("dreamer.training.has_bf16", lambda: False)
    with pytest.raises(ValueError, match="no bf16"):
        run(folder, tmp_path / "run", precision="bf16")


def test_refuses_too_little_disk(folder, tmp_path, monkeypatch):
    Transitions(folder)

    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with pytest.raises(OSError, match="needed"):
        run(folder, tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good(folder, tmp_path, monkeypatch):
    honest = LitDreamer._terms

    def poisoned(self, batch):
        dream, terms = honest(self, batch)
        bad = self.training and self.global_step == 6
        return dream, {n: t * float("nan") if bad else t for n, t in terms.items()}

    monkeypatch.setattr(LitDreamer, "_terms", poisoned)
    with pytest.raises(FloatingPointError, match=r"step 6 \(epoch 1\)"):
        run(folder, tmp_path / "run")
    assert len(pd.read_csv(tmp_path / "run" / "metrics.csv")) == 1
    monkeypatch.undo()
    monkeypatch.setenv("DREAMER_CACHE", str(tmp_path / "cache"))
    assert len(run(folder, tmp_path / "run")) == 3


def test_refuses_runs_that_are_none(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"is .* a run's folder"):
        load_run(tmp_path)
    run(folder, tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    config = json.loads(file.read_text())
    config["model"]["d_model"] = 16
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not fit"):
        load_run(tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has the run finished its first epoch"):
        load_run(tmp_path / "run")
