"""A B-mode picture of a virtual patient at a probe pose, and the truth that belongs to it.

Points of the image plane are sampled on a polar grid and carried into the patient. There, echo
strength multiplies a complex white scatterer field that is fixed to the tissue, which is blurred
by the point spread, detected, log-compressed and scan-converted. Fully developed speckle is then
Rayleigh: mean over standard deviation 1.91 (Wagner et al., IEEE Trans Sonics Ultrason 1983;30:156).
The scatterer field is looked up by the spatial hash of Teschner et al. (VMV 2003, equation 1).

Probe frame, mm: origin at the sector's tip, x to the picture's right, z down the middle beam, y out
of the picture. Roll fans the plane, pitch rocks it in itself, yaw turns it about the middle beam.
Fan geometry in pixels of a 224-pixel picture as in the published real scan; 160 mm deep.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dreamer import poses
from dreamer.phantom.anatomy import LABEL, STRUCTURES, TARGETS, Patient

APEX, RADIUS, HALF_ANGLE, DEPTH = (111.5, -1.0), 221.0, math.radians(30.7), 160.0
NEAR = 52.0  # mm: nothing of the chest wall lies deeper
GRID = 7  # cells of the occupancy grid, per side
SIZES = (32, 1024)
CHUNK = 130_000  # samples computed at once: few enough to stay near the core, many for one call
VOXEL = 0.6  # mm, edge of a scatterer's cell

# name: echo strength dB, attenuation left after time-gain compensation dB/cm
TISSUE = {
    "left_ventricle": (-62, -0.15),
    "right_ventricle": (-59, -0.15),
    "left_atrium": (-60, -0.15),
    "right_atrium": (-60, -0.15),
    "aorta": (-60, -0.15),
    "myocardium": (-40, 0.3),
    "septum": (-25.5, 0.3),
    "papillary_muscles": (-33, 0.3),
    "mitral_valve": (-27, 0.5),
    "tricuspid_valve": (-28, 0.5),
    "aortic_valve": (-27, 0.5),
    "heart_wall": (-35.5, 0.4),
    "pericardium": (-33, 0.8),
    "mediastinum": (-45, 0.9),
    "lung": (-42, 3.5),
    "liver": (-40, 0.5),
    "chest_wall": (-45, 0.5),
    "ribs": (-28, 28.0),
}
_MASK = 2**18 - 1


class Frames(NamedTuple):
    """`image` uint8 [..., S, S]; `label` uint8 [..., S, S], 0 outside the sector, else 1 + the
    index in STRUCTURES; `occupancy` float32 [..., structures, 7, 7], share of each cell's area."""

    image: Tensor
    label: Tensor
    occupancy: Tensor


def _grid(size: int) -> tuple[Tensor, Tensor]:
    """Beam angles (radians) and sample depths (mm) for pictures of `size` pixels."""
    beams, samples = 26 + round(0.3 * size), 50 + round(0.8 * size)
    theta = torch.linspace(-HALF_ANGLE, HALF_ANGLE, beams, dtype=torch.float64)
    return theta, torch.linspace(0, DEPTH, samples, dtype=torch.float64)


def _point_spread(theta: Tensor, r: Tensor, device) -> tuple[list[float], Tensor]:
    """Weights at offsets 0, 1, ...: a pulse of constant length, and per depth a beam that is
    narrowest at its focus; each gives white noise of unit power unit power again."""
    sigma = 0.75 / float(r[-1] / (len(r) - 1))
    reach = max(1, math.ceil(2.2 * sigma))
    pulse = torch.exp(-((torch.arange(reach + 1) / sigma) ** 2) / 2)
    norm = (pulse[0] ** 2 + 2 * (pulse[1:] ** 2).sum()).sqrt()
    step = math.degrees(2 * HALF_ANGLE / (len(theta) - 1))
    width = (0.85 + 0.9 * ((r - 75) / 85) ** 2) / step
    reach = max(1, math.ceil(2.2 * float(width.max())))
    taps = torch.exp(-((torch.arange(reach + 1)[:, None] / width) ** 2) / 2)
    taps = taps / (taps[0] ** 2 + 2 * (taps[1:] ** 2).sum(0)).sqrt()
    return (pulse / norm).tolist(), taps.float().to(device)


