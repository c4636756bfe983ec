"""The whole study: phantom data, trainings of both variants, every numbered notebook, one page.

    make figures                                      the default, behind a lock
    make figures CONFIG="preset=full seeds=5"         other sizes
    make figures CONFIG="data=../my_scans folds=5"    one's own scans
    make figures CONFIG="plane=plax starts=200"       another target plane, more searches for it
    make figures ABLATIONS=1                          the options' study too, some 55 short trainings
    snakemake --profile profiles/slurm                the same on a cluster

A notebook's parameters say what it stands on: one that takes `data` waits for the data, one that
takes `runs` for every training. Notebooks that do not exist yet are no steps. Where the models are
small a step has one core to itself, so that several run side by side; of larger ones each takes all
cores, and one at a time, since each asks for the one `trainer` that `make figures` grants. So do
always those that measure time or share out the cores themselves.
"""

import hashlib
import json
import sys
from pathlib import Path

import dreamer.pipeline
from dreamer.pipeline import known_parameters, preset_parameters

VARIANTS = ("patch", "channel")
PLANES = ("a4c", "plax", "psax-av", "psax-mv")
COMPARED = "04_compare"  # this one also reads the control without a transformer, `none`
PHANTOM = {  # patients, frames of each, pixels; the presets' models want these pictures
    "smoke": (8, 6, 64),
    "laptop": (224, 40, 112),
    "medium": (224, 40, 112),
    "full": (400, 80, 224),
}
# What each notebook promises to write into its output folder, beside whatever else it draws.
PROMISED = {
    "01_data": ("01_leak.csv", "01_grey.csv", "01_frames.png", "01_actions.png"),
    "02_train": ("02_accuracy.csv", "02_curves.png", "02_accuracy.png", "02_predicted.png"),
    "03_benchmark": ("03_verdicts.csv", "03_goals.csv", "03_benchmark.csv", "03_cold_warm.png"),
    "04_compare": ("04_verdicts.csv", "04_accuracy.csv", "04_accuracy.png", "04_convergence.png"),
    "05_attention": ("05_reading.csv", "05_gallery.png"),
    "06_attribution": ("06_scores.csv", "06_verdicts.csv", "06_maps.png"),
    "07_ablations": ("07_verdicts.csv", "07_changes.csv", "07_costs.png", "07_best.yaml"),
    "08_navigation": ("08_verdicts.csv", "08_arrivals.csv", "08_arrivals.png", "08_search.gif"),
}
# What a notebook takes less of where only its running is tested.
SMOKE = {
    "03_benchmark": dict(
        batch_sizes=[1, 4], repeats=1, processes=1, image_sizes=[32, 64],
        shapes=dict(backbone="compact", image_size=32, channels=16, width=4, d_model=16,
                    num_heads=2, num_layers=1, guidance=[32, 16]),
    ),
    "05_attention": dict(frames=6),
    "06_attribution": dict(frames=6, few=3, steps=4),
    "07_ablations": dict(
        seeds=[0, 1], steps=2, epochs=1, batch_size=4, workers=1,
        options={"hierarchy": {"hierarchy": 2}, "both tokens": {"token_type": "both"}},
    ),
    "08_navigation": dict(starts=2, hand=dict(steps=3)),
}

PRESET = config.get("preset", "laptop")
PRESET_FILE = f"notebooks/parameters/{PRESET}.yaml"
SMALL = PRESET in ("laptop", "smoke")  # a second core would make one of these a third faster
ALONE = ("03_benchmark", "06_attribution", "07_ablations")
SEEDS = range(int(config.get("seeds", 1 if PRESET == "smoke" else 3)))
FOLDS = range(int(config.get("folds", 1)))
TIMEOUT = float(config.get("timeout", 24 * 3600))
OWN_DATA = config.get("data")
PLANE = config.get("plane", "a4c")  # that the phantom's searches look for
STARTS = {"starts": int(config["starts"])} if "starts" in config else {}
KNOWN = {"data", "preset", "seeds", "folds", "output", "timeout", "ablations", "plane", "starts"}
unknown = set(config) - KNOWN
if unknown or (not OWN_DATA and PRESET not in PHANTOM) or not Path(PRESET_FILE).exists():
    raise WorkflowError(
        f"config {', '.join(sorted(unknown)) or f'preset={PRESET}'} is unknown; there are data, "
        f"preset ({', '.join(PHANTOM)}, or any YAML in notebooks/parameters beside data=...), "
        "seeds, folds, output, timeout, ablations, plane, starts"
    )
