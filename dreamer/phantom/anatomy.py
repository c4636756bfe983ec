"""The heart of a virtual patient: implicit shapes that beat.

Heart frame, mm: origin at the endocardial apex of the left ventricle, z along its long axis to the
mitral annulus, x to the lateral wall, y to the inferior wall. Two more axes belong to the
parasternal window: `deep`, from the chest to the inferolateral wall, and `side`, to the right of a
short-axis image. All shapes are given at end diastole; `motion` maps a point of the beating heart
to the material point it shows, so that shapes, muscle and speckle move together.

Septal and free-wall muscle have the same fibres: +60 degrees at the endocardium to -60 at the
epicardium (Streeter et al., Circ Res 1969;24:339-347). Leaflet lengths: anterior mitral 22 to 25
mm, posterior 10 to 14 mm (Lang et al. 2015, see `patient`); other shapes are our choice.
"""

import math
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

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
    "interatrial_septum",
    "pulmonary_valve",
    "pulmonary_artery",
    "descending_aorta",
    "chordae",
)
LABEL = {name: number for number, name in enumerate(STRUCTURES, 1)}  # 0 is outside the sector
TARGETS = {  # the names in the literature
    "a4c": "apical four-chamber",
    "plax": "parasternal long axis",
    "psax-av": "parasternal short axis, aortic valve",
    "psax-mv": "parasternal short axis, mitral valve",
}
CUSP_HEIGHT = 12.0  # mm, from the nadir of an aortic cusp to its closure
FAR = 50.0  # mm, a distance at which nothing is drawn


@dataclass(frozen=True)
class Measures:
    """What is drawn of a patient, in mm but for `ejection_fraction` and `rib_angle` (degrees)."""

    lv_diameter: float
    lv_length: float
    wall: float
    ejection_fraction: float
    descent: float  # of the mitral annulus in systole
    rv_basal: float
    rv_length: float
    tricuspid_offset: float  # tricuspid annulus nearer to the apex than the mitral one
    la_length: float
    la_width: float
    ra_length: float
    ra_width: float
    aortic_sinus: float
    skin_to_heart: float
    rib_gap: float
    rib_angle: float
    lung_edge: float  # how far the lung's edge lies from the apex


class Scene(NamedTuple):
    """Fields over sample points, all of one shape.

    `label` uint8 (1 + index in STRUCTURES); signed distances in mm, below zero inside: `blood`
    (any lumen), `heart` (outer surface), `border` (lung or liver). `depth` is 0 at the endocardium
    and 1 at the epicardium, `texture` a slow variation about zero, `skeleton` 1 and up to 2 at the
    fibrous rings of the valves; `material` coordinates, mm.
    """

    label: Tensor
    blood: Tensor
    heart: Tensor
    border: Tensor
    depth: Tensor
    texture: Tensor
    skeleton: Tensor
    material: tuple[Tensor, Tensor, Tensor]


class Ellipsoid(NamedTuple):
    """Where `rows` @ point + `shift` has length 1; `radius`, mm, scales it to a distance."""

    rows: NDArray[np.float64]
    shift: NDArray[np.float64]
    radius: float


class Tube(NamedTuple):
    start: NDArray[np.float64]
    end: NDArray[np.float64]
    radius: float


class Valve(NamedTuple):
    """Two leaflets that meet in a straight line, or three cusps, mm.

    `axis` points where the blood goes, `across` at right angles to the line in which the leaflets
    meet; the annulus is an ellipse with half-axes `half_width` (across) and `half_length`.
    `meeting`: where they meet, from the centre; `tent`: how far down the axis.
    """

    centre: NDArray[np.float64]
    axis: NDArray[np.float64]
    across: NDArray[np.float64]
    half_width: float
    half_length: float
    meeting: float = 0.0
    tent: float = 0.0
    thickness: float = 1.0


def unit(vector: ArrayLike) -> NDArray[np.float64]:
    vector = np.asarray(vector, float)
    return vector / np.linalg.norm(vector)


def ellipsoid(centre: ArrayLike, radii: ArrayLike) -> Ellipsoid:
    centre, radii = np.asarray(centre, float), np.asarray(radii, float)
    return Ellipsoid(np.diag(1 / radii), -centre / radii, float(radii.mean()))


