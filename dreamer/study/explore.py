"""A probe to move by hand: sliders, the picture, what the models say, and where they would go.

For JupyterLab (ipywidgets), but every button is also a method, so that it runs without a browser.
Frames, answers and maps are kept by what they depend on; only what changed is computed again.
"""

import html
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dreamer import attribution, poses
from dreamer.study.arrivals import NAMES, WINDOW, unseen_people
from dreamer.figures.navigation import panels
from dreamer.study.closed_loop import Follow, NavigationConfig, away, draw_start
from dreamer.phantom import TARGETS, Patient, render
from dreamer.runs import load_run

MAPS = ("none", "attention", "attribution")
REACH = (40.0, 40.0, 20.0, 60.0, 45.0, 90.0)  # of the sliders, mm and degrees
# In the probe's frame: what a hand does for a positive and for a negative number.
WORDS = {
    "x": ("slide {:.0f} mm right", "slide {:.0f} mm left"),
    "y": ("slide {:.0f} mm towards you", "slide {:.0f} mm away from you"),
    "z": ("press {:.0f} mm", "ease {:.0f} mm"),
    "roll": ("fan {:.0f}° away from you", "fan {:.0f}° towards you"),
    "pitch": ("rock {:.0f}° right", "rock {:.0f}° left"),
    "yaw": ("rotate {:.0f}° clockwise", "rotate {:.0f}° anticlockwise"),
}


def say(motion: Tensor) -> str:
    """A motion [6] (probe's frame, mm and degrees) as a person is told it; "hold" when small.

    Right is the picture's right, away from you into it; turns are seen from behind the probe.
    """
    told = [
        WORDS[axis][value < 0].format(abs(value))
        for axis, value, least in zip(poses.AXES, motion.tolist(), [1] * 3 + [2] * 3, strict=True)
        if abs(value) >= least
    ]
    return ", ".join(told) or "hold: this is the plane"


