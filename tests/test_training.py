import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import signal
import subprocess
import time

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from scans import write_scan
from timm.optim import muon

import dreamer
from dreamer import poses
from dreamer.data import Batch, Statistics, Transitions, split_by_patient
from dreamer.model import CardiacDreamer, Dream
from dreamer.runs import (
    TrainingConfig,
    configure,
    has_bf16,
    load_config,
    load_run,
    make_split,
    start_from,
)
from dreamer.training import (
    LitDreamer,
    TransitionsModule,
    fit,
    losses,
    main,
    make_optimizer,
    matrix_weights,
    orthogonalise,
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


# Batches


def test_order_depends_on_seed_and_epoch_alone(folder):
    data = Transitions(folder)
    split = split_by_patient(data, 1, 1)

    def drawn(seed):
        module = TransitionsModule(data, split, 4, identity=0.5, seed=seed)
        return torch.cat([torch.cat((b.pose1, b.action), 1) for b in module.train_dataloader()])

    assert drawn(0).equal(drawn(0)) and not drawn(0).equal(drawn(1))
    share = (drawn(0)[:, 6:] == 0).all(1).float().mean()
    assert 0.2 < share < 0.8


def test_processes_share_one_global_batch(folder):
    data = Transitions(folder)
    split = split_by_patient(data, 1, 1)

    class Rank:
        current_epoch, world_size = 3, 2

        def __init__(self, rank):
            self.global_rank = rank

    def first(trainer, rank=0):
        module = TransitionsModule(data, split, 6, seed=1)
        module.trainer = trainer
        return next(iter(module.train_dataloader())).pose1

    alone = Rank(0)
    alone.world_size = 1
    whole, parts = first(alone), [first(Rank(0)), first(Rank(1))]
    assert [len(p) for p in parts] == [3, 3]
    assert torch.stack(parts, 1).flatten(0, 1).equal(whole)


def test_a_small_scan_is_gone_through_several_times(folder):
    data = Transitions(folder)
    split = split_by_patient(data, 1, 1)
    module = TransitionsModule(data, split, 8, steps_per_epoch=6)
    seen = torch.cat([b.pose1 for b in module.train_dataloader()])
    assert len(seen) == 48 == 2 * len(split.train)
    assert len(torch.unique(seen, dim=0)) == 24


def test_refuses_a_batch_larger_than_the_training_part(folder):
    data = Transitions(folder)
    with pytest.raises(ValueError, match="batch_size 25 exceeds the 24"):
        TransitionsModule(data, split_by_patient(data, 1, 1), 25)


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
    target = torch.tensor([[0.0, 5], [2.0, 9]])[..., None, None]  # variances 1 and 4, mean 2.5
    zero = torch.zeros(2, 6)
    batch = Batch(None, None, zero, zero, zero)
    predicted = dream(zero, next_features=target + 2.0, reconstruction=torch.ones(2, 2, 1, 1))
    terms = losses(predicted, batch, target, torch.ones(6), TrainingConfig())
    assert terms["feature"].item() == pytest.approx(4 / 2.5)
    assert terms["reconstruction"].item() == pytest.approx(1 / 1e-6)  # of a map that is all zero


def two_passes(lit, batch):
    """The gradients by name of the definition: maps imagined anew from features without gradient
    train the world model; poses train everything."""
    dream = lit.model(batch.image1, batch.action)
    again = lit.model.imagine(dream.features.detach(), batch.action)
    target, spread = lit._target(dream.features, batch), lit.model.pose_std
    from_maps = losses(again, batch, target, spread, lit.config)
    from_poses = losses(dream, batch, None, spread, lit.config)
    total = lit.weighted(from_maps, ("feature", "reconstruction"))
    lit.zero_grad()
    (total + lit.weighted(from_poses, tuple(from_poses))).backward()
    return {name: p.grad.clone() for name, p in lit.named_parameters()}


@pytest.mark.parametrize("variant", ["patch", "channel"])
def test_one_forward_pass_gives_the_gradients_of_two(folder, variant):
    options = {"feature": 2.0, "reconstruction": 0.5}
    model, training = configure(variant, MODEL | {"dropout": 0.0}, TRAINING | options)
    lit = LitDreamer(CardiacDreamer(model), training).train()
    lit.log = lit.log_dict = lambda *values, **options: None
    batch = Transitions(folder).batch(np.arange(4))
    expected = two_passes(lit, batch)
    lit.zero_grad()
    lit.training_step(batch, 0).backward()
    for name, parameter in lit.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("term", ["feature", "reconstruction"])
def test_map_losses_train_the_world_model_alone(folder, term):
    weights = dict.fromkeys(("composed", "imagined"), 1e-12) | {
        "feature": 0.0,
        "reconstruction": 0.0,
    }
    model, training = configure("patch", MODEL | {"dropout": 0.0}, TRAINING | weights | {term: 1.0})
    lit = LitDreamer(CardiacDreamer(model), training).train()
    lit.log = lit.log_dict = lambda *values, **options: None
    lit.training_step(Transitions(folder).batch(np.arange(4)), 0).backward()
    head = "next_features" if term == "feature" else "reconstruction"
    assert lit.model.world.tokens.heads[head].weight.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() < 1e-6 for p in lit.model.backbone.parameters())
    assert all(p.grad.abs().sum() < 1e-6 for p in lit.model.head.parameters())


