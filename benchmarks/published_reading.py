"""The published sizes and losses with both readings of the imagined map, on a folder of scans.

    python benchmarks/published_reading.py SCANS OUT [--steps 150] [--batch 8] [--seed 0]

`reads: action` is the published first version: the imagined map is read from the action token alone
and repeated for every token, so that with channel tokens the guidance head receives one number 512
times. Preset `full` (ResNet34, 224 px, width 768), 10 validations on the way. Writes
OUT/published_reading.csv: the validation curves of all four trainings.
"""

import argparse
from pathlib import Path

import pandas as pd
import yaml

from dreamer.data import Transitions
from dreamer.runs import configure
from dreamer.training import fit

PRESET = Path(__file__).parents[1] / "notebooks" / "parameters" / "full.yaml"

CURVE = ["images", "val_translation_mm", "val_rotation_deg", "variant", "reads", "seed"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scans")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    preset, tables = yaml.safe_load(PRESET.read_text()), []
    data = Transitions(given.scans, 224)
    change = {"epochs": 10, "steps_per_epoch": given.steps // 10, "batch_size": given.batch}
    change |= {"val_pairs": 24, "val": 1, "test": 1}
    for reads in ("action", "tokens"):
        for variant in ("patch", "channel"):
            model = preset["model"] | {"reads": reads}
            configs = configure(variant, model, preset["training"] | change, given.seed)
            curve = fit(*configs, data, given.out / f"{variant}-{reads}-seed{given.seed}")
            tables.append(curve.assign(variant=variant, reads=reads, seed=given.seed))
    table = pd.concat(tables)[CURVE]
    table.round(4).to_csv(given.out / "published_reading.csv", index=False)
    last = table.groupby(["reads", "variant"])[["val_translation_mm", "val_rotation_deg"]].last()
    print(last.round(2))


if __name__ == "__main__":
    main()