if PLANE not in PLANES or (OWN_DATA and "plane" in config):
    raise WorkflowError(
        f"plane={PLANE}: the phantom's planes are {', '.join(PLANES)}; with data=... the plane is "
        "that of the scans"
    )

if OWN_DATA:
    DATA, NAME = OWN_DATA, f"{PRESET}-{Path(OWN_DATA).resolve().name}"
    DATA_READY = sorted(map(str, Path(DATA).glob("*/transitions_dataset.json")))
    if not DATA_READY:
        raise WorkflowError(f"data={DATA}: no folder in it holds a transitions_dataset.json")
else:
    patients, frames, size = PHANTOM[PRESET]
    other = "" if PLANE == "a4c" else f"-{PLANE}"
    DATA, NAME = f"data/phantom/{patients}x{frames}-{size}px{other}", PRESET + other
    DATA_READY = [f"{DATA}.done"]
    if not Path(DATA).is_dir():  # deleted by hand: the mark beside it says nothing any more
        Path(DATA_READY[0]).unlink(missing_ok=True)
if not SEEDS:
    raise WorkflowError(f"seeds={config['seeds']}: one training of each kind at least")
if len(FOLDS) > 1 and not len(FOLDS) <= len(DATA_READY) > 2:
    raise WorkflowError(f"folds={len(FOLDS)} needs data=... with as many scans, three at least")

RUNS = f"data/runs/{NAME}"
# The committed figures are those of the default; other sizes and other data have their own folder.
OUTPUT = config.get("output", "figures" if NAME == "laptop" else f"{RUNS}/figures")
NOTEBOOKS = {p.stem: str(p) for p in sorted(Path("notebooks").glob("[0-9][0-9]_*.ipynb"))}
if not int(config.get("ablations", 0)):  # a study of its own, of many trainings
    NOTEBOOKS.pop("07_ablations", None)
NOTEBOOKS.pop("09_explore", None)  # for a hand on its sliders, not for the page
TRAINING = "02_train"
SPLITS = [f"-fold{fold}" for fold in FOLDS] if len(FOLDS) > 1 else [""]
TRAINED = [
    f"{RUNS}/{variant}{split}-seed{seed}"
    for variant in VARIANTS for split in SPLITS for seed in SEEDS if TRAINING in NOTEBOOKS
]
CONTROL = [f"{RUNS}/none{split}-seed0" for split in SPLITS if TRAINING in NOTEBOOKS]
# Trainings are compared with one another, so all are of one code; a change of it trains anew.
LEARNS = ("poses.py", "data.py", "tokens.py", "model.py", "runs.py", "training.py", "phantom/*.py")
SOURCES = sorted(f for name in LEARNS for f in Path(dreamer.pipeline.__file__).parent.glob(name))
CODE = hashlib.sha256(b"".join(f.read_bytes() for f in SOURCES)).hexdigest()[:16]


def runs(step):
    """The trainings that a notebook reads: all, or those of one fold, whose people none has seen."""
    if step == COMPARED:
        return TRAINED + CONTROL
    return [run for run in TRAINED if f"{SPLITS[0]}-seed" in run]


def parameters(step, **given):
    """As JSON: the preset's part, then what the pipeline itself says, where the notebook takes it."""
    takes = known_parameters(NOTEBOOKS[step])
    said = {"data": DATA, "output": OUTPUT, "runs": runs(step), **STARTS, **given}
    said["folder"] = f"{RUNS}/ablations/{CODE}"  # a change of the code trains anew
    said |= SMOKE.get(step, {}) if PRESET == "smoke" else {}
    said = {name: value for name, value in said.items() if name in takes}
    preset = preset_parameters(PRESET_FILE, NOTEBOOKS[step])
    if PRESET == "smoke" and "training" in preset:
        preset["training"]["test"] = 2  # people; an interval over them needs two
    return json.dumps(preset | said)


def trained(folders):
    """The marks of finished trainings."""
    return [f"{RUNS}/notebooks/02_train-{Path(folder).name}.done" for folder in folders]