class Explorer:
    """A virtual patient under a probe that sliders move; `widget` shows it, methods press buttons.

    `runs`: trained runs, one of each variant is used; those that are not there are named and left
    out. `data`: the phantom whose unseen patients are shown (new ones where it is not there).
    Lengths in mm, angles in degrees. Raises ValueError where no patient is unseen by all runs.
    """

    def __init__(self, runs: Sequence[str], data: str, people: int = 24, seed: int = 0):
        self.config, self.seed, self.times = NavigationConfig(), seed, []
        self.models, self.quiet, self.number, self.draws = {}, True, 0, 0
        found = [run for run in runs if Path(run, "model.safetensors").is_file()]
        self.missing = [run for run in runs if run not in found]
        self.people, self.target = unseen_people(found, data if found else "", people)
        self.trained_on = self.target
        self._patient = lru_cache(8)(lambda number: Patient(self.people[number].seed))
        self._frame = lru_cache(64)(self._draw)
        self._answer = lru_cache(128)(self._ask)
        self._map = lru_cache(64)(self._explain)
        self._build()
        self.missing += [run for run in found if not self.load(run)]
        self.new_patient(0)
        self.quiet = False
        self.redraw()

    def _build(self) -> None:
        wide = widgets.Layout(width="330px")
        self.sliders = {
            axis: widgets.FloatSlider(
                0, min=-reach, max=reach, step=0.5, description=f"{axis} ({unit})",
                readout_format=".1f", layout=wide,
            )
            for axis, unit, reach in zip(poses.AXES, poses.UNITS, REACH, strict=True)
        }  # fmt: skip
        for slider in self.sliders.values():
            slider.observe(self._moved, "value")
        self.picture = widgets.Image(format="png")
        self.text, self.report = widgets.HTML(), widgets.HTML("ready")
        self.steers = widgets.Dropdown(description="guided by", options=[], layout=wide)
        self.shown = widgets.Dropdown(
            description="map", options=MAPS, value="attention", layout=wide
        )
        self.plane = widgets.Dropdown(
            description="plane", value=self.target, layout=wide,
            options=[(words, name) for name, words in TARGETS.items()],
        )  # fmt: skip
        self.path = widgets.Text(description="run", placeholder="data/runs/...", layout=wide)
        self.steers.observe(self._moved, "value")
        self.shown.observe(self._mapped, "value")
        self.plane.observe(self._planed, "value")
        self.buttons = {
            "one guided step": self.step, "go to the plane": self.go,
            "new patient": self.new_patient, "load the run": lambda: self.load(self.path.value),
        }  # fmt: skip
        row = []
        for words, act in self.buttons.items():
            button = widgets.Button(description=words, tooltip=words)
            button.on_click(lambda _, act=act: act())
            row.append(button)
        chosen = [self.plane, self.shown, self.steers, self.path]
        wrap = widgets.Layout(flex_flow="row wrap")
        sides = [widgets.VBox(list(self.sliders.values())), widgets.VBox(chosen)]
        self.widget = widgets.VBox([
            widgets.HBox(row, layout=wrap), self.report, self.picture,
            widgets.HBox(sides, layout=wrap), self.text,
        ])  # fmt: skip

    # What is computed, each from what it depends on alone.

    def _draw(self, number: int, target: str, pose: tuple, phase: float, size: int) -> np.ndarray:
        patient = self._patient(number)
        return render(patient, torch.tensor(pose), phase, target=target, size=size).image.numpy()

    @torch.no_grad()
    def _ask(self, variant: str, run: str, key: tuple) -> tuple[Tensor, Tensor]:
        model = self.models[variant][1]
        image = torch.from_numpy(self._frame(*key))[None, None].float() / 255
        features = model.encode(image)
        return features, model.imagine(features, torch.zeros(1, 6)).pose[0].double()

    def _explain(self, variant: str, run: str, key: tuple, kind: str) -> np.ndarray | None:
        model, (features, _) = self.models[variant][1], self._answer(variant, run, key)
        if kind == "none" or model.world is None:
            return None
        if kind == "attention":
            return attribution.attention_grid(model, features)[0].numpy()
        return attribution.attribute(model, features, "rotation", steps=8).grid[0].numpy()

    # What a hand does.

    @property
    def pose(self) -> Tensor:
        """Where the sliders stand [6], mm and degrees from the plane."""
        return torch.tensor([s.value for s in self.sliders.values()], dtype=torch.float64)

    def place(self, pose: Tensor) -> None:
        """Set all six sliders to a pose [6] within their reach, and redraw once."""
        self.quiet = True
        for slider, value in zip(self.sliders.values(), pose.tolist(), strict=True):
            # Where the browser's slider would snap to: it must not send another value back.
            value = round(value / slider.step) * slider.step
            slider.value = float(np.clip(value, slider.min, slider.max))
        self.quiet = False
        self.redraw()

    def _moved(self, _) -> None:
        if not self.quiet:
            self.guide = None  # by hand: what was averaged so far no longer holds
            self.redraw()

    def _mapped(self, _) -> None:
        # Attribution takes longer than a redraw may: it waits until the slider is let go.
        for slider in self.sliders.values():
            slider.continuous_update = self.shown.value != "attribution"
        self._moved(None)

    def _planed(self, _) -> None:
        self.target = self.plane.value
        self.new_patient(self.number)

    def new_patient(self, number: int | None = None) -> None:
        """The next unseen patient (or that of a number), and a new start of the search."""
        self.number = (self.number + 1 if number is None else number) % len(self.people)
        rng = np.random.default_rng([self.seed, self.number, self.draws])
        self.draws, self.phase, self.guide = self.draws + 1, 0.0, None
        self.report.value = f"patient {self.people[self.number].name}, {TARGETS[self.target]}"
        self.place(torch.from_numpy(draw_start(rng, self.config)))

    def load(self, run: str) -> bool:
        """Take a trained run for its variant; what is wrong with it is said, not raised."""
        try:
            model = load_run(run)
            sizes = {m.config.image_size for _, m in self.models.values()}
            if sizes and model.config.image_size not in sizes:
                raise ValueError(f"{run}: pictures of {model.config.image_size} px, not {sizes}")
        except (OSError, ValueError) as error:
            self.report.value = f"not loaded: {html.escape(str(error))}"
            return False
        variant = NAMES[model.config.token_type]
        self.models[variant] = (str(run), model)
        before, self.quiet = self.quiet, True
        self.steers.options = list(self.models)
        self.steers.value = variant if self.steers.value is None else self.steers.value
        self.guide, self.quiet = None, before
        self.report.value = f"loaded {html.escape(str(run))}: {variant} tokens"
        self.redraw()
        return True

    def step(self) -> bool:
        """One guided step of the steering run, averaged over the last frames. False without one."""
        if not self.models:
            self.report.value = "no run is loaded: nobody guides"
            return False
        _, model = self.models[self.steers.value]
        if self.guide is None:
            self.guide = Follow(model, self.config, WINDOW)
            self.guide.reset([])
        frame = torch.from_numpy(self._frame(*self._key()))[None, None]
        motion = self.guide(frame)[0]
        self.phase = round((self.phase + self.config.seconds * 1.1) % 1, 6)
        self.place(poses.compose(self.pose, motion))
        self.report.value = f"made: {say(motion)}; {self._left()}"
        return True

    def go(self) -> None:
        """Guided steps until the guidance asks for less than 1 mm and 2 degrees, 20 at most."""
        for count in range(1, self.config.steps + 1):
            before = self.pose
            if not self.step():
                return
            mm, deg = away(poses.relative(before, self.pose))
            if count > 4 and mm < 1 and deg < 2:
                break
        self.report.value = f"stopped after {count} steps; {self._left()}"

    def _left(self) -> str:
        mm, deg = away(self.pose)
        return f"error: {mm:.1f} mm, {deg:.1f} degrees"

    def _key(self) -> tuple:
        size = max((m.config.image_size for _, m in self.models.values()), default=112)
        return self.number, self.target, tuple(self.pose.tolist()), self.phase, size

    def redraw(self) -> None:
        """Picture and texts for where the probe stands; its milliseconds are added to `times`."""
        if self.quiet:
            return
        start, key = time.perf_counter(), self._key()
        todo = poses.remaining(self.pose)
        views = [("frame", None, todo)]
        rows = {"true": [*self.pose.tolist(), "", say(todo)]}
        for variant, (run, _) in self.models.items():
            _, said = self._answer(variant, run, key)
            grid, todo = self._map(variant, run, key, self.shown.value), poses.remaining(said)
            title = variant if grid is None else f"{variant}: {self.shown.value}"
            views.append((title, grid, todo))
            error = poses.errors(said, self.pose)
            off = f"{error.translation:.1f} mm, {error.rotation:.1f}°"
            rows[variant] = [*said.tolist(), off, say(todo)]
        self.picture.value = panels(self._frame(*key), views)
        self.times.append(1000 * (time.perf_counter() - start))
        notes = [f"no run at {html.escape(str(run))}" for run in self.missing]
        if self.models and self.target != self.trained_on:
            notes.append(f"the runs know the {TARGETS[self.trained_on]} plane alone")
        notes.append(f"redrawn in {self.times[-1]:.0f} ms")
        heads = [f"{axis} ({unit})" for axis, unit in zip(poses.AXES, poses.UNITS, strict=True)]
        table = pd.DataFrame.from_dict(rows, "index", columns=[*heads, "off by", "to the plane"])
        table = table.to_html(float_format="{:.1f}".format, border=0)
        self.text.value = f"{table}<p>{'; '.join(notes)}</p>"