# The optimiser


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (3, 8, 20)])
def test_muon_in_float32_is_timms_without_its_rounding(shape):
    update = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    coefficients = [(4.0, -6.9, 2.9), (3.7, -5.6, 2.3), (2.8, -3.1, 1.2)]
    exact = muon.zeropower_via_newtonschulz(update.double(), 5, coefficients, dtype=torch.float64)
    found = orthogonalise(update, 5, coefficients)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)


def test_muon_runs_in_float32_without_bf16(monkeypatch):
    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", muon.zeropower_via_newtonschulz)
    monkeypatch.setattr("dreamer.training.has_bf16", lambda: False)
    shapes = []

    def noted(update, *arguments, **options):
        shapes.append(tuple(update.shape))
        return orthogonalise(update, *arguments, **options)

    monkeypatch.setattr("dreamer.training.orthogonalise", noted)
    model = CardiacDreamer(configure("patch", MODEL, {})[0])
    optimizer = make_optimizer(model, TrainingConfig(optimizer="muon"))
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()
    assert len(shapes) == len(matrix_weights(model))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_muon_orthogonalises_matrices_and_leaves_the_rest_to_adamw():
    # The gradient of a convolution has singular values 100 to 0.1; the update's are all near one.
    model = CardiacDreamer(configure("patch", MODEL, {})[0])
    config = TrainingConfig(optimizer="muon", learning_rate=0.1, weight_decay=0.0)
    optimizer = make_optimizer(model, config)
    conv = model.backbone.stages[2].conv1.weight  # [8, 8, 3, 3]
    bias = model.head[0].bias
    before = conv.detach().clone()
    left, _ = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
    right, _ = torch.linalg.qr(torch.randn(72, 8, generator=torch.Generator().manual_seed(1)))
    sizes = torch.tensor([100.0, 50, 20, 10, 5, 2, 1, 0.5])
    conv.grad = (left @ torch.diag(sizes) @ right.T).view_as(conv)
    bias.grad = torch.tensor([1.0, -9, 0, 3, 1, 1, 1, 1])
    optimizer.step()
    # Size of a step as AdamW's: 0.2 sqrt(max(rows, columns)) of the flattened matrix.
    step = (before - conv.detach()).flatten(1) / (0.1 * 0.2 * 72**0.5)
    moved = left.T @ step @ right
    assert (moved.diagonal() > 0.5).all() and (moved.diagonal() < 1.4).all()
    assert (moved - torch.diag(moved.diagonal())).abs().max() < 0.05
    torch.testing.assert_close(bias.detach(), torch.tensor([-0.1, 0.1, 0] + [-0.1] * 5))


