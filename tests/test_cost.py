"""Benchmark: counts against counter and hand, fast path, protocols, verdicts, refusals."""

import json
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from scans import TINY

from dreamer.study import cost as benchmark, cold, costs
from dreamer.study.fast import QUERIES, InParts, difference, fast
from dreamer.figures import benchmark as draw
from dreamer.model import Attention, CardiacDreamer, ModelConfig

RESNET = {"image_size": 64, "d_model": 32, "num_heads": 4, "num_layers": 1}
CPU = torch.device("cpu")


# ---- counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shapes", [{}, {"image_size": 448}, RESNET, TINY, {**TINY, "norm_first": True}]
)
@pytest.mark.parametrize("variant", costs.VARIANTS)
def test_formula_agrees_with_the_counter(shapes, variant):
    config = costs.configs(shapes)[variant]
    assert sum(costs.flops(config, 2).values()) == pytest.approx(costs.counted(config, 2), rel=0.01)


OPTIONS = [
    {"positions": "learned-2d"}, {"hierarchy": 2}, {"pooling": "attention"}, {"pooling": "action"},
    {"pooling": "generalised-mean"}, {"token_type": "both"}, {"token_dropout": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("fields", OPTIONS, ids=str)
@pytest.mark.parametrize("shapes", [TINY, RESNET], ids=["compact", "resnet34"])
def test_formula_knows_the_options(shapes, fields):
    config = ModelConfig(**{**shapes, **fields})
    assert sum(costs.flops(config, 2).values()) == pytest.approx(costs.counted(config, 2), rel=0.01)
    with torch.device("meta"):
        model = CardiacDreamer(config)
    total = sum(p.numel() for p in model.parameters())
    assert sum(costs.parameters(model).values()) == total
    assert costs.predicted_memory(config)["parameters"] >= 4 * total / 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", OPTIONS, ids=str)
def test_fast_answers_with_every_option(fields, dtype):
    model = CardiacDreamer(ModelConfig(**{**TINY, **fields})).eval()
    image, action = costs.inputs(model.config, 3)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    with torch.no_grad():
        expected, got = model(image, action), fast(model, dtype)(image, action)
    torch.testing.assert_close(got.pose, expected.pose, atol=tolerance, rtol=0)


def test_attention_in_parts_refuses_windows():
    with pytest.raises(ValueError, match="knows no windows"):
        InParts(Attention(16, 2, 0.0))(torch.zeros(1, 3, 16), torch.ones(3, 3, dtype=torch.bool))


def test_parameters_tokens_and_predicted_memory_are_the_published_ones():
    rows = pd.DataFrame(costs.counts({}))
    for variant, claim in costs.CLAIM.items():
        own = rows[rows["variant"] == variant].groupby("measure")["value"].sum()
        assert own["parameters"] == claim["parameters"]
        assert own["tokens"] == claim["tokens"]
        assert own["predicted memory"] == pytest.approx(claim["memory"], rel=0.01)


def test_operations_predict_four_fifths_and_not_the_claim():
    rows = pd.DataFrame(costs.counts({}))
    less = rows[rows["measure"] == "reduction"]["value"].item()
    assert 0.77 < less < 0.82


def test_crossing_is_between_the_sizes_where_the_order_changes():
    found = costs.crossing([100, 200, 300], [1.0, 2.0, 8.0], [4.0, 4.0, 4.0])
    assert found == pytest.approx(250)  # halfway in the logarithm from 2/4 to 8/4
    assert math.isnan(costs.crossing([100, 200], [1.0, 2.0], [4.0, 4.0]))


def test_equal_tokens_cost_the_same_so_the_predicted_crossing_is_known():
    # 512 patch tokens would be a grid of 22.6 x 22.6, at stride 32: 724 px.
    sizes, lines = [672, 704, 736, 768], {}
    for variant in costs.VARIANTS:
        works = [costs.flops(costs.configs({"image_size": s})[variant]) for s in sizes]
        lines[variant] = [sum(w.values()) - w["backbone"] for w in works]
    assert costs.crossing(sizes, lines["patch"], lines["channel"]) == pytest.approx(724, abs=2)


# ---- the fast path -------------------------------------------------------------------------------


def calibrated(shapes, variant="patch"):
    """A model whose batch norms do something, in front of frames that differ."""
    model = cold.build(costs.configs(shapes)[variant])
    image, pose = benchmark.lesson(model.config, 6, torch.Generator().manual_seed(0))
    model.backbone.train()
    with torch.no_grad():
        model.encode(image)
    return model.eval(), image, torch.randn_like(pose)


@pytest.mark.parametrize("variant", costs.VARIANTS)
def test_fused_and_packed_fp32_is_the_plain_path(variant):
    model, image, action = calibrated(RESNET, variant)
    quick = fast(model, torch.float32)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in quick.modules())
    with torch.no_grad():
        expected, got = model(image, action), quick(image, action)
    for name in expected._fields:
        torch.testing.assert_close(
            getattr(got, name), getattr(expected, name), atol=1e-4, rtol=1e-4
        )


def test_fast_leaves_the_model_alone_and_answers_in_fp32():
    model, image, action = calibrated(RESNET)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    dream = fast(model, torch.bfloat16)(image, action)
    assert all(part.dtype == torch.float32 and not part.requires_grad for part in dream)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_attention_in_parts_is_attention():
    torch.manual_seed(0)
    attention = Attention(16, 2, 0.0).eval()
    x = torch.randn(2, QUERIES + 3, 16)  # two parts, of unequal size
    with torch.no_grad():
        torch.testing.assert_close(InParts(attention)(x), attention(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", costs.VARIANTS)
def test_bf16_moves_the_pose_of_a_taught_model_by_less_than_one_percent(variant):
    config = costs.configs({**TINY, "d_model": 32, "width": 32, "channels": 32})[variant]
    model = benchmark.taught(config, 80)
    image, pose = benchmark.lesson(config, 32, torch.Generator().manual_seed(1))
    assert difference(model, fast(model, torch.bfloat16), image, torch.zeros_like(pose)) < 0.01


def test_difference_by_hand():
    class Says(torch.nn.Module):
        def __init__(self, pose):
            super().__init__()
            self.pose, self.pose_std = torch.tensor(pose), torch.tensor([2.0] * 6)

        def forward(self, image, action):
            return self

    zeros = [0.0] * 5
    model, quick = (
        Says([[4.0, *zeros], [-4.0, *zeros]]),
        Says([[4.0, *zeros], [-4.0, 0.4, *zeros[1:]]]),
    )
    assert difference(model, quick, None, None) == pytest.approx(0.2)  # 0.4 in units of 2


def test_fast_refuses_other_dtypes_and_recorded_attention():
    model = cold.build(costs.configs(TINY)["patch"])
    with pytest.raises(ValueError, match="dtype"):
        fast(model, torch.float16)
    model.world.blocks[0].attention.recorded = True
    with pytest.raises(ValueError, match="recorded"):
        fast(model)


# ---- measurement ---------------------------------------------------------------------------------


def test_the_library_encoder_is_our_blocks():
    model = cold.build(costs.configs(TINY)["channel"])
    tokens = torch.randn(2, 17, 16)
    with torch.no_grad():
        library = benchmark.encoder(model.world.blocks, model.config)(tokens)
        torch.testing.assert_close(library, benchmark.through(model.world.blocks, tokens))


def test_warm_takes_turns_and_keeps_the_rounds():
    turns = []
    calls = {name: lambda name=name: turns.append(name) for name in "ab"}
    seconds = benchmark.warm(calls, repeats=3, least=0.0)
    assert {k: len(v) for k, v in seconds.items()} == {"a": 3, "b": 3}
    assert turns == ["a", "b"] * 4  # the first round warms up
    assert len(benchmark.warm(calls, repeats=3, enough=0.0)["a"]) == 1


def test_cold_passes_run_in_processes_of_their_own():
    config = costs.configs(TINY)
    found = cold.apart(cold.single, [config["channel"], config["patch"]], "cpu")
    assert list(found) == ["channel", "patch"]  # the claim's order is kept
    assert all(0 < got["clock"] <= got["waited"] for got in found.values())
    assert all(0 <= got["weights"] <= got["peak"] for got in found.values())
    peak = cold.apart(cold.peak, config["patch"], "cpu", "training", "float32")
    assert 0 <= peak["weights"] <= peak["peak"] and peak["seconds"] > 0
    with pytest.raises(ZeroDivisionError):
        cold.apart(divmod, 1, 0)


# ---- verdicts, files, figures --------------------------------------------------------------------


def made(channel=2.0, patch=0.4, start=1.0):
    """A table as a run leaves it, from made-up times: whoever runs first pays `start` seconds."""
    rows = costs.counts({})
    at = {"path": "plain", "dtype": "float32", "batch": 4, "image": 224}
    warm = {"channel": channel, "patch": patch}
    protocols = {
        costs.CLAIMED: {"channel": channel + start, "patch": patch},
        costs.MIRRORED: {"channel": channel, "patch": patch + start},
        costs.FRESH: {"channel": channel + start, "patch": patch + start},
    }
    for protocol, seconds in protocols.items():
        for variant, value in seconds.items():
            rows.append(
                benchmark.row("cold", [value] * 2, "s", protocol=protocol, variant=variant, **at)
            )
        less = 1 - seconds["patch"] / seconds["channel"]
        rows.append(benchmark.row("reduction", [less] * 2, "", protocol=protocol, **at))
    seconds = {(v, "plain", "float32"): np.full(3, s) for v, s in warm.items()}
    seconds |= {(v, "fast", "bfloat16"): np.full(3, s / 2.5) for v, s in warm.items()}
    seconds |= {(v, w, "float32"): np.ones(3) for v in warm for w in ("blocks", "encoder")}
    seconds |= {("1024", "limit", d): np.ones(3) for d in ("float32", "bfloat16")}
    amount = {k: 1e9 * s.mean() for k, s in seconds.items()}
    rows += benchmark._compared(seconds, amount, {"batch": 4, "image": 224, "protocol": "warm"})
    rows.append(
        benchmark.row("pose difference", 0.02, "", variant="patch", path="fast", dtype="bfloat16")
    )
    about = dict.fromkeys(("machine", "device", "torch", "commit", "date"), "x")
    return benchmark.table(rows, about), about


def test_verdicts_are_computed_from_the_table():
    results, _ = made(channel=2.0, patch=0.4, start=7.3)
    found = costs.verdicts(results, "full", full=True)
    assert list(found.columns) == [
        "claim",
        "published",
        "measured",
        "interval",
        "verdict",
        "config",
        "n",
    ]
    faster = found[found["claim"] == "patch tokens are faster"].set_index("config")
    assert (
        faster.loc[[c for c in faster.index if "channel first" in c], "measured"].item() == "95.7%"
    )
    said = {c: faster.loc[c, "verdict"] for c in faster.index}
    assert [v for c, v in said.items() if "channel first" in c] == ["reproduced"]
    assert [v for c, v in said.items() if "warm, in" in c] == ["not reproduced"]
    counts = found[found["claim"].str.contains("parameters|: tokens|memory")]
    assert counts["verdict"].str.startswith("confirmed").all() and len(counts) == 6
    other = costs.verdicts(results, "tiny", full=False)
    assert set(other["verdict"]) == {"no verdict: other shapes"}


def test_goals_say_what_was_met():
    results, _ = made()
    found = costs.goals(results).set_index(["goal", "variant"])["met"]
    assert found["fast path / plain fp32, speed", "patch"] == "yes"
    assert found["largest pose difference / spread of poses", "patch"] == "no"


def test_conclusion_speaks_from_the_numbers():
    results, _ = made(channel=2.0, patch=0.4, start=1.0)
    text = costs.conclusion(results, {"predicted": 724.0, "measured": math.nan})
    assert "**80.0%** faster" in text and "**30.0%**" in text and "predicted at 724 px" in text


def test_results_are_saved_whole_and_several_machines_load_as_one(tmp_path):
    results, about = made()
    benchmark.save(results, about, tmp_path, "03_benchmark")
    document = json.loads((tmp_path / "03_benchmark.json").read_text())
    assert document["machine"]["machine"] == "x" and len(document["rows"]) == len(results)
    other = results.assign(machine="y")
    benchmark.save_table(other, tmp_path, "other")
    both = benchmark.load([tmp_path / "03_benchmark.csv", tmp_path / "other.csv"])
    pd.testing.assert_frame_equal(
        both[both["machine"] == "x"].reset_index(drop=True), results, check_dtype=False
    )
    for plot in (draw.cold_and_warm, draw.share, draw.machines):
        plt.close(plot(both[both["machine"] == "x"]) if plot is not draw.machines else plot(both))
    (tmp_path / "wrong.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"wrong\.csv.*no column"):
        benchmark.load([tmp_path / "wrong.csv"])
    with pytest.raises(ValueError, match="at least one"):
        benchmark.load([])


def test_refusals_name_the_parameter():
    with pytest.raises(ValueError, match="device"):
        benchmark.choose("tpu", ["float32"])
    with pytest.raises(ValueError, match="dtypes"):
        benchmark.choose("cpu", ["float16"])
    with pytest.raises(ValueError, match="no column"):
        benchmark.row("latency", 1.0, "s", colour="red")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda"):
            benchmark.choose("cuda", ["float32"])
