"""A virtual patient: implicit shapes that beat, and where the standard planes lie in them.

Heart frame, mm: origin at the endocardial apex of the left ventricle, z along its long axis to the
mitral annulus, x to the lateral wall, y to the inferior wall (the aorta lies at -y). All anatomy is
drawn at end diastole; `motion` maps a point of the beating heart to the material point it shows,
so that shapes, muscle and speckle move together.

Distributions (mean, SD) of adults, women / men:
- LV end-diastolic diameter 45.0, 3.6 / 50.2, 4.1 mm; ejection fraction 64, 5 / 62, 5 %; septum and
  wall 6-9 / 6-10 mm; RV basal diameter 33, 4, mid 27, 4, length 71, 6 mm; aortic sinus 30, 3 /
  34, 3 mm: Lang et al., "Recommendations for cardiac chamber quantification", J Am Soc
  Echocardiogr 2015;28:1-39, tables 2, 6, 8 and 14.
- Mitral annular descent 12-15 mm, tricuspid annulus nearer the apex by less than 8 mm per m2:
  common echocardiographic reference values (TAPSE over 17 mm; Ebstein's criterion).
- Fibre angle +60 degrees at the endocardium to -60 at the epicardium: Streeter et al., Circ Res
  1969;24:339-347.
- LV length, atria, wall layers, rib spacing, heart axis: our choice, in the normal range, and set
  beside a real apical scan. How close a target plane lies to its landmarks is our choice too.
"""

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dreamer import poses

STRUCTURES = (
    "left_ventricle",
    "right_ventricle",
    "left_atrium",
    "right_atrium",
    "aorta",
    "myocardium",
    "septum",
    "papillary_muscles",
    "mitral_valve",
    "tricuspid_valve",
    "aortic_valve",
    "heart_wall",
    "pericardium",
    "mediastinum",
    "lung",
    "liver",
    "chest_wall",
    "ribs",
)
LABEL = {name: number for number, name in enumerate(STRUCTURES, 1)}  # 0 is outside the sector
TARGETS = {  # the literature's names
    "a4c": "apical four-chamber",
    "plax": "parasternal long axis",
    "psax-av": "parasternal short axis, aortic valve",
    "psax-mv": "parasternal short axis, mitral valve",
}
VALVES = ("mitral_valve", "tricuspid_valve", "aortic_valve")


class Scene(NamedTuple):
    """Fields over sample points, all of one shape.

    `label` uint8 (1 + index in STRUCTURES); signed distances in mm, below zero inside: `blood`
    (any lumen), `heart` (outer surface), `wall` (left ventricular epicardium), `border` (lung or
    liver); `depth` 0 at the endocardium to 1 at the epicardium; `texture` slow variation about
    zero; `material` the three material coordinates, mm.
    """

    label: Tensor
    blood: Tensor
    heart: Tensor
    border: Tensor
    depth: Tensor
    texture: Tensor
    material: tuple[Tensor, Tensor, Tensor]


def _smooth_min(a: Tensor, b: Tensor, k: float) -> Tensor:
    """Union of two distances, rounded over `k` mm (polynomial smooth minimum)."""
    h = (k - (a - b).abs()).clamp_(min=0)
    return torch.minimum(a, b).sub_(h.mul_(h).mul_(0.25 / k))


