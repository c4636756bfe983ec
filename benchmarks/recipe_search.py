"""The search for the training recipe: the same number of trials for each variant.

    python benchmarks/recipe_search.py DATA OUT [--variant patch] [--trial base ...] [--epochs 4]

Every trial changes one setting of the `laptop` preset. All are scored on the validation patients
alone (single frame; imagined, beside ignoring the motion, for independent pairs). A trial that is
in OUT/search-<variant>.csv is not repeated, so several processes can share the work by variant.
"""

import argparse
import time
from pathlib import Path

import pandas as pd
import torch
import yaml

from dreamer import load_run
from dreamer.data import Transitions
from dreamer.runs import configure, make_split
from dreamer.study import accuracy, imagination
from dreamer.training import fit

PRESET = Path(__file__).parents[1] / "notebooks" / "parameters" / "laptop.yaml"
TRANSFORMER = {
    "base": {},
    "learning_rate 0.008": {"learning_rate": 0.008},
    "feature 8": {"feature": 8.0},
}
TRIALS = {
    "patch": TRANSFORMER,
    "channel": TRANSFORMER,
    "none": {  # no imagined map: the weight decay instead of the feature loss
        "base": {},
        "learning_rate 0.008": {"learning_rate": 0.008},
        "weight_decay 0.1": {"weight_decay": 0.1},
    },
}


def score(run: Path, data: Transitions) -> dict[str, float]:
    """Errors on the validation patients: mm and degrees, and of the imagined map."""
    model = load_run(run)
    split = make_split(data, configure("", {}, {"val": 24})[1])
    frames = accuracy.errors(accuracy.predict(model, data, split.val, split))
    result = {
        "single_mm": frames["translation"].mean(),
        "single_deg": frames["rotation"].mean(),
    }
    if model.world is None:
        return result
    pairs = imagination.pairs(model, data, split.val, split, each=len(split.val))
    tables = [imagination.imagined_maps(pairs), imagination.imagined_poses(pairs)]
    mean = pd.concat(tables).groupby(["measure", "condition"])["value"].mean()
    for name, short in (("imagined", "imagined"), ("ignore the motion", "ignored")):
        result[f"{short}_mm"] = mean["imagined_translation_mm", name]
        result[f"{short}_deg"] = mean["imagined_rotation_deg", name]
    for name, short in (("imagined", "map"), ("wrong action", "map_wrong"), ("copy", "map_copy")):
        result[short] = mean["imagined_map_error", name]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--variant", nargs="+", default=list(TRIALS), choices=TRIALS)
    parser.add_argument("--trial", nargs="+")
    parser.add_argument("--epochs", type=int, default=4)
    given = parser.parse_args()
    preset = yaml.safe_load(PRESET.read_text())
    data = Transitions(given.data, preset["model"]["image_size"])
    for variant in given.variant:
        table = given.out / f"search-{variant}.csv"
        rows = pd.read_csv(table).to_dict("records") if table.is_file() else []
        for name, change in TRIALS[variant].items():
            if (given.trial and name not in given.trial) or name in {row["trial"] for row in rows}:
                continue
            training = preset["training"] | {"epochs": given.epochs} | change
            model, config = configure(variant, preset["model"], training, seed=0)
            run = given.out / f"{variant} {name}".replace(" ", "-")
            start = time.perf_counter()
            fit(model, config, data, run, on_epoch=lambda table: None)
            row = {"variant": variant, "trial": name, "steps": given.epochs * 80}
            row |= {"seconds": time.perf_counter() - start} | score(run, data)
            rows.append(row)
            pd.DataFrame(rows).round(4).to_csv(table, index=False)
            print(row, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