def smooth_min(a: Tensor, b: Tensor, k: float) -> Tensor:
    """Union of two distances, rounded over `k` mm (polynomial smooth minimum)."""
    h = (k - (a - b).abs()).clamp_(min=0)
    return torch.minimum(a, b).sub_(h.mul_(h).mul_(0.25 / k))


class LinearForms:
    """Linear forms of a point, kept by name, all evaluated in one matrix product."""

    def __init__(self):
        self.rows, self.shift, self.place = [], [], {}

    def add(self, name: str, rows: ArrayLike, shift: ArrayLike) -> None:
        self.place[name] = slice(len(self.rows), len(self.rows) + len(rows))
        self.rows += list(rows)
        self.shift += list(shift)

    def add_tube(self, name: str, tube: Tube) -> None:
        along = unit(tube.end - tube.start)
        shift = [-along @ tube.start, tube.start @ tube.start]
        self.add(name, [along, -2 * tube.start], shift)

    def at(self, points: Tensor) -> dict[str, Tensor]:
        """Values [N, rows, P] by name at homogeneous points [N, 4, P] (x, y, z, 1)."""
        matrix = np.column_stack((np.array(self.rows), self.shift))
        values = torch.matmul(torch.tensor(matrix).to(points), points)
        return {name: values[:, place] for name, place in self.place.items()}


def tube_distance(forms: Tensor, square: Tensor, tube: Tube) -> Tensor:
    """Distance to a tube from its two forms and the points' squared distance to the origin."""
    along, start = forms.unbind(1)
    inside = along.clamp(0, float(np.linalg.norm(tube.end - tube.start)))
    apart = (square + start).addcmul_(inside, inside - 2 * along)
    return apart.clamp_(min=0).sqrt_().sub_(tube.radius)


def two_leaflets(
    across: Tensor, along: Tensor, height: Tensor, opening: Tensor, valve: Valve
) -> Tensor:
    """Distance to two leaflets that swing about the annulus, at points in the valve's own axes."""
    chord = (1 - (along / valve.half_length) ** 2).clamp(min=1e-4).sqrt()
    found = []
    for sign in (-1, 1):
        reach = valve.half_width - sign * valve.meeting
        closed, opened = math.atan2(valve.tent, reach), 1.3
        length = chord * (math.hypot(reach, valve.tent) + 1.0)
        angle = closed + opening * (opened - closed)
        cos, sin = torch.cos(angle), torch.sin(angle)
        inward = chord * valve.half_width - sign * across
        down = inward * cos + height * sin
        part = torch.minimum(down.clamp(min=0), length)
        belly = part / length
        off = height * cos - inward * sin + 6.0 * belly * (1 - belly)
        found.append(torch.hypot(down - part, off))
    outside = (along.abs() - valve.half_length).clamp(min=0)
    return torch.minimum(*found) + outside - valve.thickness


def three_cusps(
    across: Tensor, along: Tensor, height: Tensor, opening: Tensor, valve: Valve
) -> Tensor:
    """Distance to three cusps that close in a three-pointed star, in the valve's own axes."""
    facing = [
        across * math.cos(angle) + along * math.sin(angle)
        for angle in (math.pi + 0.25, 0.25 + math.pi / 3, 0.25 - math.pi / 3)
    ]
    middle = reduce(torch.maximum, facing)
    beside = (across**2 + along**2 - middle**2).clamp(min=0).sqrt()
    inward = 0.866 * middle - 0.5 * beside  # distance from the closure lines
    wall = 0.866 * valve.half_width
    edge = opening * (0.72 * wall)
    slope = torch.hypot(wall - edge, torch.full_like(edge, CUSP_HEIGHT))
    cos, sin = (wall - edge) / slope, CUSP_HEIGHT / slope
    up = (wall - inward) * cos + height * sin
    part = torch.minimum(up.clamp(min=0), slope)
    off = height * cos - (wall - inward) * sin
    belly = torch.hypot(up - part, off + 5.0 * (part / slope) * (1 - part / slope))
    closure = torch.hypot(inward - edge, height - height.clamp(CUSP_HEIGHT - 6, CUSP_HEIGHT))
    return torch.minimum(belly, closure) - valve.thickness


