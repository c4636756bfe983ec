"""The results store: small tables of trained runs, which any machine can add to, and the verdicts.

    <store>/plan.yaml                   claims, measures, margins, tests and seeds, see `load_plan`
    <store>/<run>/run.json              what was trained and measured, where, and how long it took
                 /measures.csv.xz       MEASURES, one row per value of a test patient
                 /curve.csv             the training's metrics by epoch

Stores of several machines are merged by copying the runs' folders into one. A measure is named with
its unit; `condition` says what was varied or which control it is. The value is a patient's mean
over frames, pairs or searches; a value of the whole run has no patient.
"""

import contextlib
import hashlib
import itertools
import json
import lzma
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from dreamer.files import write_whole
from dreamer.study import stats

MEASURES = ["family", "measure", "condition", "patient", "value"]
FAMILIES = (
    "accuracy convergence imagination space maps closed_loop robustness cost origin real"
).split()
# What makes two runs the same measurement; `change` names a deviation from the preset.
# A tenth smaller than by default: text has no structure of four bytes.
XZ = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}
IDENTITY = ["preset", "variant", "reads", "plane", "change", "seed"]
RECORD = {
    **dict.fromkeys(["preset", "variant", "reads", "plane", "change"], str),
    **dict.fromkeys(["seed", "tokens", "parameters", "steps", "images"], int),
    **dict.fromkeys(["flop", "seconds"], float),
    **dict.fromkeys(["data", "test", "plan", "precision"], str),
    "settings": dict,  # what `change` stands for, such as training.epochs: 2
    "versions": dict,
}
CLAIM = {"family", "claim", "published", "measure", "unit", "first", "second", "test", "margin"}
FEWEST_SEEDS = 8  # for a verdict on token types
FEW_DO = {"cost", "origin"}  # families where the effect is many times the spread of seeds
BASELINE = "mean pose"  # a condition
USUAL = {"reads": "tokens", "plane": "a4c", "change": ""}  # fields that a question leaves out


@dataclass(frozen=True, eq=False)
class Store:
    """`runs`: a row per run, by its name; `measures` and `curves`: their rows, with `run`."""

    runs: pd.DataFrame
    measures: pd.DataFrame
    curves: pd.DataFrame

    @cached_property
    def places(self) -> dict[tuple[str, str], NDArray[np.intp]]:
        """Positions in `measures` of the rows of every measure and condition."""
        return self.measures.groupby(["measure", "condition"]).indices


def run_name(identity: Mapping[str, Any]) -> str:
    """The folder of a run, from its IDENTITY."""
    parts = [identity["preset"], identity["plane"], identity["variant"]]
    parts += ["reads-action"] if identity["reads"] == "action" else []
    parts += [identity["change"].replace(" ", "-")] if identity["change"] else []
    return "_".join([*parts, f"seed{identity['seed']}"])


def write(
    store: str | Path,
    record: Mapping[str, Any],
    measures: pd.DataFrame | None = None,
    curve: pd.DataFrame | None = None,
) -> Path:
    """Add a run, or measures of further families to it; returns its folder.

    The rows of a family that is there already are replaced. Raises ValueError where the record or
    a table does not follow the schema; nothing is written then.
    """
    folder = Path(store) / run_name(record)
    _check_record(record, folder / "run.json")
    file = folder / "measures.csv.xz"
    if measures is not None:
        measures = measures[MEASURES]
        if file.is_file():
            old = _read_measures(file)
            measures = pd.concat([old[~old["family"].isin(set(measures["family"]))], measures])
        measures = measures.sort_values(MEASURES[:4], kind="stable", ignore_index=True)
        _check_measures(measures, file)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "run.json", json.dumps(dict(record), indent=1, sort_keys=True).encode())
    if curve is not None:
        write_whole(folder / "curve.csv", curve.to_csv(index=False, float_format="%.5g").encode())
    if measures is not None:
        text = measures.to_csv(index=False, float_format="%.4g")
        write_whole(file, lzma.compress(text.encode(), filters=[XZ]))  # equal tables, equal bytes
    return folder


def records(store: str | Path) -> dict[str, dict[str, Any]]:
    """What each run of a store is, by its name, checked; raises ValueError as `read` does."""
    found = {}
    for file in sorted(Path(store).glob("*/run.json")):
        record = json.loads(file.read_text())
        _check_record(record, file)
        name = run_name(record)
        if name != file.parent.name:
            raise ValueError(f"{file}: describes {name}; rename the folder, or remove it")
        found[name] = record
    return found


