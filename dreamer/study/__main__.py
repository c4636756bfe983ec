"""The reference study on the command line, for machines with or without notebooks and network.

    python -m dreamer.study train --variant patch channel none --seeds 100-109 --minutes 60
    python -m dreamer.study missing

`train` trains, measures and adds small tables to the results store. It stops cleanly after
--minutes; the same command goes on where it stopped, also after a kill. Several processes or
machines can share the work: a run that another process has is passed over, and stores are merged by
copying the runs' folders.
"""

import argparse
import logging
import time
from pathlib import Path

import torch
import yaml

from dreamer.study import reference, results


def numbers(text: str) -> list[int]:
    """Seeds of "100-103,110": 100, 101, 102, 103, 110."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m dreamer.study",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("command", choices=["train", "missing"])
    parser.add_argument("--preset", help="the plan's by default")
    parser.add_argument(
        "--variant", nargs="+", default=list(reference.ORDER), help="patch, channel, none, both"
    )
    parser.add_argument("--seeds", type=numbers, help="100-109 or 1,2,3; the plan's by default")
    parser.add_argument("--reads", choices=["tokens", "action"], default="tokens")
    parser.add_argument("--plane", default="a4c", help="target plane: a4c, plax, psax-av, psax-mv")
    parser.add_argument("--change", default="", help="name of a deviation from the preset")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="the deviation itself: training.epochs=2 model.d_model=64 data.patients=1120",
    )
    parser.add_argument(
        "--families",
        nargs="+",
        default=(),
        choices=list(reference.MEASURED),
        help="measures to take; all by default",
    )
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves the default")
    parser.add_argument("--store", type=Path, default=Path("data/results"))
    parser.add_argument("--work", type=Path, default=Path("data/runs/study"), help="weights")
    parser.add_argument("--data", type=Path, default=Path("data/phantom"), help="phantom data sets")
    return parser


def main(given: list[str] | None = None) -> int:
    """Run the command; 0 if all wanted runs are in the store, 1 if some are missing."""
    parser = arguments()
    options = parser.parse_args(given)
    changes = dict(item.split("=", 1) for item in options.set if "=" in item)
    if len(changes) < len(options.set) or bool(changes) != bool(options.change):
        parser.error("--set FIELD=VALUE and --change NAME go together")
    changes = {field: yaml.safe_load(value) for field, value in changes.items()}
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if options.threads:
        torch.set_num_threads(options.threads)
    until = time.monotonic() + 60 * options.minutes
    plan = results.load_plan(options.store)
    preset = options.preset or plan["preset"]
    others = {"reads": options.reads, "plane": options.plane, "change": options.change}
    wanted = [
        reference.identity(preset, variant, seed, **others)
        for seed in options.seeds or plan["seeds"]
        for variant in options.variant
    ]
    for one in wanted:  # a bad name or field is refused before any work
        reference.configuration(one, changes)
    stored = results.records(options.store).values()
    results.check_settings([*stored, *({**one, "settings": changes} for one in wanted)])
    if options.command == "train":
        folders = (options.store, options.work, options.data)
        for one in wanted:
            if time.monotonic() > until:
                break
            outcome = reference.run(one, plan, *folders, changes, tuple(options.families), until)
            print(f"{results.run_name(one)}: {outcome}", flush=True)
    lacking = results.missing(options.store, wanted)
    print(f"{len(wanted) - len(lacking)} of {len(wanted)} runs are in {options.store}")
    for name in lacking:
        print(f"missing: {name}")
    return bool(lacking)


if __name__ == "__main__":
    raise SystemExit(main())