class Heart:
    """The shapes of one heart, made from its measures and a random generator."""

    deep = unit([0.5, math.sqrt(0.75), 0.0])
    side = unit([math.sqrt(0.75), -0.5, 0.0])

    def __init__(self, size: Measures, rng: np.random.Generator):
        self.size = size
        # Slow waves, 1 / mm, that make every shape irregular.
        self.waves = np.clip(rng.normal(0, 1, (3, 3)), -1.6, 1.6) * 2 * math.pi / 90
        self.wave_phase = rng.uniform(0, 2 * math.pi, 3)
        self.radius, self.centre = size.lv_diameter / 2, 0.58 * size.lv_length
        self.epicardium = self.radius + size.wall
        self.front = self.epicardium + 0.62 * size.rv_basal + 4  # heart's surface to its axis, mm
        squeeze = 1 - size.descent / size.lv_length
        self.shrink2 = 0.89 * (1 - size.ejection_fraction) / squeeze  # 0.89: the base narrows less
        reach = 1 / (1 + (self.shrink2 * self.radius**2 / 45**2) ** 2)
        self.kappa = (1 - self.shrink2) / reach
        self._valves()
        self._chambers(rng)
        self._forms()

    def at(self, deep: float, side: float, z: float) -> NDArray[np.float64]:
        """A point given along the axes of the parasternal window."""
        return self.deep * deep + self.side * side + [0, 0, z]

    def _valves(self) -> None:
        size, length = self.size, self.size.lv_length
        base = self.radius * math.sqrt(1 - ((length - self.centre) / self.centre) ** 2)
        annulus = 0.36 * size.aortic_sinus  # radius of the aortic annulus
        mitral_width, self.mitral_shift = 0.9 * base, 0.16 * base
        aortic = self.at(self.mitral_shift - mitral_width - annulus + 2.5, 0.0, length + 1)
        root = unit(self.at(-0.30, -0.20, 0.92))
        self.annulus, self.sinus = annulus, size.aortic_sinus / 2
        self.junction = 0.44 * size.aortic_sinus
        crux, tricuspid = -(base + 0.85 * size.wall), length - size.tricuspid_offset
        self.crux = crux
        ring = 0.48 * size.rv_basal
        self.inlet = unit([0.12, 0.5, 1.0])  # normal of the tricuspid annulus, towards the atrium
        hinge = np.array([crux - 1, 6.0, tricuspid])
        self.inlet_shift = float(self.inlet @ hinge)
        middle = np.array([crux - 1 - ring, 2.0, 0.0])
        middle[2] = (self.inlet_shift - self.inlet[:2] @ middle[:2]) / self.inlet[2]
        pulmonary = self.at(aortic @ self.deep - self.sinus - 11.0, 19.0, length + 8)
        trunk = unit(self.at(0.88, 0.16, 0.42))
        self.valves = {
            "mitral_valve": Valve(
                self.deep * self.mitral_shift + [0, 0, length], np.array([0, 0, -1.0]), self.deep,
                mitral_width, 1.2 * base, 0.28 * mitral_width, 6.0,
            ),
            "tricuspid_valve": Valve(
                middle, -self.inlet, np.array([-1.0, 0, 0.12]) / math.hypot(1, 0.12), ring, 18.0,
                -0.25 * ring, 4.0, 0.9,
            ),
            "aortic_valve": Valve(
                aortic, root, unit(self.deep - root * (root @ self.deep)), annulus, annulus,
                thickness=0.75,
            ),
            "pulmonary_valve": Valve(
                pulmonary, trunk, unit(self.side - trunk * (trunk @ self.side)), 11.5, 11.5, 0.0,
                5.0, 0.75,
            ),
        }  # fmt: skip

    def _chambers(self, rng: np.random.Generator) -> None:
        size, length = self.size, self.size.lv_length
        tricuspid = length - size.tricuspid_offset
        shift = np.clip(rng.standard_normal(4), -2, 2)
        # The right ventricle wraps the septum: an ellipsoid that leans towards the apex.
        out, beside = unit([-0.94, -0.34, 0.0]), unit([-0.34, 0.94, 0.0])
        lean, offset = 0.24, 0.64 * self.epicardium + shift[0]
        radii = np.array([size.rv_basal + 7.0, 1.06 * self.epicardium, 0.73 * size.rv_length])
        rows = np.array([out - [0, 0, lean], beside, [0, 0, 1.0]]) / radii[:, None]
        point = out * offset + [0, 0, tricuspid - 8]
        middle = np.array([rows[0] @ point, 0.0, (tricuspid - 0.27 * size.rv_length) / radii[2]])
        la, ra, crux = size.la_width / 2, size.ra_width / 2, self.crux
        aorta, trunk = self.valves["aortic_valve"], self.valves["pulmonary_valve"]
        self.ellipsoids = {
            "rv": Ellipsoid(rows, -middle, float(radii.mean())),
            "inflow": ellipsoid((crux - 0.5 * size.rv_basal, 1, tricuspid - 10),
                                (0.55 * size.rv_basal, 19, 27)),
            "la": ellipsoid((crux + 0.80 * la + 2, 8 + shift[1], length + 0.36 * size.la_length),
                            (1.20 * la, 0.88 * la, 0.64 * size.la_length)),
            "ra": ellipsoid((crux - 0.86 * ra, 3 + shift[2], tricuspid + 0.36 * size.ra_length),
                            (1.18 * ra, 1.1 * ra, 0.64 * size.ra_length)),
            "liver": ellipsoid((-52 + 3 * shift[3], 118, 42), (88, 88, 88)),
        }  # fmt: skip
        wall, back = self.epicardium, self.at(self.epicardium + 14, -6 + 2 * shift[3], length + 14)
        down = unit(self.at(0.05, 0.58, 0.81))
        self.tubes = {
            "outlet": Tube(aorta.centre - aorta.axis * 9, aorta.centre, self.annulus + 0.5),
            "rvot": Tube(self.at(-0.86 * wall - 12, -26, length - 10), trunk.centre, 13.5),
            "trunk": Tube(trunk.centre, trunk.centre + trunk.axis * 42, 12.0),
            "descending": Tube(back - down * 90, back + down * 90, 11.0),
            "band": Tube(np.array([-wall, -2, 0.42 * length]),
                         np.array([-wall - 26, -14, 0.55 * length]), 2.2),
        }  # fmt: skip
        # Papillary muscles stand on the wall and shrink with the cavity, in its relative frame.
        tips = {"anterolateral": (0.45, 0.89), "posteromedial": (0.60, -0.80)}
        self.papillary, self.cords = {}, {}
        for name, (deep, side) in tips.items():
            root = self.at(0.92 * self.radius * deep, 0.92 * self.radius * side, 0.33 * length)
            tip = self.at(0.56 * self.radius * deep, 0.56 * self.radius * side, 0.60 * length)
            self.papillary[name] = Tube(root, tip, 4.2)
            for k, edge in enumerate((0.0, 9.0)):
                leaf = self.at(self.mitral_shift + edge - 1, side * 9.0, length - 9.0)
                self.cords[f"{name}_{k}"] = Tube(tip, leaf, 0.55)

    def _forms(self) -> None:
        self.body, self.cavity, self.leaflets = LinearForms(), LinearForms(), LinearForms()
        for name, shape in self.ellipsoids.items():
            self.body.add(name, shape.rows, shape.shift)
        for name, tube in self.tubes.items():
            self.body.add_tube(name, tube)
        for name, valve in self.valves.items():
            forms = self.leaflets if name == "mitral_valve" else self.body
            rows = [valve.across, np.cross(valve.axis, valve.across), valve.axis]
            forms.add(name, rows, [-row @ valve.centre for row in rows])
        rows = [self.inlet, self.deep, [0.95, 0.3, 0.0]]
        self.body.add("planes", rows, [-self.inlet_shift, 0.0, 0.0])
        for name, tube in (self.papillary | self.cords).items():
            self.cavity.add_tube(name, tube)

    def motion(self, x: Tensor, y: Tensor, z: Tensor, squeeze: Tensor) -> tuple[Tensor, ...]:
        """The material (end-diastolic) coordinates, mm, seen at heart-frame points x, y, z.

        The base descends by `descent`, and rings of muscle keep their area, so that walls thicken.
        """
        length, hold = self.size.lv_length, self.size.la_length + 8.0
        drop = self.size.descent * squeeze
        r2 = torch.addcmul(x * x, y, y)
        reach = 1 / (1 + (r2 * (1 / 45**2)) ** 2)
        first = z * (length / (length - drop))
        second = (z - (length - drop)).mul_(hold / (hold + drop)).add_(length)
        zr = torch.maximum(z, torch.minimum(first, second)).sub_(z)
        weight = 1 / (1 + (r2 * (1 / 75**2)) ** 2)
        zr = torch.addcmul(z, zr, weight)
        a2 = ((zr - self.centre) * (1 / self.centre)).square_().neg_().add_(1).clamp_(min=0)
        # The annulus narrows less than the middle.
        a2.mul_(((length + 8 - zr) * (1 / 24)).clamp_(0.33, 1))
        a2 = a2.mul_(reach).mul_(squeeze * (self.kappa * self.radius**2))
        scale = a2.div_(r2.add_(1.0)).add_(1).sqrt_()
        return x * scale, y * scale, zr

    def scene(
        self, points: Tensor, beat: tuple[Tensor, Tensor, Tensor], without: frozenset[str]
    ) -> Scene:
        """What lies at heart-frame points [N, 3, ..., D] mm; `beat` as from `Patient.beat`, [N]."""
        shape, flat = points.shape[2:], points.flatten(2)
        squeeze, mitral, aortic = (v[:, None].to(flat) for v in beat)
        material = self.motion(*flat.unbind(1), squeeze)
        x, y, z = material
        wave = [
            torch.sin(x * k[0] + y * k[1] + (z * k[2] + phase))
            for k, phase in zip(self.waves.tolist(), self.wave_phase.tolist(), strict=True)
        ]
        texture = wave[0] * wave[1]
        x, y, z = (axis + 1.6 * shift for axis, shift in zip(material, wave, strict=True))
        forms = self.body.at(torch.stack((x, y, z, torch.ones_like(x)), 1))
        r2 = torch.addcmul(x * x, y, y)
        square = torch.addcmul(r2, z, z)
        blob = {
            name: forms[name].square().sum(1).sqrt_().sub_(1).mul_(shape_.radius)
            for name, shape_ in self.ellipsoids.items()
        }
        tube = {name: tube_distance(forms[name], square, t) for name, t in self.tubes.items()}
        inlet, deep, lateral = forms["planes"].unbind(1)

        size, length = self.size, self.size.lv_length
        beyond = z - length  # the mitral plane
        flat_z = (z - self.centre) * (1 / self.centre)
        ring = torch.addcmul(r2 / self.radius**2, flat_z, flat_z).sqrt_()
        slope = torch.addcmul(r2 / self.radius**4, flat_z, flat_z / self.centre**2)
        cavity = ring * (ring - 1) / slope.sqrt_().add_(1e-4)
        thick = (z * (0.6 / length)).clamp_(0, 0.45).add_(0.55).mul_(size.wall)  # thin at the apex
        trunk_height = forms["pulmonary_valve"][:, 2]
        root_across, root_along, root_height = forms["aortic_valve"].unbind(1)
        narrow = (root_height * (-1 / 7)).clamp_(0, 1).mul_(squeeze * 8.0)  # in systole
        outlet = torch.maximum(tube["outlet"] + narrow, root_height - 1)
        # Muscle runs on from the septum to the aortic annulus.
        epi = smooth_min(cavity - thick, outlet - 0.75 * thick, 12.0)
        wall = torch.maximum(epi, torch.minimum(beyond - 2.5, outlet - 0.75 * thick))
        lv = torch.maximum(smooth_min(cavity, outlet, 12.0), torch.minimum(beyond - 2.7, outlet))
        root = self._root(root_across, root_along, root_height)
        body = smooth_min(blob["rv"] + squeeze * 2.5, blob["inflow"] + squeeze * 1.5, 8.0)
        outflow = torch.maximum(tube["rvot"] + squeeze * 2, trunk_height)
        rv = smooth_min(torch.maximum(body, inlet), outflow, 5.0)
        trunk = torch.maximum(tube["trunk"], -trunk_height)
        # Both atria share a thin septum that starts at the crux.
        between = x - self.crux - beyond * 0.06 - 1.0
        la_whole = blob["la"] - squeeze * 1.5
        la = torch.maximum(torch.maximum(la_whole, -beyond), 1.1 - between)
        ra_whole = blob["ra"] - squeeze
        ra = torch.maximum(torch.maximum(ra_whole, -inlet), between + 1.1)
        great = torch.minimum(root, trunk) - 1.8
        la, ra = torch.maximum(la, -great), torch.maximum(ra, -great)
        atria = torch.minimum(la_whole, ra_whole) - 2.4
        hull = torch.minimum(epi, torch.minimum(torch.minimum(rv, body) - 3.4, atria))
        hull = smooth_min(hull, great, 4.0)

        label = torch.full_like(x, LABEL["mediastinum"], dtype=torch.uint8)

        def paint(name: str, inside: Tensor) -> None:
            if name not in without:
                label.masked_fill_(inside, LABEL[name])

        # Lung: beside the heart, nearer above; behind the heart; beyond the right atrium.
        edge = size.lung_edge + z.clamp(min=-12) * 0.56 - lateral
        behind = (self.epicardium + 4) + beyond.clamp(min=0) * 0.25 - deep
        lung = torch.minimum(torch.minimum(edge, behind), x + 84)
        liver = blob["liver"]
        paint("lung", lung < 0)
        paint("liver", liver < 0)
        vessel = tube["descending"]
        paint("heart_wall", torch.minimum(hull, vessel - 1.5) < 0)
        paint("pericardium", (hull - 0.9).abs() < 0.9)
        paint("descending_aorta", vessel < 0)
        shared = (between.abs() < 1.1) & (la_whole < 0) & (ra_whole < 0) & (beyond > 0)
        paint("interatrial_septum", shared)
        paint("right_atrium", ra < 0)
        paint("right_ventricle", rv < 0)
        paint("left_atrium", la < 0)
        paint("heart_wall", great < 0)
        muscle = wall < 0
        septal = (x * 0.94 + y * 0.34) < -0.35 * r2.sqrt()
        paint("myocardium", muscle & ~septal)
        paint("septum", muscle & septal)
        paint("myocardium", (tube["band"] < 0) & (rv < 0))
        paint("left_ventricle", lv < 0)
        paint("pulmonary_artery", trunk < 0)
        paint("aorta", root < 0)
        inside = torch.minimum(lv, la)
        papillary = self._cavity(flat, (x, y, z), material, squeeze, mitral, inside, label, without)
        openings = {"tricuspid_valve": mitral, "aortic_valve": aortic, "pulmonary_valve": aortic}
        for name, opening in openings.items():
            if name not in without:
                lumen = root if name == "aortic_valve" else None
                self._leaflets(name, forms[name], opening, lumen, label)
        lumens = {
            "left_ventricle": torch.maximum(lv, -papillary),
            "right_ventricle": torch.maximum(rv, -epi),
            "left_atrium": la,
            "right_atrium": ra,
            "aorta": root,
            "pulmonary_artery": trunk,
            "descending_aorta": vessel,
        }
        kept = [distance for name, distance in lumens.items() if name not in without]
        blood = reduce(torch.minimum, kept) if kept else torch.full_like(x, FAR)
        border = torch.full_like(x, FAR)
        for name, distance in (("lung", lung), ("liver", liver)):
            if name not in without:
                border = torch.minimum(border, distance.abs())
        border = torch.maximum(border, 2.0 - vessel)
        hull = hull if "pericardium" not in without else hull.abs() + FAR
        depth = (cavity / thick).clamp_(0, 1)
        skeleton = ((beyond + 3) * (1 / 6)).square_().clamp_(max=40).neg_().exp_().add_(1)
        fields = (label, blood, hull, border, depth, texture, skeleton)
        unflat = (field.unflatten(1, shape) for field in fields)
        return Scene(*unflat, tuple(axis.unflatten(1, shape) for axis in material))

    def _root(self, across: Tensor, along: Tensor, height: Tensor) -> Tensor:
        """Aortic root: annulus, three sinuses, the sinotubular junction, the ascending aorta."""
        r2 = torch.addcmul(across * across, along, along)
        bulge = ((height - 10) * (1 / 8)).square_().clamp_(max=40).neg_().exp_()
        profile = bulge.mul_(self.sinus - self.junction).add_(self.junction)
        profile = torch.minimum(profile, height.clamp(min=0) * 0.9 + self.annulus)
        return torch.maximum(r2.sqrt_() - profile, -height)

    def _cavity(
        self,
        flat: Tensor,
        wavy: tuple[Tensor, ...],
        material: tuple[Tensor, ...],
        squeeze: Tensor,
        mitral: Tensor,
        inside: Tensor,
        label: Tensor,
        without: frozenset[str],
    ) -> Tensor:
        """Paint what blood surrounds: papillary muscles, chordae, mitral leaflets.

        Blood near the axis has no material point at end diastole, so these live in the frame of
        the contracting wall. Returns the distance to the papillary muscles, mm.
        """
        length, z = self.size.lv_length, wavy[2]
        near = ((inside < 2) & (z > 0.25 * length) & (z < length + 9)).flatten().nonzero()[:, 0]
        papillary = torch.full_like(inside, FAR)
        if not len(near):
            return papillary
        frame = near // flat.shape[2]
        squeeze, mitral = squeeze[:, 0][frame], mitral[:, 0][frame]
        x, y = (flat[:, axis].reshape(-1)[near] for axis in range(2))
        bend = [(wavy[axis] - material[axis]).view(-1)[near] for axis in range(2)]
        z, inside, ones = z.reshape(-1)[near], inside.view(-1)[near], torch.ones_like(x)
        stretch = (1 - squeeze * (1 - self.shrink2)).rsqrt()
        forms = self.cavity.at(torch.stack((x * stretch, y * stretch, z, ones))[None])
        square = ((x * stretch) ** 2 + (y * stretch) ** 2 + z * z)[None]
        shapes = {
            "chordae": [tube_distance(forms[name], square, t) for name, t in self.cords.items()],
            "papillary_muscles": [
                tube_distance(forms[name], square, t) for name, t in self.papillary.items()
            ],
        }
        found = {name: reduce(torch.minimum, parts)[0] for name, parts in shapes.items()}
        papillary.view(-1)[near] = found["papillary_muscles"]
        annulus = 1 + 0.16 * squeeze  # how much narrower the annulus is in systole
        points = torch.stack((x * annulus + bend[0], y * annulus + bend[1], z, ones))
        forms = self.leaflets.at(points[None])["mitral_valve"][0]
        found["mitral_valve"] = two_leaflets(*forms, mitral, self.valves["mitral_valve"])
        found["papillary_muscles"] = torch.maximum(found["papillary_muscles"], inside - 2)
        for name, distance in found.items():
            if name not in without:
                label.view(-1)[near[distance < 0]] = LABEL[name]
        return papillary

    def _leaflets(
        self, name: str, forms: Tensor, opening: Tensor, lumen: Tensor | None, label: Tensor
    ) -> None:
        """Paint one valve, computed only at the points that it can reach."""
        valve, (across, along, height) = self.valves[name], forms.unbind(1)
        reach = max(valve.half_width, valve.half_length) + 6
        near = (height.abs() < 27) & (across.abs() < reach) & (along.abs() < valve.half_length + 1)
        if lumen is not None:
            near &= lumen < 0.5
        near = near.flatten().nonzero()[:, 0]
        if not len(near):
            return
        across, along, height = (form.reshape(-1)[near] for form in (across, along, height))
        opening = opening[:, 0][near // forms.shape[2]]
        model = three_cusps if name == "aortic_valve" else two_leaflets
        hit = model(across, along, height, opening, valve) < 0
        label.view(-1)[near[hit]] = LABEL[name]