def check_settings(records: Iterable[Mapping[str, Any]]) -> None:
    """Raise ValueError where one change of a preset stands for different settings."""
    first: dict[tuple[str, str], Mapping[str, Any]] = {}
    for record in records:
        other = first.setdefault((record["preset"], record["change"]), record)
        if other["settings"] != record["settings"]:
            raise ValueError(
                f"{run_name(record)}: the change has the settings {record['settings']}, in "
                f"{run_name(other)} {other['settings']}; choose another name for one"
            )


def read(store: str | Path) -> Store:
    """All runs of a store, checked.

    Raises FileNotFoundError where there is none, ValueError naming file and field where one does
    not follow the schema, two folders hold the same run, or a change has different settings.
    """
    measures, curves = [], []
    found = records(store)
    if not found:
        raise FileNotFoundError(f"{store}: no run; add some with python -m dreamer.study train")
    check_settings(found.values())
    for name in found:
        if (table := Path(store, name, "measures.csv.xz")).is_file():
            rows = _read_measures(table)
            _check_measures(rows, table)
            measures.append(rows.assign(run=name))
        if (table := Path(store, name, "curve.csv")).is_file():
            curves.append(pd.read_csv(table).assign(run=name))
    runs = pd.DataFrame.from_dict(found, orient="index")
    runs.index.name = "run"
    empty = _empty()
    return Store(runs, pd.concat(measures or [empty.measures]), pd.concat(curves or [empty.curves]))


def reference(store: str | Path) -> tuple[Store, dict[str, Any]]:
    """The runs of the plan's preset and seeds, and the plan; without rows and claims where there
    are none."""
    here, plan = Path(store), {"preset": "", "seeds": [], "claims": []}
    if (here / "plan.yaml").is_file():
        plan = load_plan(here)
    found = read(here) if any(here.glob("*/run.json")) else _empty()
    runs = found.runs
    runs = runs[(runs["preset"] == plan["preset"]) & runs["seed"].isin(plan["seeds"])]
    rows = (table[table["run"].isin(runs.index)] for table in (found.measures, found.curves))
    return Store(runs, *rows), plan


def own(measured: Sequence[tuple[Mapping[str, Any], pd.DataFrame]]) -> Store:
    """Runs measured here, each its identity and measures, as a store without curves.

    Folds of one variant and seed are one run. Raises ValueError where two were tested on the same
    patient.
    """
    if not measured:
        return _empty()
    keys = ["run", *MEASURES[1:4]]
    names = [run_name(identity) for identity, _ in measured]
    rows = pd.concat([t.assign(run=n) for n, (_, t) in zip(names, measured, strict=True)])
    twice = rows[rows["patient"].ne("") & rows.duplicated(keys)]
    if len(twice):
        run, _, _, patient = twice.iloc[0][keys]
        raise ValueError(f"two runs of {run} were tested on patient {patient}")
    runs = pd.DataFrame([identity for identity, _ in measured], names, list(RECORD))
    rows = rows.groupby(keys, sort=False)["value"].mean().reset_index()
    return Store(runs[~runs.index.duplicated()], rows, _empty().curves)


def _empty() -> Store:
    return Store(*(pd.DataFrame(columns=names) for names in (RECORD, [*MEASURES, "run"], ["run"])))


def families(store: str | Path, name: str) -> set[str]:
    """The families that are stored of a run, by the name of its folder."""
    file = Path(store) / name / "measures.csv.xz"
    return set(_read_measures(file)["family"]) if file.is_file() else set()


def _read_measures(file: Path) -> pd.DataFrame:
    text = {"patient": str, "condition": str}
    return pd.read_csv(file, dtype=text, keep_default_na=False, na_values={"value": [""]})


def _check_record(record: Mapping[str, Any], file: Path) -> None:
    for field, kind in RECORD.items():
        value = record.get(field)
        if isinstance(value, bool) or not isinstance(value, (kind, int) if kind is float else kind):
            raise ValueError(f"{file}: {field} is {value!r}, not {kind.__name__}")
    if bool(record["settings"]) != bool(record["change"]):
        raise ValueError(
            f"{file}: change is {record['change']!r} and settings {record['settings']}; "
            "a change has settings, and nothing else has"
        )


