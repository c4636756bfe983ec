"""What virtual patients are worth to a model of real scans: trained from scratch, or fine-tuned.

    python benchmarks/fine_tune.py SCANS OUT --runs RUN [RUN ...] [--seeds 0 1 2] [--epochs 4]

Trains on the folder SCANS with the configuration of each RUN, once from scratch and once from its
weights (`training.init`). Writes OUT/fine_tune.csv, errors on held-out blocks of time (or patients)
beside the mean pose, and OUT/fine_tune_curves.csv, validation errors on the way. Blocks of one scan
measure interpolation.
"""

import argparse
import itertools
from pathlib import Path

import pandas as pd

from dreamer.data import Transitions
from dreamer.runs import load_config, load_run, make_split
from dreamer.study import accuracy
from dreamer.training import fit

CURVE = ["images", "val_translation_mm", "val_rotation_deg"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scans")
    parser.add_argument("out", type=Path)
    parser.add_argument("--runs", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=4)
    given = parser.parse_args()
    rows, curves = [], []
    for source, seed in itertools.product(given.runs, given.seeds):
        model, training = load_config(source)
        data = Transitions(given.scans, model.image_size)
        for start, init in (("from scratch", ""), ("from virtual patients", source)):
            change = {"epochs": given.epochs, "split": "auto", "seed": seed}
            config = training.model_copy(update=change | {"init": init, "test": 1, "val": 1})
            run = given.out / f"{model.token_type}-{start}-seed{seed}".replace(" ", "-")
            identity = {"variant": model.token_type, "seed": seed, "predictor": start}
            curves.append(fit(model, config, data, run)[CURVE].assign(**identity))
            split = make_split(data, config)
            test = accuracy.predict(load_run(run), data, split.test, split)
            mean = accuracy.predict_mean_pose(data, split.test, split)
            for name, table in ((start, test), ("mean pose", mean)):
                error = accuracy.errors(table).groupby("patient").mean().mean()
                rows.append({**identity, "predictor": name, "unit": split.kind, **error})
    table = pd.DataFrame(rows).drop_duplicates(["variant", "seed", "predictor"])
    table.round(3).to_csv(given.out / "fine_tune.csv", index=False)
    pd.concat(curves).round(3).to_csv(given.out / "fine_tune_curves.csv", index=False)
    by = table.groupby(["variant", "predictor"])[["translation", "rotation"]]
    print(by.agg(["mean", "std"]).round(2))


if __name__ == "__main__":
    main()
