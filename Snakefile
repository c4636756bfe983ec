"""The whole study: phantom data, trainings, every numbered notebook, one page.

    make figures                                      the default, behind a lock
    make figures CONFIG="seeds=3"                     three trainings of each variant
    make figures CONFIG="preset=full seeds=5"         other sizes
    make figures CONFIG="data=../my_scans folds=5"    your own scans
    make figures CONFIG="plane=plax starts=200"       another target plane, more searches for it
    make figures CONFIG="output=figures"              into the committed figures
    make figures ABLATIONS=1                          the study of options too, many short trainings
    snakemake --profile profiles/slurm                the same on a cluster

The parameters of a notebook decide what it depends on: one that takes `data` waits for the data,
one that takes `runs` for every training, one that reads the results `store` (the reference study)
runs again where that has grown. Steps with small models have one core each and run side by
side; others take all cores, one at a time (the resource `trainer`), as do those that measure time
or use several cores themselves.
"""

import hashlib
import json
import os
import shlex
import sys
from pathlib import Path

import dreamer.pipeline
from dreamer.pipeline import known_parameters, preset_parameters
from dreamer.records import find_patients, find_scans, folds

VARIANTS = ("patch", "channel", "none")  # none: no transformer
PLANES = ("a4c", "plax", "psax-av", "psax-mv")
TRAINING = "02_train"
COMPARE, NAVIGATE, BENCHMARK = "04_compare", "08_navigation", "03_benchmark"
PHANTOM = {  # patients, frames of each, pixels
    "smoke": (8, 6, 64),
    "laptop": (224, 40, 112),
    "short": (224, 40, 112),
    "reference": (224, 40, 112),
    "full": (400, 80, 224),
}
# Files that each notebook must write into its output folder.
PROMISED = {
    "01_data": ["01_leak.csv", "01_grey.csv", "01_frames.png", "01_actions.png"],
    "02_train": ["02_accuracy.csv", "02_curves.png", "02_accuracy.png", "02_predicted.png"],
    "03_benchmark": ["03_verdicts.csv", "03_benchmark.csv", "03_cold_warm.png"],
    "04_compare": [
        "04_verdicts.csv", "04_measures.csv", "04_accuracy.png", "04_convergence.png",
        "04_imagination.png",
    ],
    "05_attention": ["05_attention.csv", "05_gallery.png"],
    "06_attribution": [
        "06_maps.csv", "06_scores.csv", "06_verdicts.csv", "06_maps.png", "06_scores.png",
    ],
    "07_ablations": ["07_verdicts.csv", "07_changes.csv", "07_costs.png"],
    "08_navigation": [
        "08_verdicts.csv", "08_measures.csv", "08_success.png", "08_cost.png", "08_search.gif",
    ],
    "10_verdicts": ["verdicts.csv", "10_seeds.csv", "10_halves.csv", "10_answer.png"],
}
# Smaller samples for the smoke preset, which only tests that everything runs.
SMOKE = {
    "03_benchmark": dict(
        batch_sizes=[1, 4], repeats=1, processes=1, image_sizes=[32, 64],
        shapes=dict(backbone="compact", image_size=32, channels=16, width=4, d_model=16,
                    num_heads=2, num_layers=1, guidance=[32, 16]),
    ),
    "05_attention": dict(frames=6),
    "06_attribution": dict(frames=4, scored=3, tested=2, steps=4, gallery=2),
    "07_ablations": dict(
        seeds=[0, 1], steps=2, epochs=1, batch_size=4, workers=1,
        options={"hierarchy": {"hierarchy": 2}, "both tokens": {"token_type": "both"}},
    ),
    "08_navigation": dict(starts=2, planned=2, hand=dict(steps=3)),
}

