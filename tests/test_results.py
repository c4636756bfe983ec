"""The results store: schema, merging, and verdicts from a plan."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml

from dreamer.study import reference, results

PLAN = {
    "preset": "laptop",
    "seeds": list(range(100, 110)),
    "data": {"patients": 8, "frames": 6, "seed": 0},
    "test": {"patients": 3, "frames": 6, "seed": 7},
    "claims": [
        {
            "family": "accuracy", "claim": "patch is not worse than channel",
            "published": "equal accuracy", "measure": "rotation_deg", "unit": "deg",
            "first": {"variant": "channel"}, "second": {"variant": "patch"},
            "test": "not worse", "margin": {"learned": 0.1},
        },
        {
            "family": "imagination", "claim": "imagined poses are better than ignored motions",
            "published": "", "measure": "imagined_rotation_deg", "unit": "deg",
            "first": {"variant": "patch", "condition": "ignored"},
            "second": {"variant": "patch", "condition": "imagined"},
            "test": "less", "margin": None,
        },
        {
            "family": "cost", "claim": "never measured", "published": "", "measure": "seconds",
            "unit": "s", "first": {"variant": "patch"}, "second": {"variant": "channel"},
            "test": "less", "margin": None,
        },
    ],
}  # fmt: skip


def record(variant="patch", seed=100, **fields):
    found = reference.identity("laptop", variant, seed)
    found |= {"tokens": 50, "parameters": 1, "steps": 640, "images": 20480}
    found |= {"flop": 1e12, "seconds": 200.0, "data": "d", "test": "t", "plan": "p"}
    return found | {"precision": "fp32", "settings": {}, "versions": {}} | fields


def table(values, measure="rotation_deg", condition="", family="accuracy"):
    rows = {"family": family, "measure": measure, "condition": condition, "value": values}
    return pd.DataFrame(rows | {"patient": [f"p{k}" for k in range(len(values))]})


def fill(folder, seeds=range(100, 110), channel=10.0):
    """Patch errs by about 10 degrees, channel by `channel`, the mean pose by 20."""
    draw = np.random.default_rng(0)
    (folder / "plan.yaml").write_text(yaml.safe_dump(PLAN))
    for seed in seeds:
        for variant, centre in (("patch", 10.0), ("channel", channel)):
            parts = [
                table(centre + draw.normal(0, 0.1, 30)),
                table(np.full(30, 20.0), condition="mean pose"),
                table(
                    8 + draw.normal(0, 0.1, 30), "imagined_rotation_deg", "imagined", "imagination"
                ),
                table(
                    9 + draw.normal(0, 0.1, 30), "imagined_rotation_deg", "ignored", "imagination"
                ),
            ]
            results.write(folder, record(variant, seed), pd.concat(parts))
    return folder


def test_what_is_written_is_read_and_stores_merge_by_copying(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    curve = pd.DataFrame({"epoch": [1, 2], "val_loss": [0.5, 0.25]})
    results.write(here, record(seed=1), table([1.0, 2.0]), curve)
    folder = results.write(there, record(seed=2), table([3.0, 5.0]))
    folder.rename(here / folder.name)
    store = results.read(here)
    assert store.runs["seed"].tolist() == [1, 2]
    cells = results.cells(store, "rotation_deg", preset="laptop", variant="patch")
    assert cells.to_numpy().tolist() == [[1, 2], [3, 5]]
    assert store.curves["val_loss"].tolist() == [0.5, 0.25]


def test_equal_tables_are_equal_bytes_and_a_family_is_replaced(tmp_path):
    folders = [results.write(tmp_path / n, record(), table([1.0, 2.0])) for n in ("a", "b")]
    one, other = ((folder / "measures.csv.xz").read_bytes() for folder in folders)
    assert one == other
    store = tmp_path / "a"
    results.write(store, record(), table([4.0], "imagined", family="imagination"))
    results.write(store, record(), table([7.0]))
    assert results.families(store, folders[0].name) == {"accuracy", "imagination"}
    measures = results.read(store).measures
    assert measures.loc[measures["family"] == "accuracy", "value"].tolist() == [7.0]


@pytest.mark.parametrize(
    ("fields", "rows", "message"),
    [
        ({"seed": "1"}, table([1.0]), "seed is '1'"),
        ({"tokens": None}, table([1.0]), "tokens is None"),
        ({"change": "1 block"}, table([1.0]), "a change has settings"),
        ({"settings": {"model.num_layers": 1}}, table([1.0]), "and nothing else has"),
        ({}, table([1.0], family="beauty"), "unknown family beauty"),
        ({}, table([np.nan]), "with the value nan"),
        ({}, pd.concat([table([1.0]), table([2.0])]), "p0 stands there twice"),
    ],
)
def test_a_bad_row_or_record_is_refused_and_nothing_written(tmp_path, fields, rows, message):
    with pytest.raises(ValueError, match=message):
        results.write(tmp_path, record() | fields, rows)
    assert not list(tmp_path.iterdir())


def test_a_renamed_folder_and_a_changed_table_are_refused_on_reading(tmp_path):
    folder = results.write(tmp_path, record(), table([1.0]))
    content = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(content | {"seed": 3}))
    with pytest.raises(ValueError, match="describes laptop_a4c_patch_seed3"):
        results.read(tmp_path)
    (folder / "run.json").write_text(json.dumps(content))
    table([1.0]).drop(columns="value").to_csv(folder / "measures.csv.xz", index=False)
    with pytest.raises(ValueError, match="columns"):
        results.read(tmp_path)
    with pytest.raises(FileNotFoundError, match="no run"):
        results.read(tmp_path / "empty")


def test_a_change_stands_for_the_same_settings_in_all_runs(tmp_path):
    def add(seed, layers):
        settings = {"model.num_layers": layers}
        results.write(tmp_path, record("patch", seed, change="blocks", settings=settings))

    add(1, 1)
    add(2, 1)
    assert len(results.read(tmp_path).runs) == 2
    add(3, 4)
    with pytest.raises(ValueError, match=r"seed3: the change has the settings.*seed1"):
        results.read(tmp_path)


def test_verdicts_follow_the_plan(tmp_path):
    store = results.read(fill(tmp_path))
    plan = results.load_plan(tmp_path)
    found = results.verdicts(store, plan).set_index("family")
    accuracy = found.loc["accuracy"]
    assert accuracy["verdict"] == "confirmed"
    assert accuracy["margin"] == pytest.approx(1.0, abs=0.01)  # a tenth of 20 - 10 degrees
    assert (accuracy["seeds"], accuracy["patients"]) == (10, 30)
    assert found.loc["imagination", "estimate"] == pytest.approx(-1, abs=0.05)
    assert found.loc["imagination", "verdict"] == "confirmed"
    assert found.loc["cost", "verdict"] == "untested"


def test_few_seeds_decide_nothing_unless_the_rule_is_suspended(tmp_path):
    store = results.read(fill(tmp_path, seeds=range(100, 105), channel=14.0))
    plan = results.load_plan(tmp_path)
    assert set(results.verdicts(store, plan)["verdict"]) == {"inconclusive", "untested"}
    halves = results.verdicts(store, plan, fewest=2)
    assert halves["verdict"].tolist() == ["confirmed", "confirmed", "untested"]


def test_the_origin_of_the_claims_is_decided_by_few_seeds(tmp_path):
    fill(tmp_path, seeds=range(100, 103), channel=14.0)
    claim = PLAN["claims"][0] | {"family": "origin"}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(PLAN | {"claims": [claim]}))
    found = results.verdicts(results.read(tmp_path), results.load_plan(tmp_path))
    assert found["verdict"].tolist() == ["confirmed"]


def test_the_plan_names_what_it_lacks(tmp_path):
    for change, message in (({"margin": ...}, "lacks margin"), ({"family": "x"}, "family x")):
        claim = {k: v for k, v in (PLAN["claims"][0] | change).items() if v is not ...}
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(PLAN | {"claims": [claim]}))
        with pytest.raises(ValueError, match=message):
            results.load_plan(tmp_path)


def test_missing_names_the_runs_that_are_not_stored(tmp_path):
    results.write(tmp_path, record(seed=1), table([1.0]))
    wanted = [reference.identity("laptop", "patch", seed) for seed in (1, 2)]
    assert results.missing(tmp_path, wanted) == ["laptop_a4c_patch_seed2"]


def test_the_reference_is_what_the_plan_names(tmp_path):
    study, plan = results.reference(fill(tmp_path, seeds=[100, 101]))
    results.write(tmp_path, record(seed=3), table([1.0]))
    results.write(tmp_path, record(seed=100, preset="smoke"), table([1.0]))
    again, _ = results.reference(tmp_path)
    assert sorted(again.runs.index) == sorted(study.runs.index) and len(again.runs) == 4
    assert len(again.measures) == len(study.measures) and plan["preset"] == "laptop"


def test_without_runs_or_plan_the_reference_is_empty(tmp_path):
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(PLAN))
    study, plan = results.reference(tmp_path)
    assert study.runs.empty and set(results.verdicts(study, plan)["verdict"]) == {"untested"}
    study, plan = results.reference(tmp_path / "none")
    assert study.runs.empty and results.verdicts(study, plan, [0]).empty
    means, each = results.summarise(study, "rotation_deg")
    assert means.empty and each.empty


def test_means_and_differences_by_hand(tmp_path):
    for seed, values in ((1, [1.0, 2.0]), (2, [3.0, 6.0])):
        whole = table([values[0]], "seconds").assign(patient="")
        results.write(tmp_path, record(seed=seed), pd.concat([table(values), whole]))
    results.write(tmp_path, record("channel", 2), table([5.0, 6.0]))
    store = results.read(tmp_path)
    means, each = results.summarise(store, "rotation_deg", ["", "never"])
    assert means[["variant", "estimate", "seeds", "patients"]].to_numpy().tolist() == [
        ["patch", 3.0, 2, 2], ["channel", 5.5, 1, 2]
    ]  # fmt: skip
    assert each["estimate"].tolist() == [1.5, 4.5, 5.5]
    (row,) = results.summarise(store, "seconds")[0].to_dict("records")
    assert (row["estimate"], row["patients"]) == (2.0, 0)
    sides = {"variant": "patch"}, {"variant": "channel"}
    found = results.difference(store, "rotation_deg", *sides)  # seed 2 alone has both
    assert (found.estimate, found.seeds, found.verdict) == (1.0, 1, "untested")
    control = {"variant": "channel", "seed": 2}
    assert results.difference(store, "rotation_deg", control, sides[0]).estimate == -2.5
    with pytest.raises(KeyError, match="no seed on both sides"):
        results.difference(store, "rotation_deg", {**sides[0], "seed": [1]}, sides[1])


def test_rows_are_those_of_the_usual_runs(tmp_path):
    results.write(tmp_path, record(seed=1), table([1.0, 2.0]))
    results.write(tmp_path, record(seed=1, plane="plax"), table([5.0]))
    results.write(tmp_path, record("channel", 2, change="other", settings={"x": 1}), table([7.0]))
    found = results.rows(results.read(tmp_path))
    assert found[["variant", "seed", "value"]].values.tolist() == [
        ["patch", 1, 1.0],
        ["patch", 1, 2.0],
    ]
    assert results.rows(results.own([])).empty


def test_a_control_on_fewer_patients_is_compared_on_these(tmp_path):
    score = table([2.0, 4.0, 9.0], condition="ablation", family="maps")
    control = table([1.0, 1.0], condition="random", family="maps")
    results.write(tmp_path, record(seed=1), pd.concat([score, control]))
    store = results.read(tmp_path)
    sides = ({"variant": "patch", "condition": name} for name in ("random", "ablation"))
    found = results.difference(store, "rotation_deg", *sides)
    assert (found.estimate, found.patients) == (2.0, 2)
    other = control.assign(patient=["q0", "q1"], condition="elsewhere")
    results.write(tmp_path, record(seed=1), pd.concat([score, other]))
    store = results.read(tmp_path)
    sides = ({"variant": "patch", "condition": name} for name in ("elsewhere", "ablation"))
    with pytest.raises(KeyError, match="no patient on both sides"):
        results.difference(store, "rotation_deg", *sides)


def test_own_runs_have_the_form_of_a_store():
    fold = reference.identity("own", "patch", 0)
    one, other = table([1.0, 2.0]), table([4.0]).assign(patient="p9")
    whole = [table([value], "seconds").assign(patient="") for value in (1.0, 3.0)]
    parts = [pd.concat(pair) for pair in zip((one, other), whole, strict=True)]
    store = results.own([(fold, part) for part in parts])
    assert results.cells(store, "rotation_deg", variant="patch").to_numpy().tolist() == [[1, 2, 4]]
    assert results.cells(store, "seconds", variant="patch").tolist() == [2]
    assert results.own([]).runs.empty
    with pytest.raises(ValueError, match="patch_seed0 were tested on patient p0"):
        results.own([(fold, one), (fold, one)])


def test_a_difference_in_words(tmp_path):
    sides = {"variant": "channel"}, {"variant": "patch"}
    store = results.read(fill(tmp_path, seeds=[100], channel=14.0))
    assert results.finding(store, "rotation_deg", "deg", *sides).endswith(", one seed")
    store = results.read(fill(tmp_path, channel=14.0))
    assert results.finding(store, "rotation_deg", "deg", *sides).startswith("4 deg less [-4")
    assert results.finding(store, "never_deg", "deg", *sides) == "not measured"
