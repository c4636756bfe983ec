"""Seconds of integrated gradients of one frame at the published sizes, beside the matrix limit.

    python benchmarks/attribution_time.py OUT [--steps 32]

Preset `full` (ResNet34, 224 px, width 768) with untrained weights, which take as long as trained
ones. The limit is what a large product of matrices reaches on the same threads in float32. Writes
OUT/attribution_time.csv.
"""

import argparse
from pathlib import Path

import pandas as pd
import torch
import yaml
from captum.attr import IntegratedGradients
from torch.utils.benchmark import Timer

from dreamer import CardiacDreamer
from dreamer.attribution import Head
from dreamer.runs import configure, versions
from dreamer.study import cost

PRESET = Path(__file__).parents[1] / "notebooks" / "parameters" / "full.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=32)
    given = parser.parse_args()
    a = torch.randn(2048, 2048)
    product = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    limit = 2 * 2048**3 / product.blocked_autorange(min_run_time=1).median  # FLOP per second
    preset, rows = yaml.safe_load(PRESET.read_text()), []
    for variant in ("patch", "channel"):
        config, _ = configure(variant, preset["model"], preset["training"], 0)
        model = CardiacDreamer(config.model_copy(update={"weights": "none"})).eval()
        features = model.encode(torch.zeros(1, 1, 224, 224, dtype=torch.uint8)).detach()
        method = IntegratedGradients(Head(model, ["rotation"]))
        call = "method.attribute(features, n_steps=steps, internal_batch_size=4)"
        known = {"method": method, "features": features, "steps": given.steps}
        timer = Timer(call, globals=known, num_threads=torch.get_num_threads())
        seconds = timer.timeit(2).median
        # A pass forward, and one back to the map alone, which takes as much.
        part = cost.flops(config)
        flop = 2 * given.steps * (sum(part.values()) - part["backbone"])
        rows.append({
            "variant": variant, "tokens": 1 + config.tokens, "steps": given.steps,
            "seconds": seconds, "share of the matrix limit": flop / seconds / limit,
        })  # fmt: skip
    where = {name: versions()[name] for name in ("device", "date")}
    table = pd.DataFrame(rows).round(3).assign(**where)
    table.to_csv(given.out / "attribution_time.csv", index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