PRESET = config.get("preset", "laptop")
PRESET_FILE = f"notebooks/parameters/{PRESET}.yaml"
SMALL = PRESET in ("laptop", "short", "reference", "smoke")  # a second core would make one a third faster
ALONE = ("03_benchmark", "06_attribution", "07_ablations")
SEEDS = range(int(config.get("seeds", 1)))
FOLDS = range(int(config.get("folds", 1)))
TIMEOUT = float(config.get("timeout", 24 * 3600))
OWN_DATA = config.get("data")
PLANE = config.get("plane", "a4c")
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
    try:
        DATA_READY = sorted(map(str, find_scans(DATA).values()))
        DEALT = folds(find_patients(DATA), len(FOLDS)) if len(FOLDS) > 1 else []
    except (ValueError, FileNotFoundError) as error:
        raise WorkflowError(f"data={DATA}, folds={len(FOLDS)}: {error}")
else:
    patients, frames, size = PHANTOM[PRESET]
    other = "" if PLANE == "a4c" else f"-{PLANE}"
    DATA, NAME = f"data/phantom/{patients}x{frames}-{size}px{other}", PRESET + other
    DATA_READY = [f"{DATA}.done"]
    if not Path(DATA).is_dir():  # deleted by hand
        Path(DATA_READY[0]).unlink(missing_ok=True)
if not SEEDS:
    raise WorkflowError(f"seeds={config['seeds']}: at least one training of each variant")
if len(FOLDS) > 1 and not OWN_DATA:
    raise WorkflowError(f"folds={len(FOLDS)} needs data=... with as many patients")

RUNS = f"data/runs/{NAME}"
# The committed figures are written only on request.
OUTPUT = config.get("output", f"{RUNS}/figures")
NOTEBOOKS = {p.stem: str(p) for p in sorted(Path("notebooks").glob("[0-9][0-9]_*.ipynb"))}
if not int(config.get("ablations", 0)):
    NOTEBOOKS.pop("07_ablations", None)
for interactive in ("00_import", "09_explore"):
    NOTEBOOKS.pop(interactive, None)
SPLITS = [f"-fold{fold}" for fold in FOLDS] if len(FOLDS) > 1 else [""]
TRAINED = [
    f"{RUNS}/{variant}{split}-seed{seed}"
    for variant in VARIANTS for split in SPLITS for seed in SEEDS if TRAINING in NOTEBOOKS
]


def digest(files) -> str:
    """Digest of the contents of files, as far as they exist."""
    return hashlib.sha256(b"".join(f.read_bytes() for f in files if f.is_file())).hexdigest()[:16]


def state_of_code(*modules) -> str:
    """Digest of the code of modules and packages of `dreamer`."""
    folder = Path(dreamer.pipeline.__file__).parent
    return digest(
        f for m in modules for f in (folder / f"{m}.py", *sorted((folder / m).glob("*.py")))
    )