def _check_measures(table: pd.DataFrame, file: Path) -> None:
    if list(table.columns) != MEASURES:
        raise ValueError(f"{file}: columns {list(table.columns)}, not {MEASURES}")
    if unknown := set(table["family"]) - set(FAMILIES):
        raise ValueError(f"{file}: unknown family {', '.join(sorted(unknown))}")
    twice = table.duplicated(MEASURES[:4])
    bad = twice | ~np.isfinite(pd.to_numeric(table["value"], errors="coerce"))
    if bad.any():
        row = table[bad].iloc[0]
        what = "twice" if twice[bad].iloc[0] else f"with the value {row['value']}"
        place = " / ".join(str(row[name]) for name in MEASURES[:4])
        raise ValueError(f"{file}: {place} stands there {what}")


# Reading values


def rows(store: Store) -> pd.DataFrame:
    """The measures of the USUAL runs of a store, with their `variant` and `seed`."""
    usual = store.runs[(store.runs[list(USUAL)] == pd.Series(USUAL)).all(axis=1)]
    return store.measures.join(usual[["variant", "seed"]], on="run", how="inner")


def cells(
    store: Store, measure: str, condition: str = "", **identity: Any
) -> pd.DataFrame | pd.Series:
    """Values [seeds, patients] of a measure for the runs of an `identity`; by seed alone for values
    of whole runs.

    Fields of IDENTITY that are not given defer to USUAL. Raises KeyError where nothing is stored,
    ValueError where a seed lacks patients.
    """
    wanted = USUAL | identity
    chosen = store.runs
    for field, value in wanted.items():
        allowed = value if isinstance(value, (list, tuple, range)) else [value]
        chosen = chosen[chosen[field].isin(allowed)]
    rows = store.measures.iloc[store.places.get((measure, condition), [])]
    rows = rows[rows["run"].isin(chosen.index)]
    if rows.empty:
        raise KeyError(f"{measure} ({condition or 'no condition'}) is not stored for {wanted}")
    rows = rows.assign(seed=rows["run"].map(chosen["seed"]))
    if (rows["patient"] == "").all():
        return rows.set_index("seed")["value"].sort_index()
    return stats.matrix(rows, "value")


