"""A virtual patient: drawn measures, a heartbeat, a chest, and where the standard planes lie.

Sizes are normal distributions, cut at two standard deviations, women / men:
- LV end-diastolic diameter 45.0, 3.6 / 50.2, 4.1 mm; ejection fraction 64, 5 / 62, 5 %; walls 6 to
  9 / 6 to 10 mm; RV basal diameter 33, 4, length 71, 5 mm; aortic sinus 30, 2.5 / 34, 2.5 mm:
  Lang et al., "Recommendations for cardiac chamber quantification by echocardiography in adults"
  (ASE and EACVI), J Am Soc Echocardiogr 2015;28:1-39, tables 2, 6, 8 and 14.
- Mitral annular descent 12 to 15 mm; tricuspid annulus nearer to the apex by less than 8 mm per m2
  (common reference values).
- LV length, atria, chest wall, rib spacing: within the normal range, compared with a real scan.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from dreamer import poses
from dreamer.phantom.anatomy import LABEL, TARGETS, Heart, Measures, Scene, unit
from dreamer.phantom.sector import DEPTH

FACE, STANDOFF = 9.0, 5.7  # mm: half the probe's face; a gap that the gel no longer fills
REST = 68.0  # beats per minute, mean of the patients
ANATOMY = {  # factors on the measures; dilated and hypertrophic as in the tables of Lang et al.
    "normal": {},
    "dilated": {"lv_diameter": 1.3, "lv_length": 1.1, "ejection_fraction": 0.5, "descent": 0.55},
    "hypertrophic": {"wall": 1.75, "lv_diameter": 0.92, "ejection_fraction": 1.08},
    "small": dict.fromkeys(
        ("lv_diameter", "lv_length", "rv_basal", "rv_length", "la_length", "la_width",
         "ra_length", "ra_width", "aortic_sinus", "wall", "descent"), 0.85,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Factors:
    """Factors of variation, as shifts from each patient's own draw; zero leaves it as drawn."""

    gain: float = 0.0  # dB; drawn with SD 2
    dynamic_range: float = 0.0  # dB; drawn 60, SD 2.5
    time_gain: int = 0  # number of another time-gain curve; 0 is the patient's own
    depth: float = 0.0  # mm added to 160
    rib_shadow: float = 0.0  # mm by which each rib moves into the window; drawn gap 14, SD 0.8
    contact: float = 0.0  # mm of air added between probe and skin
    heart_phase: float = 0.0  # share of the cycle added
    heart_rate: float = 0.0  # beats per minute added; drawn 68, SD 8
    anatomy: str = "normal"  # one of ANATOMY
    noise: float = 0.0  # dB of electronic noise added; drawn with SD 2

    @classmethod
    def of(cls, vary: Mapping[str, float | str] | None) -> "Factors":
        """The factors named in `vary`; ValueError for unknown names and impossible values."""
        vary = dict(vary or {})
        known = {f.name: f.default for f in fields(cls)}
        for name, value in vary.items():
            if name not in known:
                raise ValueError(f"vary: factor {name!r} is unknown; one of {', '.join(known)}")
            if name == "anatomy":
                if value not in ANATOMY:
                    raise ValueError(f"vary: anatomy {value!r}; one of {', '.join(ANATOMY)}")
            elif isinstance(value, bool | str) or not math.isfinite(value):
                raise ValueError(f"vary: {name} must be a finite number; got {value!r}")
        factors = cls(**vary)
        if not -80 <= factors.depth <= 80:
            raise ValueError(f"vary: depth must be within 80 mm; got {factors.depth}")
        if factors.time_gain != int(factors.time_gain) or factors.time_gain < 0:
            raise ValueError(f"vary: time_gain numbers a curve; got {factors.time_gain}")
        return factors