@pytest.mark.parametrize("token_type", ["patch", "none"])
def test_muon_leaves_the_outer_layers_to_adamw(token_type):
    model = CardiacDreamer(configure(token_type, MODEL, {})[0])
    inner = {n for n, p in model.named_parameters() if p in matrix_weights(model)}
    assert "backbone.stages.1.conv1.weight" in inner and "head.0.weight" in inner
    assert not any("norm" in name or "bias" in name for name in inner)
    assert not inner & {"backbone.stages.0.0.weight", "head.6.weight", "world.action.0.weight"}
    assert ("world.blocks.0.attention.qkv.weight" in inner) == (token_type == "patch")


def test_the_target_of_no_motion_is_the_frames_own_map(folder):
    data = Transitions(folder)
    lit = LitDreamer(CardiacDreamer(configure("patch", MODEL, {})[0]), TrainingConfig()).eval()
    batch = data.batch(np.arange(4), np.array([True, False, True, False]))
    target = lit._target(lit.model.encode(batch.image1), batch)
    torch.testing.assert_close(target, lit.model.encode(batch.image2))


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
    assert versions["torch"] == importlib.metadata.version("torch")
    # The table's error is that of the weights that were kept, on the validation patients.
    data = Transitions(folder)
    val = make_split(data, load_config(tmp_path / "run")[1]).val
    batch = data.batch(val, np.ones(len(val), bool))
    with torch.no_grad():
        pose = model(batch.image1, batch.action).pose
    error = poses.errors(pose, batch.pose1).translation.mean().item()
    best = table.loc[table["val_loss"].idxmin()]
    assert error == pytest.approx(best["val_translation_mm"], rel=1e-4)
    assert dreamer.load_run is load_run


def test_a_finished_run_is_not_trained_again(folder, tmp_path):
    first = run(folder, tmp_path / "run")
    before = digest(tmp_path / "run")
    pd.testing.assert_frame_equal(run(folder, tmp_path / "run"), first)
    assert digest(tmp_path / "run") == before


def run_apart(folder, run_folder, cache, optimizer):
    """A training in a process of its own, which shares no settings with this one."""
    os.environ["DREAMER_CACHE"] = str(cache)
    torch.set_num_threads(1)
    run(folder, run_folder, "channel", epochs=6, optimizer=optimizer)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_and_resumed_equals_undisturbed(folder, tmp_path, optimizer):
    # Forked from a server that has only imported the libraries: a process forked from this one,
    # which has threads, can wait for ever for a lock that one of them held.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["dreamer.training"])

    def start(where):
        arguments = (folder, tmp_path / where, tmp_path / "cache", optimizer)
        process = server.Process(target=run_apart, args=arguments, daemon=True)
        process.start()
        return process

    whole = start("whole")
    table = tmp_path / "cut" / "metrics.csv"
    for epochs in (1, 3):
        process = start("cut")
        while process.is_alive() and not (table.is_file() and len(pd.read_csv(table)) >= epochs):
            time.sleep(0.002)
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    assert len(pd.read_csv(table)) < 6
    last = start("cut")
    for process in (whole, last):
        process.join(300)
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


def test_validation_is_thinned_evenly(folder):
    data = Transitions(folder)
    split = split_by_patient(data, 1, 1)
    batches = TransitionsModule(data, split, 4, val_pairs=3)
    first, *_, last = batches.val
    assert (len(batches.val), first, last) == (3, split.val[0], split.val[-1])
    assert len(TransitionsModule(data, split, 4).val) == len(split.val)