def _coherent(pulse: list[float], beam: Tensor) -> float:
    """What the point spread makes of a field of ones, halfway down."""
    middle = beam[:, beam.shape[1] // 2]
    return (pulse[0] + 2 * sum(pulse[1:])) * float(middle[0] + 2 * middle[1:].sum())


class Sector:
    """The polar grid, the point spread and the way to pixels for pictures of one size."""

    def __init__(self, size: int, device: torch.device):
        self.size, self.device = size, device
        self.theta, self.r = _grid(size)
        self.beams, self.samples = len(self.theta), len(self.r)
        self.dr = DEPTH / (self.samples - 1)
        self.near = min(self.samples, math.ceil(NEAR / self.dr))
        self.direction = torch.stack((self.theta.sin(), self.theta.cos())).float().to(device)
        depth = self.r.float().to(device)
        self.depth = depth
        points = self.direction[:, :, None] * depth
        self.points = torch.stack((points[0], torch.zeros_like(points[0]), points[1])).flatten(1)
        self.pulse, self.beam = _point_spread(self.theta, self.r, device)
        self.reach = len(self.beam) - 1
        # Smooth surfaces add up in phase, speckle does not: keep their ratio at every size.
        self.surface = _coherent(*_point_spread(*_grid(112), device)) / _coherent(
            self.pulse, self.beam
        )
        # Where samples lie closer than scatterers' cells, neighbours share one: no gain from that.
        both = torch.tensor(self.pulse[:0:-1] + self.pulse, dtype=torch.float64)
        apart = (
            torch.arange(len(both))[:, None] - torch.arange(len(both))
        ).abs().double() * self.dr
        alike = (1 - apart / VOXEL).clamp(min=0)
        self.tissue = 1.0 if self.dr >= VOXEL else float((both @ alike @ both) ** -0.5)
        self._pixels()
        self._noise()

    def _pixels(self) -> None:
        """Bilinear weights from the polar grid to the pixels inside the sector."""
        scale = self.size / 224
        row, column = torch.meshgrid(
            *[torch.arange(self.size, dtype=torch.float64)] * 2, indexing="ij"
        )
        dx = column - ((APEX[0] + 0.5) * scale - 0.5)
        dy = row - ((APEX[1] + 0.5) * scale - 0.5)
        r, theta = torch.hypot(dx, dy) * (DEPTH / (RADIUS * scale)), torch.atan2(dx, dy)
        inside = (r <= DEPTH) & (theta.abs() <= HALF_ANGLE) & (dy > 0)
        self.inside = inside.flatten().nonzero()[:, 0].to(self.device)
        fb = (theta[inside] + HALF_ANGLE) / (2 * HALF_ANGLE) * (self.beams - 1)
        fd = r[inside] / self.dr
        b = fb.floor().clamp(0, self.beams - 2)
        d = fd.floor().clamp(0, self.samples - 2)
        u, v = fb - b, fd - d
        base = (b * self.samples + d).long()
        corners = (
            (0, (1 - u) * (1 - v)),
            (1, (1 - u) * v),
            (self.samples, u * (1 - v)),
            (self.samples + 1, u * v),
        )
        self.corners = [((base + o).to(self.device), w.float().to(self.device)) for o, w in corners]
        nearest = (fb.round() * self.samples + fd.round()).long()
        self.nearest = nearest.to(self.device)
        cell = torch.arange(self.size) * GRID // self.size
        cell = cell[:, None] * GRID + cell
        self.cell = cell.flatten()[inside.flatten()].to(self.device)
        self.cell_area = torch.bincount(cell.flatten(), minlength=GRID * GRID).to(self.device)

    def _noise(self) -> None:
        """The scatterers' table, and a bank of electronic noise and streaked clutter."""
        generator = torch.Generator().manual_seed(20240229)
        self.scatterers = torch.randn(_MASK + 1, generator=generator).to(self.device)
        noise = torch.randn(2, 12, self.beams, self.samples, generator=generator)
        streak = torch.randn(2, 12, self.beams, self.samples, generator=generator)
        sigma = 4.5 / math.degrees(2 * HALF_ANGLE / (self.beams - 1))
        b = torch.arange(self.beams)
        wide = torch.exp(-(((b[:, None] - b) / sigma) ** 2) / 2)
        wide = wide / wide.square().sum(1, keepdim=True).sqrt()
        noise = self._axial(noise)
        streak = self._axial(wide @ streak)
        self.noise, self.streak = noise.to(self.device), streak.to(self.device)

    def _axial(self, field: Tensor) -> Tensor:
        out = field * self.pulse[0]
        for k, weight in enumerate(self.pulse[1:], 1):
            out[..., k:].add_(field[..., :-k], alpha=weight)
            out[..., :-k].add_(field[..., k:], alpha=weight)
        return out

    def spread(self, field: Tensor) -> Tensor:
        """A scatterer field [N, beams, samples] blurred by the point spread, of unit power."""
        field = self._axial(field)
        out = field * self.beam[0]
        for k in range(1, self.reach + 1):
            out[:, k:].addcmul_(field[:, :-k], self.beam[k])
            out[:, :-k].addcmul_(field[:, k:], self.beam[k])
        return out

    def lookup(self, material: tuple[Tensor, ...], offset: int, cell: float, parts: int = 2):
        """Real and imaginary part (or the first alone) of a white field at material points, mm, in
        cubes of edge `cell`: the same point, the same scatterer."""
        index = None
        for axis, prime in zip(material, (73856093, 19349663, 83492791), strict=True):
            number = (axis * (1 / cell)).floor_().to(torch.int32).mul_(prime)
            index = number.add_(offset) if index is None else index.bitwise_xor_(number)
        places = ((index ^ (index >> 15)), index + 97531)[:parts]
        return tuple(
            self.scatterers.index_select(0, i.bitwise_and_(_MASK).flatten()).view(i.shape)
            for i in places
        )

    def convert(self, polar: Tensor) -> Tensor:
        """Grey levels on the polar grid [N, beams, samples] as pictures uint8 [N, S, S]."""
        flat = polar.flatten(1)
        total = sum(flat.index_select(1, index) * weight for index, weight in self.corners)
        image = torch.zeros(len(polar), self.size**2, dtype=torch.uint8, device=polar.device)
        image[:, self.inside] = total.add_(0.5).to(torch.uint8)
        return image.view(-1, self.size, self.size)

    def truth(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """Labels [N, beams, samples] as pictures [N, S, S] and occupancy [N, structures, 7, 7]."""
        n, count = len(label), len(STRUCTURES)
        inside = label.flatten(1).index_select(1, self.nearest)
        image = torch.zeros(n, self.size**2, dtype=torch.uint8, device=label.device)
        image[:, self.inside] = inside
        where = torch.arange(n, device=label.device)[:, None] * count + inside.long() - 1
        where = where * GRID**2 + self.cell
        area = torch.bincount(where.flatten(), minlength=n * count * GRID**2)
        area = area.view(n, count, GRID, GRID) / self.cell_area.view(GRID, GRID)
        return image.view(-1, self.size, self.size), area.float()


@lru_cache(maxsize=8)
def sector(size: int, device: str = "cpu") -> Sector:
    """The sector for pictures of `size` pixels; made once and kept."""
    return Sector(size, torch.device(device))


def check(target: str, size: int, without: str | None = None) -> None:
    """Raises ValueError, naming the argument and the choices, before any work."""
    if target not in TARGETS:
        raise ValueError(f"target {target!r} is unknown; one of {', '.join(TARGETS)}")
    if not isinstance(size, int) or not SIZES[0] <= size <= SIZES[1]:
        raise ValueError(f"size must be an integer from {SIZES[0]} to {SIZES[1]} px; got {size!r}")
    if without is not None and without not in STRUCTURES:
        raise ValueError(f"structure {without!r} is unknown; one of {', '.join(STRUCTURES)}")


def render(
    patient: Patient,
    pose: Tensor,
    phase: Tensor | float,
    without: str | None = None,
    target: str = "a4c",
    size: int = 112,
    device: str | torch.device = "cpu",
) -> Frames:
    """Frames at poses [..., 6] (mm, degrees; target plane = 0) and phases [...] of the cycle.

    `without` leaves out one structure: the same frame, pixel for pixel the same elsewhere, with
    what surrounds the structure in its place. The same arguments give the same picture. Raises
    ValueError for unknown names, sizes out of range and poses that are not finite.
    """
    check(target, size, without)
    pose = torch.as_tensor(pose, dtype=torch.float64, device="cpu")
    phase = torch.as_tensor(phase, dtype=torch.float64, device="cpu")
    if pose.shape[-1:] != (6,) or not (pose.isfinite().all() and phase.isfinite().all()):
        raise ValueError(f"pose must be finite, [..., 6]; got {list(pose.shape)}, {pose.tolist()}")
    lead = pose.shape[:-1]
    rows, phase = pose.reshape(-1, 6), phase.expand(lead).reshape(-1)
    grid = sector(size, str(torch.device(device)))
    some = max(1, round(CHUNK / (grid.beams * grid.samples)))
    with torch.inference_mode():
        parts = [
            _frames(patient, rows[i : i + some], phase[i : i + some], without, target, grid)
            for i in range(0, len(rows), some)
        ]
    fields = (torch.cat(field) for field in zip(*parts, strict=True))
    return Frames(*(f.unflatten(0, lead) if lead else f[0] for f in fields))


def _carry(matrix: Tensor, points: Tensor, shape: tuple[int, int]) -> Tensor:
    """Points [3, P] by rigid transforms [N, 4, 4]: [N, 3, beams, samples]."""
    moved = torch.baddbmm(matrix[:, :3, 3:], matrix[:, :3, :3], points.expand(len(matrix), -1, -1))
    return moved.unflatten(2, shape)


def _along(distance: Tensor, dr: float) -> Tensor:
    """How directly the beam meets a surface: |d distance / d depth|, 1 at right angles."""
    out = torch.empty_like(distance)
    torch.sub(distance[..., 2:], distance[..., :-2], out=out[..., 1:-1])
    out[..., 0], out[..., -1] = out[..., 1], out[..., -2]
    return out.mul_(0.5 / dr).abs_()


def _bell(distance: Tensor, width: float) -> Tensor:
    # Clamped: further out numbers would be denormal, and those are slow.
    return (distance * (1 / width)).square_().clamp_(max=80).neg_().exp_()


def _frames(patient: Patient, pose: Tensor, phase: Tensor, without, target: str, grid: Sector):
    device = grid.device
    shape = (grid.beams, grid.samples)
    to_chest = poses.to_matrix(pose)
    to_heart = patient.place(target) @ to_chest
    chest = _carry(to_chest.float().to(device), grid.points, shape)
    matrix = to_heart.float().to(device)
    heart = _carry(matrix, grid.points, shape)
    scene = patient.scene(heart, chest, phase.to(device), grid.near, without)

    field = _echo(patient, scene, chest, matrix, grid, without)
    re, im = field
    # Frame noise: which of the bank, by the frame's own pose and phase.
    key = (pose * torch.tensor([17.0, 29, 41, 53, 61, 71])).sum(1) * 1000 + phase * 7919
    pick = (key.round().long() + patient.hash).remainder(12).to(device)
    reverb, contact = _near_field(patient, to_chest, grid)
    weight = contact[:, :, None]
    haze = torch.exp(-grid.depth / 60) * 0.9 + 0.25
    haze = haze * (patient.clutter * 10 ** (-53.5 / 20))
    floor = patient.noise * 10 ** (-67 / 20) * 10 ** (grid.depth * (9 / 160 / 20))
    parts = []
    for k, part in enumerate((re, im)):
        part = grid.spread(part).mul_(weight)
        part.addcmul_(grid.streak[k].index_select(0, pick), haze * (0.15 + 0.85 * weight))
        part.addcmul_(grid.noise[k].index_select(0, pick), floor)
        part[..., : grid.near] += reverb[k]
        parts.append(part)
    power = torch.addcmul(parts[0] * parts[0], parts[1], parts[1])
    grey = power.add_(1e-9).log10_().mul_(10)  # dB
    grey = (grey + (patient.gain + patient.dynamic_range)).mul_(1 / patient.dynamic_range)
    grey = grey.clamp_(0, 1)
    for _ in range(2):  # speckle reduction of the machine: neighbouring beams are averaged
        smooth = grey.mul(0.5)
        smooth[:, 1:].add_(grey[:, :-1], alpha=0.25)
        smooth[:, :-1].add_(grey[:, 1:], alpha=0.25)
        grey = smooth
    image = grid.convert(grey.clamp_(0, 1).pow_(2.15).mul_(255))
    return image, *grid.truth(scene.label)


def _echo(patient: Patient, scene, chest, matrix, grid: Sector, without) -> tuple[Tensor, Tensor]:
    """The complex echo field before the point spread, attenuated and shadowed: [N, beams, D]."""
    label = scene.label
    index = label.flatten().to(torch.int32)
    table = torch.tensor(
        [0.0] + [10 ** (TISSUE[s][0] / 20) for s in STRUCTURES], device=grid.device
    )
    loss = torch.tensor([0.0] + [TISSUE[s][1] for s in STRUCTURES], device=grid.device)
    loss = loss * (math.log(10) / 20 / 10 * grid.dr)
    strength = table.index_select(0, index).view(label.shape)
    path = loss.index_select(0, index).view(label.shape).cumsum(-1).neg_().exp_()
    # The aperture sees round an edge: shadows have soft borders.
    step = max(1, round(0.02 / (2 * HALF_ANGLE / (grid.beams - 1))))
    for hop in (step, 2 * step):
        soft = path * 0.5
        soft[:, hop:-hop] += 0.25 * (path[:, : -2 * hop] + path[:, 2 * hop :])
        soft[:, :hop] += 0.5 * path[:, :hop]
        soft[:, -hop:] += 0.5 * path[:, -hop:]
        path = soft
    # Tissue is patchy: a coarse field, fixed to it too, moves its strength up and down.
    patch = grid.lookup(scene.material, patient.hash + 7, 3.2, parts=1)[0]
    strength.mul_(patch.mul_(0.55).add_(scene.texture, alpha=0.65).exp_())

    # Muscle shines where its fibres lie across the beam.
    x, y, _ = scene.material
    beam = torch.einsum("nij,jb->nib", matrix[:, :3, [0, 2]], grid.direction)[..., None]
    radius = torch.addcmul(x * x, y, y).add_(1).sqrt_()
    around = (beam[:, 1] * x - beam[:, 0] * y).div_(radius)
    helix = (scene.depth * -2).add_(1).mul_(math.radians(60))
    dot = around.mul_(torch.cos(helix)).add_(torch.sin(helix).mul_(beam[:, 2]))
    fibre = dot.square_().mul_(-1.15).add_(1.45)
    muscle = (label == LABEL["myocardium"]) | (label == LABEL["septum"])
    strength.mul_(fibre.masked_fill_(~muscle, 1.0))

    shine = _bell(scene.blood - 0.5, 1.1).mul_(_along(scene.blood, grid.dr).square_()).mul_(0.035)
    direct = _along(scene.heart, grid.dr)
    deep = torch.sigmoid((grid.depth - 85) / 14) * 0.46 + 0.02
    direct = direct.pow_(3).mul_(_bell(scene.heart - 0.9, 1.4)).mul_(deep)
    shine.addcmul_(direct, (scene.texture * 1.4).exp_())
    shine.addcmul_(_bell(scene.border, 1.3), _along(scene.border, grid.dr).square_(), value=0.14)
    near = chest[..., : grid.near]
    z = near[:, 2] - patient.skin(near[:, 0], near[:, 1])
    wall, lines = patient.size["skin_to_heart"], patient.ripples
    if without != "chest_wall":
        for k, (at, high) in enumerate(((0.16, 0.05), (0.42, 0.02), (0.62, 0.035), (0.93, 0.02))):
            bent = z + torch.sin(near[:, 0] * 0.33 + near[:, 1] * 0.21 + float(lines[k])) * 0.5
            shine[..., : grid.near].add_(_bell(bent - at * wall, 0.8), alpha=high)
    if without != "ribs":
        ribs = patient.rib_distance(near[:, 0], near[:, 1], z)
        shine[..., : grid.near].addcmul_(
            _bell(ribs, 1.0), _along(ribs, grid.dr).square_(), value=0.1
        )
    shine.mul_(grid.surface)
    strength.mul_(grid.tissue)
    noise = grid.lookup(scene.material, patient.hash, VOXEL)
    path = path * torch.exp(1.6 * torch.sigmoid((grid.depth - 68) / 14) - 0.75)
    re = torch.addcmul(shine * (noise[0] * 0.35 + 0.6), strength, noise[0]).mul_(path)
    im = torch.addcmul(shine * (noise[1] * 0.35), strength, noise[1]).mul_(path)
    return re, im


def _near_field(patient: Patient, to_chest: Tensor, grid: Sector) -> tuple[Tensor, Tensor]:
    """Reverberation in the probe, complex [2, beams, near], and each beam's contact [N, beams].

    The face of the probe is 18 mm wide; contact is lost where it stands off the skin.
    """
    device, face = grid.device, torch.zeros(3, grid.beams, dtype=torch.float64)
    face[0] = grid.theta.sin() / math.sin(HALF_ANGLE) * 9
    at = torch.baddbmm(to_chest[:, :3, 3:], to_chest[:, :3, :3], face.expand(len(to_chest), 3, -1))
    gap = patient.skin(at[:, 0], at[:, 1]) - at[:, 2]
    contact = torch.sigmoid((5.7 - gap) / 0.6).float().to(device)
    ripple = sum(
        torch.sin(grid.theta * (3 + 3 * k) + float(p)) for k, p in enumerate(patient.ripples[:4])
    )
    contact = contact * (1 + 0.2 * ripple).clamp(min=0.2).float().to(device)
    r = grid.depth[: grid.near]
    arcs = torch.zeros(2, grid.beams, grid.near, device=device)
    theta = grid.theta.float().to(device)[:, None]
    for k, high in enumerate((0.16, 0.24, 0.45, 0.07), 1):
        wave = torch.sin(theta * (6 + 5 * k) + float(patient.ripples[k])) * 0.5 + 0.6
        wave = wave * torch.exp(-((theta - 0.1 * math.sin(patient.ripples[k])) / 0.22).square())
        bend = 0.8 * torch.cos(theta * 3 + float(patient.ripples[k + 3]))
        at_depth = k * (5.2 + 0.6 * math.sin(patient.ripples[5])) + bend
        arc = torch.exp(-(((r - at_depth) / 0.7) ** 2)) * wave * high
        phase = float(patient.ripples[k]) + theta * 9
        arcs[0] += arc * torch.cos(phase)
        arcs[1] += arc * torch.sin(phase)
    return arcs, contact


def speckle_ratio(size: int = 224, draws: int = 6) -> float:
    """Mean over standard deviation of the envelope in tissue that is the same everywhere.

    Fully developed speckle is Rayleigh distributed: 1.91 (Wagner et al., 1983). Measured over
    `draws` places of the scatterer field, within bands of equal depth.
    """
    grid, ratios = sector(size), []
    for n in range(draws):
        x = grid.points[0].view(1, grid.beams, grid.samples) + 211.3 * n
        z = grid.points[2].view(1, grid.beams, grid.samples)
        re, im = grid.lookup((x, x * 0.31 + 0.2 * z, z), 5 + n, 0.6)
        envelope = torch.hypot(grid.spread(re), grid.spread(im))[0, 8:-8, 40:-8]
        bands = envelope.unfold(1, 24, 24)  # alike in depth
        ratios.append(float((bands.mean((0, 2)) / bands.std((0, 2))).mean()))
    return sum(ratios) / draws