class Patient:
    """One virtual adult, fixed by `seed` (an integer, or integers such as (seed, number)).

    `size` holds the measures (mm, degrees, fractions), `heart` the shapes, `factors` what `vary`
    changes. The same arguments give the same patient on every machine.
    """

    def __init__(self, seed: int | Sequence[int], vary: Mapping[str, float | str] | None = None):
        self.seed, self.vary = seed, dict(vary or {})
        self.factors = Factors.of(vary)
        rng = np.random.default_rng(seed)

        def normal(mean: float, sd: float, spread: float = 2.0) -> float:
            return float(mean + sd * np.clip(rng.standard_normal(), -spread, spread))

        male = bool(rng.random() < 0.5)
        drawn = Measures(
            lv_diameter=normal(50.2, 4.1) if male else normal(45.0, 3.6),
            lv_length=normal(86, 4) if male else normal(80, 4),
            wall=normal(9.2, 0.8) if male else normal(8.4, 0.7),
            ejection_fraction=normal(0.62, 0.05) if male else normal(0.64, 0.05),
            descent=normal(13.0, 1.5),
            rv_basal=normal(33, 4),
            rv_length=normal(71, 5),
            tricuspid_offset=normal(7, 1.2),
            la_length=normal(43, 3.5),
            la_width=normal(40, 3),
            ra_length=normal(43, 3.5),
            ra_width=normal(40, 3),
            aortic_sinus=normal(34, 2.5) if male else normal(30, 2.5),
            skin_to_heart=normal(17, 1.8),
            rib_gap=normal(14.0, 0.8),
            rib_angle=normal(30, 4),
            lung_edge=normal(13.0, 3.0),
        )
        change = ANATOMY[self.factors.anatomy]
        self.size = replace(drawn, **{k: getattr(drawn, k) * v for k, v in change.items()})
        self.gain = normal(0, 2.0) + self.factors.gain  # dB
        self.dynamic_range = normal(60, 2.5) + self.factors.dynamic_range  # dB
        self.noise = normal(0, 2.0) + self.factors.noise  # dB
        self.clutter = normal(0, 2.5)  # dB
        self.heart_rate = max(30.0, normal(REST, 8.0) + self.factors.heart_rate)
        self.depth = DEPTH + self.factors.depth
        self.pose_errors = {  # how far a plane lies from its landmarks, mm and degrees: our choice
            name: [normal(0, 1.0) for _ in range(3)] + [normal(0, 1.2) for _ in range(3)]
            for name in TARGETS
        }
        self.hash = int(rng.integers(1, 2**31 - 1))
        self.ripples = rng.uniform(0, 2 * math.pi, 12)
        self.heart = Heart(self.size, rng)
        self.time_gain = self._time_gain(self.factors.time_gain)

    def _time_gain(self, number: int) -> np.ndarray:
        """Gain, dB, at 9 sliders from the skin to 200 mm: a slope error and hand-set sliders."""
        rng = np.random.default_rng([self.hash, number])
        slope = 0.35 * np.clip(rng.standard_normal(), -2, 2)  # dB per cm
        sliders = 1.3 * np.clip(rng.standard_normal(9), -2, 2)
        return slope * (np.linspace(0, 20, 9) - 8) + sliders

    def place(self, target: str) -> Tensor:
        """The rigid transform [4, 4] from the target plane's probe frame to the heart frame, mm."""
        heart, skin = self.heart, self.size.skin_to_heart
        axis = np.array([0.0, 0.0, 1.0])
        deep, side = heart.deep, heart.side  # of the parasternal window
        far, front = skin + 8.0, skin + 6.0 + heart.front
        # Four-chamber: behind the aortic root, through the apex and the crux.
        apical = unit(np.array([-0.02, 0.075, 1.0]))
        lateral = unit(np.array([1.0, 0.0, 0.02]))
        lateral = unit(lateral - apical * (lateral @ apical))
        # Aortic valve: at right angles to the root, which leans forward.
        root_deep = unit(deep * 0.95 + axis * 0.30)
        root_side = unit(side + axis * 0.16)
        root_side = unit(root_side - root_deep * (root_side @ root_deep))
        valve = heart.valves["aortic_valve"].centre + heart.valves["aortic_valve"].axis * 5.0
        # Mitral valve: the near side leans to the apex, away from the outflow tract.
        mitral_deep = unit(deep + axis * 0.18)
        mitral = axis * (self.size.lv_length - self.size.descent - 8)
        beam, right, point, depth = {
            "a4c": (apical, lateral, np.array([-3.0, 0.5, 0.0]), far),
            "plax": (deep, axis, axis * (self.size.lv_length - 8), front),
            "psax-mv": (mitral_deep, side, mitral, front),
            "psax-av": (root_deep, root_side, valve + root_deep * 22, front),
        }[target]
        frame = np.eye(4)
        frame[:3, 0], frame[:3, 1], frame[:3, 2] = right, np.cross(beam, right), beam
        frame[:3, 3] = point - beam * depth
        error = torch.tensor(self.pose_errors[target], dtype=torch.float64)
        return torch.from_numpy(frame) @ poses.to_matrix(error)

    def beat(self, phase: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Contraction, mitral opening and aortic opening, each in [0, 1], at phases of the cycle.

        Phase 0 is end diastole; end systole is at 0.36; filling has an early and an atrial wave.
        """
        phase = torch.remainder(phase, 1.0)

        def rise(start: float, end: float) -> Tensor:
            return torch.sin(((phase - start) / (end - start)).clamp(0, 1) * (math.pi / 2)) ** 2

        squeeze = rise(0.0, 0.36) - 0.82 * rise(0.40, 0.60) - 0.18 * rise(0.84, 1.0)
        mitral = rise(0.40, 0.46) - 0.55 * rise(0.52, 0.64) + 0.3 * rise(0.80, 0.86)
        mitral = mitral - 0.75 * rise(0.92, 1.0)
        aortic = rise(0.04, 0.09) - rise(0.33, 0.38)
        return squeeze, mitral.clamp(0, 1), aortic.clamp(0, 1)

    def scene(
        self,
        heart: Tensor,
        chest: Tensor,
        phase: Tensor,
        near: int,
        without: frozenset[str] = frozenset(),
    ) -> Scene:
        """What lies at points of the heart frame and the chest frame, both [N, 3, ..., D] mm.

        phase [N]; `near`: samples of the last axis deep enough to hold the chest wall. `without`:
        structures left out, in whose place appears what surrounds them.
        """
        scene = self.heart.scene(heart, self.beat(phase.double()), without)
        x, y, z = chest[..., :near].unbind(1)
        z = z - self.skin(x, y)
        view = scene.label[..., :near]
        if "chest_wall" not in without:
            view.masked_fill_(z < self.size.skin_to_heart - 1.5, LABEL["chest_wall"])
        if "ribs" not in without:
            view.masked_fill_(self.rib_distance(x, y, z) < 0, LABEL["ribs"])
        return scene

    def skin(self, x: Tensor, y: Tensor) -> Tensor:
        """Depth, mm, of the skin over a chest-frame point: a dome with a slight slope."""
        return (x * x + 1.4 * y * y) * (1 / 260) + 0.05 * x

    def contact(self, pose: Tensor) -> Tensor:
        """Share [...] of the probe's face that touches the skin at poses [..., 6]."""
        matrix = poses.to_matrix(pose.double())
        along = torch.linspace(-FACE, FACE, 19, dtype=torch.float64)
        face = matrix[..., :3, 3:] + matrix[..., :3, :1] * along  # [..., 3, 19]
        x, y, z = face.unbind(-2)
        return (self.skin(x, y) - z + self.factors.contact < STANDOFF).double().mean(-1)

    def rib_distance(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """Distance, mm, to the nearer of the two ribs that bound the intercostal window."""
        angle = math.radians(self.size.rib_angle)
        gap = self.size.rib_gap - self.factors.rib_shadow
        across = y * math.cos(angle) - x * math.sin(angle)
        deep = (z - (self.size.skin_to_heart - 6.5)) * 1.25
        upper, lower = torch.hypot(across - gap - 0.8, deep), torch.hypot(across + gap, deep)
        return torch.minimum(upper, lower) - 5.5
