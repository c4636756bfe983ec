"""What virtual patients are worth to a model of real scans: trained from scratch, or fine-tuned.

    python benchmarks/fine_tune.py SCANS RUN OUT [--seeds 0 1 2] [--epochs 4]

Trains on the folder SCANS with the configuration of RUN, once from scratch and once from RUN's
weights (`training.init`), and writes OUT/fine_tune.csv: errors on held-out blocks of time (or
patients) beside the mean pose. Blocks of one scan measure interpolation.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from dreamer.data import Transitions
from dreamer.runs import load_config, load_run, make_split
from dreamer.study import accuracy
from dreamer.training import fit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scans")
    parser.add_argument("run")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=4)
    given = parser.parse_args()
    model, training = load_config(given.run)
    data, rows = Transitions(given.scans, model.image_size), []
    for seed in given.seeds:
        for start, init in (("from scratch", ""), ("from virtual patients", given.run)):
            change = {"epochs": given.epochs, "split": "auto", "seed": seed}
            config = training.model_copy(update=change | {"init": init, "test": 1, "val": 1})
            run = given.out / f"{start}-seed{seed}".replace(" ", "-")
            fit(model, config, data, run)
            split = make_split(data, config)
            test = accuracy.predict(load_run(run), data, split.test, split)
            mean = accuracy.predict_mean_pose(data, split.test, split)
            for name, table in ((start, test), ("mean pose", mean)):
                error = accuracy.errors(table).groupby("patient").mean().mean()
                rows.append({"seed": seed, "predictor": name, "unit": split.kind, **error})
    table = pd.DataFrame(rows).drop_duplicates()
    table.round(3).to_csv(given.out / "fine_tune.csv", index=False)
    print(table.groupby("predictor")[["translation", "rotation"]].agg(["mean", np.std]).round(2))


if __name__ == "__main__":
    main()