def training(run):
    """The parameters of one training, read off its run folder's name."""
    variant, *fold, seed = run.split("-")
    given = dict(token_type=variant, seed=int(seed[4:]), run=f"{RUNS}/{run}")
    given["output"] = f"{RUNS}/tables/{run}"
    if fold:  # every scan is tested once; the next fold's scans choose the epoch
        scans, k = [Path(file).parent.name for file in DATA_READY], int(fold[0][4:])
        preset = preset_parameters(PRESET_FILE, NOTEBOOKS[TRAINING]).get("training", {})
        parts = dict(test=scans[k :: len(FOLDS)], val=scans[(k + 1) % len(FOLDS) :: len(FOLDS)])
        given["training"] = {**preset, "split": "patient", **parts}
    return parameters(TRAINING, **given)


def needs(step):
    """The inputs of a notebook, read off its parameters."""
    takes = known_parameters(NOTEBOOKS[step])
    return [
        NOTEBOOKS[step],
        *(DATA_READY if "data" in takes else []),
        *(trained(runs(step)) if "runs" in takes else []),
    ]


# One notebook: refuses unknown parameters, fails without the promised files, keeps what was run.
RUN = (
    f"OMP_NUM_THREADS={{threads}} {sys.executable} -m dreamer.pipeline {{input[0]}} --executed {{log[0]}} "
    f"--timeout {TIMEOUT} -y {{params.parameters:q}} {{params.promised}}"
)

# A mark says when: Snakemake takes an input that is small and reads as before for unchanged, and what
# stood on an earlier training would be kept where the pipeline was stopped after the new one.
DONE = " && date > {output.done}"


rule all:
    input:
        f"{OUTPUT}/index.html",


if not OWN_DATA:

    rule phantom:
        output:
            DATA_READY[0],
        params:
            draw=f"from dreamer.phantom import generate; generate({DATA!r}, patients={patients}, "
            f"frames={frames}, size={size}, target={PLANE!r}, seed=0)",
        threads: 8
        shell:
            f"{sys.executable} -c {{params.draw:q}} && date > {{output[0]}}"


rule train:
    input:
        NOTEBOOKS.get(TRAINING, []),
        DATA_READY,
    output:
        done=f"{RUNS}/notebooks/02_train-{{run}}.done",
    log:
        f"{RUNS}/notebooks/02_train-{{run}}.ipynb",
    params:
        parameters=lambda wildcards: training(wildcards.run),
        code=CODE,
        promised=[
            f"--output {RUNS}/tables/{{run}}/{name}"
            for name in PROMISED.get(TRAINING, ())
        ],
    wildcard_constraints:
        run="(?!none).+",
    threads: 1 if SMALL else 8
    priority: 2  # the long ones first: what is short fills the cores at the end
    resources:
        trainer=0 if SMALL else 1,
    shell:
        RUN + f" --run {RUNS}/{{wildcards.run}} {{params.code}}" + DONE


use rule train as control with:
    wildcard_constraints:
        run="none.+",
    priority: 1


for step in NOTEBOOKS:
    if step == TRAINING:
        continue

    rule:
        name:
            f"notebook_{step}"
        input:
            needs(step),
        output:
            [f"{OUTPUT}/{name}" for name in PROMISED.get(step, ())],
            done=f"{RUNS}/notebooks/{step}.done",
        log:
            f"{RUNS}/notebooks/{step}.ipynb",
        params:
            parameters=parameters(step),
            promised=[f"--output {OUTPUT}/{name}" for name in PROMISED.get(step, ())],
        threads: 1 if SMALL and step not in ALONE else 8
        resources:
            trainer=0 if SMALL and step not in ALONE else 1,
        shell:
            RUN + DONE


rule page:
    input:
        [f"{RUNS}/notebooks/{step}.done" for step in NOTEBOOKS if step != TRAINING],
        trained(TRAINED),
    output:
        f"{OUTPUT}/index.html",
    params:
        write="from dreamer.report import write_page; write_page"
        + repr((OUTPUT, f"{RUNS}/notebooks", *(["README.md"] if OUTPUT == "figures" else []))),
    shell:
        f"{sys.executable} -c {{params.write:q}}"