def summarise(
    store: Store,
    measure: str,
    conditions: Sequence[str] = ("",),
    variants: Sequence[str] = ("patch", "channel", "none"),
    **identity: Any,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Means with 95% intervals over seeds and patients (variant, condition, estimate, low, high,
    seeds, patients), and the estimates of single seeds; without what is not stored."""
    means, each = [], []
    for condition, variant in itertools.product(conditions, variants):
        with contextlib.suppress(KeyError):
            values = cells(store, measure, condition, variant=variant, **identity)
            place = {"variant": variant, "condition": condition}
            over = "seeds" if isinstance(values, pd.Series) else "both"
            means.append(place | stats.interval(values, over=over)._asdict())
            single = values if over == "seeds" else values.mean(axis=1)
            each += [place | {"seed": seed, "estimate": value} for seed, value in single.items()]
    columns = ["variant", "condition", *stats.Interval._fields]
    return pd.DataFrame(means, columns=columns), pd.DataFrame(each, columns=[*columns, "seed"])


def difference(
    store: Store,
    measure: str,
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    margin: float | None = None,
    test: stats.Claim = "less",
) -> stats.Comparison:
    """Second - first of a measure (`stats.compare`), each side given by identity, `condition`,
    `minus` and `measure` as in the plan, for the seeds and the patients that both have: a store
    grows one run at a time, and some controls of maps are scored on fewer patients. A first side
    with a seed of its own is a control, one value per patient.

    Raises KeyError where a side is not stored or no seed, or no patient, is on both.
    """
    one, other = (_side(store, measure, side) for side in (first, second))
    if isinstance(first.get("seed"), int):
        one = one.iloc[0]
    else:
        both = one.index.intersection(other.index)
        if both.empty:
            raise KeyError("no seed on both sides")
        one, other = one.loc[both], other.loc[both]
    if isinstance(other, pd.DataFrame):  # patients are its columns, and the labels of a control
        own = one.columns if isinstance(one, pd.DataFrame) else one.index
        patients = own.intersection(other.columns)
        if patients.empty:
            raise KeyError("no patient on both sides")
        one, other = one[patients], other[patients]
    over = "seeds" if isinstance(other, pd.Series) else "both"
    return stats.compare(one, other, margin, test, over=over)


def finding(
    store: Store, measure: str, unit: str, first: Mapping[str, Any], second: Mapping[str, Any]
) -> str:
    """`difference` in words for a figure's title: "0.31 mm less [-0.5, -0.1]"."""
    try:
        found = difference(store, measure, first, second)
    except KeyError:
        return "not measured"
    return found.words(unit) + (", one seed" if found.seeds < 2 else "")


def _side(store: Store, measure: str, side: Mapping[str, Any]) -> pd.DataFrame | pd.Series:
    """Values of one side of a claim: its identity, `condition` and, where it is another, `measure`.

    `minus` names the fields that differ in what is subtracted, such as a control of the same runs.
    """
    terms = [{"measure": measure, **side}]
    minus = terms[0].pop("minus", None)
    if minus is not None:
        terms.append(terms[0] | minus)
    values = [cells(store, **term) for term in terms]
    return values[0] if minus is None else values[0] - values[1].loc[values[0].index]


def _margin(store: Store, claim: Mapping[str, Any], sides: Sequence[Mapping[str, Any]]) -> Any:
    """The margin of a claim: a number or null as in the plan, or a share of what is learned."""
    margin = claim["margin"]
    if not isinstance(margin, Mapping):
        return margin
    measure = margin.get("of", claim["measure"])
    runs = [{name: side[name] for name in IDENTITY if name in side} for side in sides]
    reached, baseline = (
        np.mean([np.mean(cells(store, measure, condition, **run)) for run in runs])
        for condition in ("", BASELINE)
    )
    return margin["learned"] * float(baseline - reached)


# The plan and its verdicts


def load_plan(store: str | Path) -> dict[str, Any]:
    """The analysis plan of a store, checked, with its digest as `hash`.

    `seeds`, `preset`, `test` (the new patients) and `claims`: of each the family, the claim in
    words, what was published, measure and unit, the sides `first` and `second` (see `compare` in
    `dreamer.study.stats`: the difference is second - first), the test, and the margin: a number,
    `{learned: share, of: measure}` of what is learned over the mean-pose baseline, or null. A side
    with a `seed` of its own is a control without seeds. Raises ValueError naming the claim and the
    field.
    """
    file = Path(store) / "plan.yaml"
    content = file.read_bytes()
    plan = yaml.safe_load(content)
    for number, claim in enumerate(plan["claims"]):
        who = f"{file}: claim {number + 1}"
        if lacking := CLAIM - set(claim):
            raise ValueError(f"{who} lacks {', '.join(sorted(lacking))}")
        if unknown := set(claim) - CLAIM - {"tokens"}:
            raise ValueError(f"{who}: unknown field {', '.join(sorted(unknown))}")
        if claim["family"] not in FAMILIES:
            raise ValueError(f"{who}: unknown family {claim['family']}")
    return plan | {"hash": hashlib.blake2b(content, digest_size=6).hexdigest()}


def verdicts(
    store: Store,
    plan: Mapping[str, Any],
    seeds: Sequence[int] | None = None,
    fewest: int = FEWEST_SEEDS,
) -> pd.DataFrame:
    """The verdict table (`stats.COLUMNS`), one row per claim of the plan, Holm within a family.

    `seeds`: those of the plan, or a part of them. A claim from fewer than `fewest` seeds is
    inconclusive at most, but for FEW_DO; a claim that was not measured is untested.
    """
    seeds = list(seeds or plan["seeds"])
    compared: list[stats.Comparison | None] = []
    for claim in plan["claims"]:
        shared = {"preset": plan["preset"], "seed": seeds}
        try:
            sides = [shared | claim[side] for side in ("first", "second")]
            margin = _margin(store, claim, sides)
            found = difference(store, claim["measure"], *sides, margin, claim["test"])
            compared.append(found)
        except KeyError:
            compared.append(None)
    rows = []
    for family in dict.fromkeys(claim["family"] for claim in plan["claims"]):
        at = [k for k, claim in enumerate(plan["claims"]) if claim["family"] == family]
        measured = [k for k in at if compared[k] is not None]
        found = dict(zip(measured, stats.holm([compared[k] for k in measured]), strict=True))
        for k in at:
            claim = plan["claims"][k]
            words = {name: claim[name] for name in ("family", "claim", "published", "unit")}
            words |= {"size": plan["preset"], "tokens": claim.get("tokens", "50 / 513")}
            row = stats.verdict_row(found.get(k), **words, source=claim["measure"])
            few = row["seeds"] and row["seeds"] < fewest and family not in FEW_DO
            if few and row["verdict"] != "untested":
                row["verdict"] = "inconclusive"
            rows.append((k, row))
    rows.sort(key=lambda pair: pair[0])
    return pd.DataFrame([row for _, row in rows], columns=stats.COLUMNS)


def missing(store: str | Path, wanted: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the wanted runs that a store lacks."""
    names = map(run_name, wanted)
    return [name for name in names if not (Path(store) / name / "run.json").is_file()]