def test_accumulated_batches_are_one_large_batch(folder, tmp_path):
    # An identity of 0 draws nothing, and without the feature terms a loss is a mean over pairs.
    plain = dict(feature=0, reconstruction=0, identity=0, epochs=1)
    model = MODEL | {"dropout": 0.0}
    data = Transitions(folder)
    weights = []
    for name, fields in (
        ("large", dict(batch_size=8, steps_per_epoch=3)),
        ("small", dict(batch_size=4, steps_per_epoch=6, accumulate=2)),
    ):
        configs = configure("patch", model, TRAINING | plain | fields)
        table = fit(*configs, data, tmp_path / name)
        assert table["step"].tolist() == [3] and table["images"].tolist() == [24]
        weights.append(load_run(tmp_path / name).state_dict())
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=2e-5, rtol=0)


def test_the_primary_task_alone(folder, tmp_path):
    alone = dict(imagined=0, feature=0, reconstruction=0)
    table = run(folder, tmp_path / "run", **alone)
    assert "train_feature" not in table and np.isfinite(table["train_composed"]).all()
    np.testing.assert_allclose(table["train_loss"], table["train_composed"])


def test_a_run_starts_from_another_with_all_that_fits(folder, tmp_path, caplog):
    run(folder, tmp_path / "patch", epochs=1)
    model = configure("channel", MODEL, {})[0]
    net = CardiacDreamer(model)
    left_out = start_from(net, tmp_path / "patch")
    assert all("world.tokens" in name for name in left_out) and left_out
    given, own = load_run(tmp_path / "patch").state_dict(), net.state_dict()
    for name in set(own) - set(left_out) - set(Statistics._fields):
        assert torch.equal(own[name], given[name]), name
    run(folder, tmp_path / "tuned", "channel", epochs=1, init=str(tmp_path / "patch"))
    assert "starts from" in caplog.text and "world.tokens.embedding.weight" in caplog.text
    with pytest.raises(FileNotFoundError, match="give the folder of a run"):
        run(folder, tmp_path / "other", init=str(tmp_path / "nowhere"))


def test_frozen_stages_stay(folder, tmp_path):
    model, training = configure("patch", MODEL | {"freeze": 1}, TRAINING | {"epochs": 1})
    fit(model, training, Transitions(folder), tmp_path / "run")
    pl.seed_everything(training.seed, verbose=False)
    before, after = CardiacDreamer(model).state_dict(), load_run(tmp_path / "run").state_dict()
    same = {n for n in before if n.startswith("backbone") and torch.equal(before[n], after[n])}
    assert {n for n in before if n.startswith("backbone.stages.0.")} == same


def test_interrupted_by_hand_leaves_a_usable_run(folder, tmp_path):
    def stop(table):
        if len(table) == 2:
            raise KeyboardInterrupt

    model, training = configure("patch", MODEL, TRAINING)
    with pytest.raises(KeyboardInterrupt):
        fit(model, training, Transitions(folder), tmp_path / "run", on_epoch=stop)
    assert load_run(tmp_path / "run").config == model
    run(folder, tmp_path / "whole")
    run(folder, tmp_path / "run")
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


# Every process writes its weights as training ends; the parent compares them.
RANKS = """
import sys, torch
from dreamer import training
out = sys.argv.pop()
def keep(self):
    torch.save(self.model.state_dict(), f"{out}/rank{self.global_rank}.pt")
training.LitDreamer.on_train_end = keep
training.main()
"""