def state_of_data() -> str:
    """Digest of names, sizes and times of your own scans' files: a changed image is noticed."""
    digest = hashlib.sha256()
    for folder, _, names in sorted(os.walk(DATA)) if OWN_DATA else ():
        for name in sorted(names):
            seen = os.stat(os.path.join(folder, name))
            digest.update(f"{folder}/{name} {seen.st_size} {seen.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


# Runs are compared only where they share all code that trains.
CODE = state_of_code(
    "files", "poses", "images", "records", "data", "tokens", "options", "model", "runs", "training",
    "phantom",
)
STATE = f"{CODE}-{state_of_data()}"
STORED = digest(sorted(Path("data/results").rglob("*")))  # the reference study


def runs(step):
    """The runs that a notebook reads: the comparison all of them, others those of one fold, whose
    test patients none of them has seen; those without transformer are for navigation too."""
    if step == COMPARE:
        return TRAINED
    one_fold = [run for run in TRAINED if f"{SPLITS[0]}-seed" in run]
    return [run for run in one_fold if step == NAVIGATE or "/none" not in run]


def parameters(step, **given):
    """Parameters of a notebook as JSON: from the preset, then from the pipeline."""
    takes = known_parameters(NOTEBOOKS[step])
    values = {"data": DATA, "output": OUTPUT, "runs": runs(step), **given}
    values["folder"] = f"{RUNS}/ablations/{STATE}"
    if "starts" in config:
        values["starts"] = int(config["starts"])
    values |= SMOKE.get(step, {}) if PRESET == "smoke" else {}
    values = {name: value for name, value in values.items() if name in takes}
    preset = preset_parameters(PRESET_FILE, NOTEBOOKS[step])
    if PRESET == "smoke" and "training" in preset:
        preset["training"]["test"] = 2  # an interval over patients needs two
    return json.dumps(preset | values)


def training(run):
    """Parameters of one training, read from the name of its run folder."""
    variant, *fold, seed = run.split("-")
    given = dict(token_type=variant, seed=int(seed[4:]), run=f"{RUNS}/{run}")
    given["output"] = f"{RUNS}/tables/{run}"
    if fold:
        preset = preset_parameters(PRESET_FILE, NOTEBOOKS[TRAINING]).get("training", {})
        given["training"] = {**preset, "split": "patient", **DEALT[int(fold[0][4:])]}
    return parameters(TRAINING, **given)


def trained(folders):
    """The marks of finished trainings."""
    return [f"{RUNS}/notebooks/02_train-{Path(folder).name}.done" for folder in folders]


def needs(step):
    """The inputs of a notebook, by its parameters."""
    takes = known_parameters(NOTEBOOKS[step])
    return [
        NOTEBOOKS[step],
        *(DATA_READY if "data" in takes else []),
        *(trained(runs(step)) if "runs" in takes else []),
    ]


def reads_store(step):
    """Whether a notebook reads the reference study; the benchmark only adds to it."""
    return "store" in known_parameters(NOTEBOOKS[step]) and step != BENCHMARK


# One notebook: refuses unknown parameters and keeps the executed notebook. Snakemake deletes the
# declared outputs before it runs and fails where one is missing afterwards.
RUN = (
    f"OMP_NUM_THREADS={{threads}} {shlex.quote(sys.executable)} -m dreamer.pipeline "
    f"{{input[0]:q}} --executed {{log[0]:q}} --timeout {TIMEOUT} -y {{params.parameters:q}}"
)
# A mark holds the date: Snakemake takes a small input with the same content for unchanged, and
# would keep what depended on an earlier training.
DONE = " && date > {output.done:q}"


rule all:
    input:
        f"{OUTPUT}/index.html",


if not OWN_DATA:

    rule phantom:
        output:
            DATA_READY[0],
        params:
            draw=f"from dreamer.phantom import generate; generate({DATA!r}, patients={patients}, "
            f"frames={frames}, size={size}, target={PLANE!r}, seed=0, redraw=True)",
            code=state_of_code("phantom"),  # other code draws anew
        threads: 8
        shell:
            f"{shlex.quote(sys.executable)} -c {{params.draw:q}} && date > {{output[0]:q}}"


rule train:
    input:
        NOTEBOOKS.get(TRAINING, []),
        DATA_READY,
    output:
        [f"{RUNS}/tables/{{run}}/{name}" for name in PROMISED.get(TRAINING, ())],
        done=f"{RUNS}/notebooks/02_train-{{run}}.done",
    log:
        f"{RUNS}/notebooks/02_train-{{run}}.ipynb",
    params:
        parameters=lambda wildcards: training(wildcards.run),
        state=STATE,
        folder=lambda wildcards: f"{RUNS}/{wildcards.run}",
    threads: 1 if SMALL else 8
    wildcard_constraints:
        run="(?!channel).*",
    priority: 2  # the long ones first: short ones fill the cores at the end
    resources:
        trainer=0 if SMALL else 1,
    shell:
        RUN + " --run {params.folder:q} {params.state}" + DONE


# Ten times as many tokens take longest, and everything else waits for them.
use rule train as train_channel with:
    wildcard_constraints:
        run="channel.*",
    priority: 3


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
            state=f"{STATE}-{STORED}" if reads_store(step) else STATE,
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
        write=f"from dreamer.page import write_page; "
        f"print('page:', write_page({OUTPUT!r}, {f'{RUNS}/notebooks'!r}))",
    shell:
        f"{shlex.quote(sys.executable)} -c {{params.write:q}}"