class Patient:
    """One virtual adult, fixed by `seed` (an integer, or integers such as (seed, number)).

    `size` holds the drawn measures (mm, degrees, fractions), `gain` and `dynamic_range` (dB) the
    machine's settings. The same seed gives the same patient on every machine.
    """

    def __init__(self, seed: int | Sequence[int]):
        self.seed = seed
        rng = np.random.default_rng(seed)

        def normal(mean: float, sd: float, spread: float = 2.0) -> float:
            return float(mean + sd * np.clip(rng.standard_normal(), -spread, spread))

        male = bool(rng.random() < 0.5)
        s = self.size = {
            "male": male,
            "lv_diameter": normal(50.2, 4.1) if male else normal(45.0, 3.6),
            "lv_length": normal(86, 4) if male else normal(80, 4),
            "wall": normal(8.6, 0.9) if male else normal(7.8, 0.8),
            "ejection_fraction": normal(0.62, 0.05) if male else normal(0.64, 0.05),
            "descent": normal(13.0, 1.5),
            "rv_basal": normal(33, 4),
            "rv_length": normal(71, 5),
            "tricuspid_offset": normal(7, 1.2),
            "la_length": normal(44, 4),
            "la_width": normal(39, 3),
            "ra_length": normal(45, 4),
            "ra_width": normal(40, 3),
            "aortic_sinus": normal(34, 3) if male else normal(30, 3),
            "skin_to_heart": normal(17, 1.8),
            "rib_gap": normal(14.0, 0.8),
            "rib_angle": normal(30, 4),
        }
        self.gain = normal(0, 2.0)
        self.dynamic_range = normal(62, 2.5)
        self.clutter = float(10 ** (normal(0, 3.5) / 20))
        self.noise = float(10 ** (normal(0, 2.0) / 20))
        self.ties = {
            name: [normal(0, 1.0, 2.5) for _ in range(3)] + [normal(0, 1.2, 2.5) for _ in range(3)]
            for name in TARGETS
        }
        self.lingula = normal(10.5, 1.0)
        self.hash = int(rng.integers(1, 2**31 - 1))
        # Slow waves, 1 / mm, that make every shape irregular.
        self.waves = np.clip(rng.normal(0, 1, (3, 3)), -1.6, 1.6) * 2 * math.pi / 90
        self.wave_phase = rng.uniform(0, 2 * math.pi, 3)
        self.ripples = rng.uniform(0, 2 * math.pi, 8)
        length = s["lv_length"]
        self.a0, self.zc = s["lv_diameter"] / 2, 0.58 * length
        base = self.a0 * math.sqrt(1 - ((length - self.zc) / self.zc) ** 2)
        self.annulus = base + 1.0  # radius, mm
        squeeze = 1 - s["descent"] / length
        shrink = math.sqrt((1 - s["ejection_fraction"]) / squeeze)
        self.kappa = (1 - shrink**2) / self._reach((shrink * self.a0) ** 2)
        self._shapes(normal)

    @staticmethod
    def _reach(r2):
        """How far from the axis the radial motion reaches: 1 in the ventricle, 0 far away."""
        return 1 / (1 + (r2 * (1 / 45**2)) ** 2)

    def _shapes(self, normal) -> None:
        s, length, a = self.size, self.size["lv_length"], self.a0
        wall, zt = s["wall"], length - s["tricuspid_offset"]
        septal = -(self.annulus + 6)
        root, ra = s["aortic_sinus"] / 2, s["ra_width"] / 2
        out = np.array([-0.5, -0.87, 0.0])  # from the mitral annulus to the aortic root
        valve = out * (0.62 * self.annulus + root * 0.62) + [0, 0, length + 1]
        up = np.array([-0.05, -0.42, 0.9])
        self.aortic = (valve, up / np.linalg.norm(up), root * 0.82)
        la_l, la_r, ra_l = s["la_length"], s["la_width"] / 2, s["ra_length"]
        back = length + la_l
        # fmt: off
        self.ellipsoids = {  # centre, radii, mm
            "rv": ((septal - 3.5 - normal(0, 1), -13, zt - 14),
                   (s["rv_basal"] + 1, 29, s["rv_length"] - 16)),
            "la": ((1 + normal(0, 1.2), 1, length + 0.36 * la_l), (la_r, la_r - 1, 0.64 * la_l)),
            # The left appendage reaches forward and to the side.
            "la_lobe": ((17 + normal(0, 1), -15 + normal(0, 1), length + 0.22 * la_l),
                        (13, 12, 0.26 * la_l)),
            "ra": ((septal - ra + 3, -3, zt + 0.33 * ra_l), (ra, ra, 0.66 * ra_l)),
            "ra_lobe": ((septal - ra - 3, -14 + normal(0, 1), zt + 0.4 * ra_l),
                        (ra - 3, ra - 2, 0.45 * ra_l)),
            "liver": ((-20 + normal(0, 3), 120 + normal(0, 2), 62), (92, 92, 92)),
        }
        self.tubes = {  # from, to, radius, mm
            "aorta": (valve, valve + up * 90, root * 0.95),
            "lvot": (valve - up * 12, valve, root * 0.72),
            "rvot": ((-30, -30, length - 32), (2, -46, length + 14), 12.5),
            "vein_1": ((6, 6, back - 12), (24, 16, back + 30), 6.0),
            "vein_2": ((-4, -8, back - 12), (-14, -26, back + 28), 5.5),
            "svc": ((septal - 22, -12, zt + 22), (septal - 14, -70, zt + 38), 8.5),
            "ivc": ((septal - 16, 14, zt + 24), (septal - 14, 70, zt + 24), 9.5),
            "descending": ((22, -90, back + 16), (13 + normal(0, 1.5), 90, back + 6), 11.5),
            "sinus": ((-22, 21, length + 4), (24, 17, length + 8), 4.2),
            "pap_1": ((0.84 * a, -0.56 * a, 0.32 * length),
                      (0.5 * a, -0.42 * a, 0.62 * length), 5.2),
            "pap_2": ((-0.2 * a, 0.96 * a, 0.32 * length),
                      (-0.1 * a, 0.6 * a, 0.62 * length), 5.6),
            "band": ((-a - wall, -4, 0.36 * length), (-a - wall - 26, -14, 0.5 * length), 2.3),
        }
        # fmt: on
        self.tricuspid = np.array([septal - ra + 4.0, 0, zt])
        # hinge's centre and axis (into the outflow), radius, the longer leaflet's side and share
        self.valves = {
            "mitral_valve": ((0, 0, length), (0, 0, -1), self.annulus, (-0.5, -0.87, 0), 0.25),
            "tricuspid_valve": (self.tricuspid, (0.1, 0, -0.995), 15.5, (0.6, -0.8, 0), 0.2),
            "aortic_valve": (*self.aortic, (1.0, 0, 0), 0.0),
        }
        # Every shape is read off linear forms of the point: one matrix product for all.
        rows, shift = [], []
        for centre, radii in self.ellipsoids.values():
            rows += list(np.diag(1 / np.array(radii)))
            shift += list(-np.array(centre) / radii)
        for start, end, _ in self.tubes.values():
            start, end = np.asarray(start, float), np.asarray(end, float)
            along = (end - start) / np.linalg.norm(end - start)
            rows += [along, -2 * start]
            shift += [-along @ start, start @ start]
        for centre, axis, ring, longer, uneven in self.valves.values():
            centre = np.asarray(centre, float) - np.array(longer) * uneven * ring
            rows += [-2 * centre, np.asarray(axis, float), np.array(longer, float)]
            shift += [centre @ centre, -np.dot(axis, centre), -np.dot(longer, centre)]
        self._rows = torch.tensor(np.array(rows), dtype=torch.float32)
        self._shift = torch.tensor(np.array(shift), dtype=torch.float32)

    def place(self, target: str) -> Tensor:
        """The rigid transform [4, 4] from the target plane's probe frame to the heart frame, mm."""
        length, far = self.size["lv_length"], self.size["skin_to_heart"] + 8.0
        axis = np.array([0.0, 0.0, 1.0])
        u = np.array([0.5, 0.87, 0.0]) / math.hypot(0.5, 0.87)  # parasternal beam: to inferolateral
        side, front = np.array([u[1], -u[0], 0.0]), far + 28 + self.a0  # behind the right ventricle
        look, right, point, depth = {
            "a4c": (axis, np.array([1.0, 0, 0]), np.array([-3.0, 0, 0]), far),
            "plax": (u, axis, axis * (length - 8) - u * 4, front),
            "psax-mv": (u, side, axis * (length - 9), front),
            "psax-av": (u, side, np.array([-4.0, 0, self.aortic[0][2] + 4]), front),
        }[target]
        frame = np.eye(4)
        frame[:3, 0], frame[:3, 1], frame[:3, 2] = right, np.cross(look, right), look
        frame[:3, 3] = point - look * depth
        tie = torch.tensor(self.ties[target], dtype=torch.float64)
        return torch.from_numpy(frame) @ poses.to_matrix(tie)

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

    def motion(self, x: Tensor, y: Tensor, z: Tensor, squeeze: Tensor) -> tuple[Tensor, ...]:
        """The material (end-diastolic) coordinates, mm, seen at heart-frame points x, y, z.

        The base descends by `descent`, and rings of muscle keep their area, so that walls thicken.
        """
        length, hold = self.size["lv_length"], self.size["la_length"] + 8.0
        drop = self.size["descent"] * squeeze
        r2 = torch.addcmul(x * x, y, y)
        reach = self._reach(r2)
        first = z * (length / (length - drop))
        second = (z - (length - drop)).mul_(hold / (hold + drop)).add_(length)
        zr = torch.maximum(z, torch.minimum(first, second)).sub_(z)
        weight = 1 / (1 + (r2 * (1 / 75**2)) ** 2)
        zr = torch.addcmul(z, zr, weight)
        a2 = ((zr - self.zc) * (1 / self.zc)).square_().neg_().add_(1).clamp_(min=0)
        a2 = a2.mul_(reach).mul_(squeeze * (self.kappa * self.a0**2))
        scale = a2.div_(r2.add_(1.0)).add_(1).sqrt_()
        return x * scale, y * scale, zr

    def scene(
        self, heart: Tensor, chest: Tensor, phase: Tensor, near: int, without: str | None = None
    ) -> Scene:
        """What lies at points of the heart frame and the chest frame, both [N, 3, ..., D] mm.

        phase [N]; `near`: samples of the last axis deep enough to hold the chest wall. `without`
        leaves out one structure: what lies behind it in the order of painting takes its place.
        """
        shape, n = heart.shape[2:], heart.shape[0]
        flat = heart.flatten(2)
        squeeze, mitral, aortic = (v[:, None].to(flat) for v in self.beat(phase.double()))
        x, y, z = self.motion(*flat.unbind(1), squeeze)
        material = (x, y, z)
        w = [
            torch.sin(x * k[0] + y * k[1] + (z * k[2] + o))
            for k, o in zip(self.waves.tolist(), self.wave_phase.tolist(), strict=True)
        ]
        texture = w[0] * w[1]
        x, y, z = (c + 1.6 * v for c, v in zip((x, y, z), w, strict=True))
        points = torch.stack((x, y, z), 1)
        rows, shift = self._rows.to(flat), self._shift.to(flat)
        forms = torch.baddbmm(shift[None, :, None], rows.expand(n, -1, -1), points)
        r2 = torch.addcmul(x * x, y, y)
        p2 = torch.addcmul(r2, z, z)
        forms, blob, tube = iter(forms.unbind(1)), {}, {}
        for name, (_, radii) in self.ellipsoids.items():
            k = next(forms).square_()
            k = k.addcmul_(*[next(forms)] * 2)
            blob[name] = k.addcmul_(*[next(forms)] * 2).sqrt_().sub_(1).mul_(sum(radii) / 3)
        for name, (start, end, radius) in self.tubes.items():
            q, d2 = next(forms), next(forms).add_(p2)
            t = q.clamp(0, float(np.linalg.norm(np.subtract(end, start))))
            d2.addcmul_(t, q.mul_(-2).add_(t))
            tube[name] = d2.clamp_(min=0).sqrt_().sub_(radius)

        s, length = self.size, self.size["lv_length"]
        radius = r2.sqrt()
        k0 = torch.addcmul(r2 / self.a0**2, *[(z - self.zc) * (1 / self.zc)] * 2)
        k1 = torch.addcmul(r2 / self.a0**4, *[(z - self.zc) * (1 / self.zc**2)] * 2)
        cavity = k0.sqrt_()
        cavity = cavity * (cavity - 1) / k1.sqrt_().add_(1e-4)
        beyond = z - length  # over the mitral plane
        cos = (x * 0.94 + y * 0.34) / (radius + 4)  # +1 lateral, -1 septal
        # Thin at the apex; the septum a little thinner than the free wall.
        thick = (z * (0.6 / length)).clamp_(0, 0.45).add_(0.55).mul_(s["wall"])
        thick = thick * (cos * 0.07 + 0.97)
        epi = cavity - thick
        wall = torch.maximum(epi, beyond - 3)
        # Muscle ends 3 mm over the mitral plane; the opening reaches through it.
        lv = torch.maximum(torch.minimum(cavity, tube["lvot"]), beyond - 3.2)
        plane_t = beyond + s["tricuspid_offset"] + (x + 28) * 0.1
        rv = _smooth_min(blob["rv"] + (squeeze * 2.5), tube["rvot"] + squeeze, 6.0)
        rv_in = torch.maximum(rv, torch.minimum(plane_t, y + 24 + (x + 30) * 0.3))
        la = _smooth_min(blob["la"] - squeeze * 1.5, blob["la_lobe"], 8.0)
        la_in = torch.minimum(la, torch.minimum(tube["vein_1"], tube["vein_2"]))
        la_in = torch.maximum(la_in, -beyond)
        ra = _smooth_min(blob["ra"] - squeeze, blob["ra_lobe"], 8.0)
        cava = torch.minimum(tube["svc"], tube["ivc"])
        root = torch.maximum(tube["aorta"], -(beyond + 2))
        ra_in = torch.maximum(
            torch.maximum(torch.minimum(ra, cava), -plane_t), 2.4 - torch.minimum(la, root - 0.5)
        )
        la_in = torch.maximum(la_in, 2.2 - root)
        hull = torch.minimum(epi, torch.minimum(rv - 3.2, torch.minimum(la - 2.2, ra - 2.4)))
        hull = _smooth_min(hull, torch.maximum(tube["sinus"] - 4, tube["sinus"]), 6.0)

        label = torch.full_like(x, LABEL["mediastinum"], dtype=torch.uint8)

        def paint(name: str, inside: Tensor) -> None:
            if name != without:
                label.masked_fill_(inside, LABEL[name])

        # Lung: its lingula beside the heart, nearer above; behind the heart; above it.
        side = self.lingula - x + z.clamp(min=-12) * 0.56 + y * 0.3
        lung = torch.minimum(torch.minimum(side, 68 + length - z - y * 0.1), y + 62)
        liver = blob["liver"]
        border = torch.minimum(lung.abs(), liver.abs())
        paint("lung", lung < 0)
        paint("liver", liver < 0)
        vessel = tube["descending"]
        walls = torch.minimum(torch.minimum(vessel, cava) - 1.2, hull)
        paint("heart_wall", walls < 0)
        paint("pericardium", (hull - 0.9).abs() < 0.9)
        paint("aorta", vessel < 0)
        paint("right_atrium", torch.minimum(ra_in, tube["sinus"]) < 0)
        paint("right_ventricle", rv_in < 0)
        paint("left_atrium", la_in < 0)
        muscle = wall < 0
        paint("myocardium", muscle & (cos > -0.45))
        paint("septum", muscle & (cos <= -0.45))
        paint("myocardium", (tube["band"] < 0) & (rv_in < 0))
        paint("left_ventricle", lv < 0)
        paint("heart_wall", (root - 1.6 < 0) & (lv > 0))
        paint("aorta", root < 0)
        pap = torch.minimum(tube["pap_1"], tube["pap_2"])
        paint("papillary_muscles", pap < 0)
        valves = self._leaflets(forms, p2, mitral, aortic)
        for name in VALVES:
            paint(name, valves[name] < 0)
        lumens = {
            "left_ventricle": torch.maximum(lv, -pap),
            "right_ventricle": rv_in,
            "left_atrium": la_in,
            "right_atrium": ra_in,
            "aorta": torch.minimum(root, vessel),
        }
        blood = reduce(torch.minimum, [d for name, d in lumens.items() if name != without])
        hull = hull if without != "pericardium" else hull.abs() + 50

        label = label.unflatten(1, shape)
        self._chest(chest, near, label, without)
        depth = (cavity / thick).clamp_(0, 1)
        return Scene(
            label,
            *(v.unflatten(1, shape) for v in (blood, hull, border, depth, texture)),
            tuple(v.unflatten(1, shape) for v in material),
        )

    def _leaflets(
        self, forms: Iterator[Tensor], p2: Tensor, mitral: Tensor, aortic: Tensor
    ) -> dict[str, Tensor]:
        """Distances to the leaflets: in each half-plane through a valve's axis, one segment.

        It runs from the hinge on the annulus into the ventricle (mitral, tricuspid) or the root
        (aortic), and swings between closed (edges meet on the axis) and open.
        """
        found = {}
        for name, (_, _, ring, _, uneven) in self.valves.items():
            r, h, side = next(forms).add_(p2), next(forms), next(forms)
            r = r.addcmul_(h, h, value=-1).clamp_(min=0).sqrt_()
            hinge = side.div_(r + 1).mul_(ring * uneven).add_(ring)
            angle = 0.42 + (aortic if name == "aortic_valve" else mitral) * 0.85
            ca, sa = torch.cos(angle), torch.sin(angle)
            inward = hinge - r
            along = torch.addcmul(inward * ca, h, sa)
            t = torch.minimum(along.clamp(min=0), hinge.mul_(0.93 / math.cos(0.42)))
            # A belly: the closed leaflet bows towards the chamber it shuts off.
            bow = t / hinge
            bow = bow.addcmul_(bow, bow, value=-1).mul_(5.0)
            off = bow.addcmul_(h, ca).addcmul_(inward, sa, value=-1).square_()
            gap = along.sub_(t).square_().add_(off).sqrt_()
            found[name] = gap.sub_(0.75 if name == "aortic_valve" else 0.95)
        return found

    def _chest(self, chest: Tensor, near: int, label: Tensor, without: str | None) -> None:
        """Paint chest wall and ribs over `label` [..., D], at its first `near` samples."""
        x, y, z = chest[..., :near].unbind(1)
        z = z - self.skin(x, y)
        view = label[..., :near]
        if without != "chest_wall":
            view.masked_fill_(z < self.size["skin_to_heart"] - 1.5, LABEL["chest_wall"])
        if without != "ribs":
            view.masked_fill_(self.rib_distance(x, y, z) < 0, LABEL["ribs"])

    def skin(self, x: Tensor, y: Tensor) -> Tensor:
        """Depth, mm, of the skin over a chest-frame point: a dome with slow ripples."""
        return (x * x + 1.4 * y * y) * (1 / 260) + 0.05 * x

    def rib_distance(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """Distance, mm, to the nearer of the two ribs that bound the intercostal window."""
        angle, gap = math.radians(self.size["rib_angle"]), self.size["rib_gap"]
        across = y * math.cos(angle) - x * math.sin(angle)
        deep = (z - (self.size["skin_to_heart"] - 6.5)) * 1.25
        sides = [torch.hypot(across - gap - 0.8, deep), torch.hypot(across + gap, deep)]
        return torch.minimum(*sides) - 5.5

    def surface(self, structure: str, points: int = 2000, phase: float = 0.0) -> np.ndarray:
        """Points [points, 3], mm in the heart frame, on a structure's border. For drawing.

        Raises ValueError if the structure is unknown or bounds nothing near the heart.
        """
        if structure not in LABEL:
            raise ValueError(f"structure {structure!r} is unknown; one of {', '.join(STRUCTURES)}")
        step = 2.0
        axes = [torch.arange(lo, hi, step) for lo, hi in ((-95, 70), (-75, 75), (-15, 150))]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))
        chest = torch.full_like(grid, 500.0)
        label = self.scene(grid[None], chest[None], torch.tensor([phase]), 1).label[0]
        inside = (label == LABEL[structure]).float()[None, None]
        edge = (inside > 0) & (-torch.nn.functional.max_pool3d(-inside, 3, 1, 1) == 0)
        found = grid[:, edge[0, 0]].T
        if not len(found):
            raise ValueError(f"structure {structure!r} has no border near the heart")
        rng = np.random.default_rng(0)
        chosen = rng.choice(len(found), points, replace=len(found) < points)
        return found.numpy()[chosen] + rng.uniform(-step / 2, step / 2, (points, 3))