def test_two_processes_equal_one(folder, tmp_path, monkeypatch):
    plain = dict(epochs=2, steps_per_epoch=3, identity=0.5)
    model = MODEL | {"dropout": 0.0}
    data = Transitions(folder)
    alone = fit(*configure("patch", model, TRAINING | plain), data, tmp_path / "one")
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    popen = subprocess.Popen

    def watched(command, **given):
        place = command.index("-m", 3)
        file = command[place + 2]
        return popen([*command[:place], str(script), file, str(tmp_path)], **given)

    monkeypatch.setattr("dreamer.training.subprocess.Popen", watched)
    seen = []
    two = fit(
        *configure("patch", model, TRAINING | plain | {"devices": 2}),
        data, tmp_path / "two", on_epoch=seen.append,
    )  # fmt: skip
    assert seen and len(two) == 2
    # In validation the maps' variance is that of a process's own part.
    own = ("val_feature", "val_reconstruction")
    columns = [c for c in alone if c.startswith(("train_", "val_")) and c not in own]
    np.testing.assert_allclose(two[columns], alone[columns], atol=1e-4)
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
    kept = load_run(tmp_path / "two").state_dict()
    close = [torch.allclose(ranks[0][n], kept[n], atol=1e-4) for n in kept]
    assert all(close)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_precision_and_optimizer_trains(
    folder, tmp_path, monkeypatch, precision, optimizer, accumulate
):
    # bf16 is emulated where the machine has none.
    monkeypatch.setattr("dreamer.training.has_bf16", lambda: True)
    fields = dict(precision=precision, optimizer=optimizer, accumulate=accumulate, epochs=1)
    table = run(folder, tmp_path / "run", **fields)
    assert np.isfinite(table["val_loss"]).all() and table["step"].tolist() == [4 // accumulate]
    weights = load_run(tmp_path / "run").state_dict().values()
    assert all(value.dtype == torch.float32 for value in weights if value.is_floating_point())


@pytest.mark.parametrize(("available", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_auto_precision_follows_the_machine(folder, tmp_path, monkeypatch, available, expected):
    monkeypatch.setattr("dreamer.training.has_bf16", lambda: available)
    chosen = []
    trainer = pl.Trainer
    monkeypatch.setattr(
        "dreamer.training.pl.Trainer",
        lambda **given: chosen.append(given["precision"]) or trainer(**given),
    )
    run(folder, tmp_path / "run", precision="auto", epochs=1)
    assert chosen == [expected]


def test_two_processes_train_in_bf16_with_muon(folder, tmp_path):
    if not has_bf16():
        pytest.skip("this machine has no bf16, which the two processes would refuse")
    fields = dict(precision="bf16", optimizer="muon", devices=2, epochs=1, accumulate=2)
    table = run(folder, tmp_path / "run", **fields)
    assert np.isfinite(table["val_loss"]).all() and table["step"].tolist() == [2]


def test_inside_a_slurm_allocation_a_notebook_trains_alone(folder, tmp_path, monkeypatch):
    allocation = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "sbatch"}
    for name, value in allocation.items():
        monkeypatch.setenv(name, value)
    assert len(run(folder, tmp_path / "run", epochs=1)) == 1


def test_several_machines_are_started_from_outside(folder, tmp_path):
    with pytest.raises(ValueError, match="start this with srun or torchrun"):
        run(folder, tmp_path / "run", nodes=2)


def test_a_training_started_by_hand_refuses_unknown_parameters(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("data: scans\nrun: r\nepochs: 3\n")
    monkeypatch.setattr("sys.argv", ["dreamer.training", str(tmp_path / "mine.yaml")])
    with pytest.raises(SystemExit, match=r"mine.yaml: unknown parameter epochs"):
        main()


def test_refuses_another_configuration(folder, tmp_path):
    run(folder, tmp_path / "run")
    with pytest.raises(ValueError, match=r"another configuration \(training.batch_size: 8 there"):
        run(folder, tmp_path / "run", batch_size=4)
    with pytest.raises(ValueError, match=r"model.token_type: 'patch' there, 'channel' here"):
        run(folder, tmp_path / "run", token_type="channel")


def test_refuses_a_folder_of_something_else(folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and not a run"):
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
    honest = LitDreamer.terms

    def poisoned(self, batch, features=None):
        dream, terms = honest(self, batch, features)
        bad = self.training and self.global_step == 6
        return dream, {n: t * float("nan") if bad else t for n, t in terms.items()}

    monkeypatch.setattr(LitDreamer, "terms", poisoned)
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
