"""A B-mode frame of a virtual patient at a probe pose, and the truth that belongs to it.

Points of the image plane are sampled on a polar grid and carried into the patient. There, echo
strength multiplies a complex white scatterer field that is fixed to the tissue; it is blurred by
the point spread, detected, log-compressed and scan-converted. Fully developed speckle is then
Rayleigh: mean over standard deviation 1.91 (Wagner et al., IEEE Trans Sonics Ultrason 1983;30:156).
Brightness depends on reflectivity, angle of incidence, attenuation, contact and the patient's own
time-gain curve; nothing else depends on depth but noise, haze and beam width.
"""

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dreamer import poses
from dreamer.phantom.anatomy import LABEL, STRUCTURES, TARGETS, Scene
from dreamer.phantom.patient import FACE, STANDOFF, Patient
from dreamer.phantom.sector import BANK, HALF_ANGLE, SIZES, Sector, sector

CHUNK = 130_000  # samples computed at once: few enough for the cache, many enough for one call


class Tissue(NamedTuple):
    """`echo`: backscatter, dB; `loss`: attenuation left by an average time-gain curve, dB/cm."""

    echo: float
    loss: float


TISSUE = {
    "left_ventricle": Tissue(-66, -0.45),
    "right_ventricle": Tissue(-64, -0.45),
    "left_atrium": Tissue(-65, -0.45),
    "right_atrium": Tissue(-65, -0.45),
    "aorta": Tissue(-65, -0.45),
    "myocardium": Tissue(-26, 0.35),
    "septum": Tissue(-26, 0.35),
    "papillary_muscles": Tissue(-33, 0.35),
    "mitral_valve": Tissue(-28, 0.5),
    "tricuspid_valve": Tissue(-29, 0.5),
    "aortic_valve": Tissue(-28, 0.5),
    "heart_wall": Tissue(-35, 0.3),
    "pericardium": Tissue(-34, 0.5),
    "mediastinum": Tissue(-43.5, 0.1),
    "lung": Tissue(-41.5, 0.8),
    "liver": Tissue(-41, 0.4),
    "chest_wall": Tissue(-53, 0.5),
    "ribs": Tissue(-28, 28.0),
    "interatrial_septum": Tissue(-32, 0.5),
    "pulmonary_valve": Tissue(-29, 0.6),
    "pulmonary_artery": Tissue(-65, -0.45),
    "descending_aorta": Tissue(-62, -0.1),
    "chordae": Tissue(-36, 0.4),
}
# Reflectivity of surfaces at right angles to the beam, as amplitude.
ENDOCARDIUM = 0.20
EPICARDIUM = 0.25  # against fat and chest wall
PERICARDIUM = 1.60  # against the lung's air
PLEURA = 0.25
BONE = 0.10
ANISOTROPY = -16.0  # dB, fibres along the beam against fibres across it
# Layers of the chest wall: share of its thickness, and reflectivity.
FASCIA = {0.20: 0.015, 0.45: 0.012, 0.65: 0.02, 0.93: 0.012}
SIDE_LOBES = -37.0  # dB, energy of the neighbouring 14 degrees
HAZE = -56.0  # dB, reverberation clutter
NOISE = -70.0  # dB, electronic, before the time-gain curve
SHADOWED = 13.0  # dB lost on the way: structures behind count as shadowed
GAIN = 5.5  # dB, where echoes of 0 dB would saturate
MAPPING = 2.5  # exponent of the machine's grey map


class Frames(NamedTuple):
    """`image` uint8 [..., S, S]; `label` uint8 [..., S, S], 0 outside the sector, else 1 + the
    index in STRUCTURES; `occupancy` float32 [..., structures, 7, 7], share of each cell's area;
    `visible` bool [..., S, S], False where ribs, lung or lost contact shadow the label."""

    image: Tensor
    label: Tensor
    occupancy: Tensor
    visible: Tensor


def names(without: str | Collection[str] | None) -> frozenset[str]:
    """The structures to leave out, as a set; ValueError for an unknown one."""
    chosen = frozenset([without] if isinstance(without, str) else without or ())
    for name in sorted(chosen):
        if name not in STRUCTURES:
            known = ", ".join(STRUCTURES)
            raise ValueError(f"structure {name!r} is unknown; one of {known}")
    return chosen


def check(target: str, size: int, without: str | Collection[str] | None = None) -> None:
    """Raises ValueError, naming the argument and the choices, before any work."""
    if target not in TARGETS:
        raise ValueError(f"target {target!r} is unknown; one of {', '.join(TARGETS)}")
    if not isinstance(size, int) or not SIZES[0] <= size <= SIZES[1]:
        raise ValueError(f"size must be an integer from {SIZES[0]} to {SIZES[1]} px; got {size!r}")
    names(without)


def render(
    patient: Patient,
    pose: Tensor,
    phase: Tensor | float,
    without: str | Collection[str] | None = None,
    target: str = "a4c",
    size: int = 112,
    device: str | torch.device = "cpu",
    vary: Mapping[str, float | str] | None = None,
) -> Frames:
    """Frames at poses [..., 6] (mm, degrees; target plane = 0) and phases [...] of the cycle.

    `without`: one structure or several to leave out: the same frame, equal elsewhere, with what
    surrounds the structure in its place. `vary`: factors of variation, as in `Patient`, on top of
    the patient's own. The same arguments give the same frame. Raises ValueError for unknown names,
    sizes out of range and poses that are not finite.
    """
    check(target, size, without)
    pose = torch.as_tensor(pose, dtype=torch.float64, device="cpu")
    phase = torch.as_tensor(phase, dtype=torch.float64, device="cpu")
    if pose.shape[-1:] != (6,) or not (pose.isfinite().all() and phase.isfinite().all()):
        raise ValueError(f"pose must be finite, [..., 6]; got {list(pose.shape)}, {pose.tolist()}")
    if vary:
        patient = Patient(patient.seed, patient.vary | dict(vary))
    lead = pose.shape[:-1]
    rows = pose.reshape(-1, 6)
    phase = phase.expand(lead).reshape(-1) + patient.factors.heart_phase
    grid = sector(size, str(torch.device(device)), patient.depth)
    gone, some = names(without), max(1, round(CHUNK / (grid.beams * grid.samples)))
    with torch.inference_mode():
        parts = [
            _frames(patient, rows[i : i + some], phase[i : i + some], gone, target, grid)
            for i in range(0, len(rows), some)
        ]
    fields = (torch.cat(field) for field in zip(*parts, strict=True))
    return Frames(*(f.unflatten(0, lead) if lead else f[0] for f in fields))


def _frames(
    patient: Patient,
    pose: Tensor,
    phase: Tensor,
    without: frozenset[str],
    target: str,
    grid: Sector,
) -> Frames:
    to_chest = poses.to_matrix(pose)
    to_heart = patient.place(target) @ to_chest
    chest, heart = (_carry(matrix, grid) for matrix in (to_chest, to_heart))
    scene = patient.scene(heart, chest, phase.to(grid.device), grid.near, without)
    contact = _contact(patient, to_chest, grid)
    path = _path(patient, scene.label, chest, grid)
    tissue, mirror = _strength(patient, scene, chest, to_heart, grid, without)
    clutter = _clutter(patient, pose, phase, path, contact, grid)
    noise = grid.lookup(scene.material, patient.hash)
    weight = path * contact[:, :, None]
    power = None
    for part, (white, other) in enumerate(zip(noise, clutter, strict=True)):
        # A rough surface: part of its echo is speckle.
        field = white.mul(0.75).add_(0.45 if part == 0 else 0.0).mul_(mirror)
        field = grid.spread(field.addcmul_(white, tissue).mul_(weight))
        if part == 0:
            lobes = _side_lobes(field, grid)
        field.addcmul_(lobes, other[1]).add_(other[0])
        power = field.square_() if power is None else power.add_(field.square_())
    grey = power.add_(1e-9).log10_().mul_(10)  # dB
    grey.add_(_time_gain(patient, grid))
    grey = grey.add_(patient.gain + GAIN + patient.dynamic_range).mul_(1 / patient.dynamic_range)
    grey = grid.compound(grey.clamp_(-0.2, 1.3)).clamp_(0, 1)
    image = grid.convert(grey.pow_(MAPPING).mul_(255))
    label = grid.truth(scene.label)
    visible = grid.truth((weight > 10 ** (-SHADOWED / 20)).to(torch.uint8)).bool()
    return Frames(image, label, grid.occupancy(label, len(STRUCTURES)), visible)


def _carry(matrix: Tensor, grid: Sector) -> Tensor:
    """The sector's points by rigid transforms [N, 4, 4]: [N, 3, beams, samples]."""
    matrix = matrix.float().to(grid.device)
    points = grid.points.expand(len(matrix), -1, -1)
    moved = torch.baddbmm(matrix[:, :3, 3:], matrix[:, :3, :3], points)
    return moved.unflatten(2, (grid.beams, grid.samples))


def _incidence(distance: Tensor, dr: float) -> Tensor:
    """Cosine of the angle between beam and normal: |d distance / d depth|."""
    out = torch.empty_like(distance)
    torch.sub(distance[..., 2:], distance[..., :-2], out=out[..., 1:-1])
    out[..., 0], out[..., -1] = out[..., 1], out[..., -2]
    return out.mul_(0.5 / dr).abs_().clamp_(max=1)


def _bell(distance: Tensor, width: float) -> Tensor:
    # Clamped: further out numbers would be denormal, and those are slow.
    return (distance * (1 / width)).square_().clamp_(max=80).neg_().exp_()


def _waves(x: Tensor, y: Tensor, phases: list[float]) -> Tensor:
    """A smooth field about zero, SD near 1, over two coordinates in mm."""
    return (
        torch.sin(x * 0.61 + y * 0.23 + phases[0])
        + torch.sin(x * -0.37 + y * 0.49 + phases[1])
        + torch.sin(x * 1.13 - y * 0.31 + phases[2])
    ) * 0.8


def _contact(patient: Patient, to_chest: Tensor, grid: Sector) -> Tensor:
    """Share of the amplitude [N, beams] that each beam keeps at the skin and in the chest wall.

    Contact is lost where the face stands off the skin. Fat and fascia, fixed to the chest, cost
    single beams up to some 12 dB.
    """
    face = torch.zeros(3, grid.beams, dtype=torch.float64)
    face[0] = grid.theta.sin() / math.sin(HALF_ANGLE) * FACE
    at = torch.baddbmm(to_chest[:, :3, 3:], to_chest[:, :3, :3], face.expand(len(to_chest), 3, -1))
    gap = patient.skin(at[:, 0], at[:, 1]) - at[:, 2] + patient.factors.contact
    contact = torch.sigmoid((STANDOFF - gap) / 0.6)
    loss = _waves(at[:, 0] * 0.8, at[:, 1] * 0.8, patient.ripples[:3].tolist())
    decibel = 2.0 * loss - 3.0 * (loss - 0.9).clamp(min=0) - 1.0
    return (contact * 10 ** (decibel.clamp(max=2) / 20)).float().to(grid.device)


def _path(patient: Patient, label: Tensor, chest: Tensor, grid: Sector) -> Tensor:
    """Amplitude left by attenuation on the way to each sample [N, beams, samples]."""
    loss = torch.tensor([0.0] + [TISSUE[name].loss for name in STRUCTURES], device=grid.device)
    loss = loss * (math.log(10) / 20 / 10 * grid.dr)
    path = loss.index_select(0, label.flatten().to(torch.int32)).view(label.shape)
    path = path.cumsum(-1).neg_().exp_()
    # The aperture sees round an edge: shadows have soft borders.
    step = max(1, round(1.15 / grid.step))
    for hop in (step, 2 * step):
        soft = path * 0.5
        soft[:, hop:-hop] += 0.25 * (path[:, : -2 * hop] + path[:, 2 * hop :])
        soft[:, :hop] += 0.5 * path[:, :hop]
        soft[:, -hop:] += 0.5 * path[:, -hop:]
        path = soft
    return path


def _strength(
    patient: Patient, scene: Scene, chest: Tensor, to_heart: Tensor, grid: Sector, without
) -> tuple[Tensor, Tensor]:
    """Amplitude of the scatterers and of the surfaces, both [N, beams, samples]."""
    label = scene.label
    echo = torch.tensor(
        [0.0] + [10 ** (TISSUE[name].echo / 20) for name in STRUCTURES], device=grid.device
    )
    strength = echo.index_select(0, label.flatten().to(torch.int32)).view(label.shape)
    # Tissue is patchy: a coarse field, fixed to it too, moves its strength up and down.
    patch = grid.white(grid.cells(scene.material, patient.hash + 7, 3.2))
    patch = patch.mul_(0.5).add_(scene.texture, alpha=0.9).exp_()
    # Muscle shines where its fibres lie across the beam.
    x, y, _ = scene.material
    turn = to_heart[:, :3, [0, 2]].float().to(grid.device)
    beam = torch.einsum("nij,jb->nib", turn, grid.direction)[..., None]
    radius = torch.addcmul(x * x, y, y).add_(1).sqrt_()
    around = (beam[:, 1] * x - beam[:, 0] * y).div_(radius)
    helix = (scene.depth * -2).add_(1).mul_(math.radians(60))
    along = around.mul_(torch.cos(helix)).add_(torch.sin(helix).mul_(beam[:, 2]))
    fibre = along.square_().mul_(ANISOTROPY * math.log(10) / 20).exp_()
    fibre.mul_(scene.skeleton)
    muscle = (label == LABEL["myocardium"]) | (label == LABEL["septum"])
    strength.mul_(torch.where(muscle, fibre, scene.skeleton)).mul_(patch)

    mirror = _bell(scene.blood - 0.5, 1.1).mul_(_incidence(scene.blood, grid.dr).square_())
    mirror.mul_(ENDOCARDIUM)
    # Pericardium shines against air, less against fat and chest wall.
    air = _bell(scene.border, 10.0).mul_(PERICARDIUM - EPICARDIUM).add_(EPICARDIUM)
    outer = _incidence(scene.heart, grid.dr).square_().square_()
    mirror.addcmul_(outer.mul_(_bell(scene.heart - 0.9, 1.2)), air)
    pleura = _incidence(scene.border, grid.dr).pow_(3).mul_(_bell(scene.border, 1.2))
    mirror.add_(pleura, alpha=PLEURA)
    x, y, z = scene.material
    rough = torch.sin(x * 0.27 + z * 0.19 + y * 0.11) + torch.sin(y * 0.31 - x * 0.13 + z * 0.23)
    mirror.mul_(patch).mul_(rough.mul_(0.55).exp_())
    _lung(patient, label, strength, mirror, grid)
    near = chest[..., : grid.near]
    z = near[:, 2] - patient.skin(near[:, 0], near[:, 1])
    surface = mirror[..., : grid.near]
    if "chest_wall" not in without:
        bend = torch.sin(near[:, 0] * 0.33 + near[:, 1] * 0.21 + float(patient.ripples[3])) * 0.6
        for share, reflectivity in FASCIA.items():
            layer = z + bend - share * patient.size.skin_to_heart
            surface.add_(_bell(layer, 0.8), alpha=reflectivity)
    if "ribs" not in without:
        ribs = patient.rib_distance(near[:, 0], near[:, 1], z)
        surface.addcmul_(_bell(ribs, 1.0), _incidence(ribs, grid.dr).square_(), value=BONE)
    return strength.mul_(grid.tissue), mirror.mul_(grid.surface)


def _lung(patient: Patient, label: Tensor, strength: Tensor, mirror: Tensor, grid: Sector) -> None:
    """A lines (the pleura again at twice its depth) and B lines (beams of reverberation)."""
    lung = label == LABEL["lung"]
    since = lung.float().cumsum(-1).mul_(grid.dr)
    theta = grid.theta.float().to(grid.device)[:, None]
    first, second = patient.ripples[4:6].tolist()
    comet = torch.sin(theta * 31 + first) * torch.sin(theta * 47 + second)
    comet = comet.clamp(min=0).square() * 2.5 + 0.35
    strength.mul_(torch.where(lung, comet, 1.0))
    again = _bell(since.mul_(2).sub_(grid.depth), 1.2).mul_(lung)
    mirror.add_(again, alpha=0.05)


def _side_lobes(field: Tensor, grid: Sector) -> Tensor:
    """Amplitude of what neighbouring beams leak in, [N, beams, samples], from the field's own."""
    power = grid.side_lobes @ field.square().clamp_(max=0.02)
    return power.clamp_(min=1e-12).sqrt_().mul_(10 ** (SIDE_LOBES / 20) * 6)


def _clutter(
    patient: Patient, pose: Tensor, phase: Tensor, path: Tensor, contact: Tensor, grid: Sector
) -> list[tuple[Tensor, Tensor]]:
    """Real and imaginary part of noise, haze and near-field echoes, each with its unit streaks."""
    # Which image of the bank: by the frame's own pose and phase.
    key = (pose * torch.tensor([17.0, 29, 41, 53, 61, 71])).sum(1) * 1000 + phase * 7919
    pick = (key.round().long() + patient.hash).remainder(BANK).to(grid.device)
    ladder = _ladder(patient, grid)
    poor = (1 - contact).clamp_(0, 1)[:, :, None]
    haze = torch.exp(-grid.depth / 35) * 2.2 + 0.5
    haze = haze * 10 ** ((HAZE + patient.clutter) / 20)
    floor = 10 ** ((NOISE + patient.noise + grid.depth * (6 / 160)) / 20)
    haze = haze * (0.7 + 0.3 * contact[:, :, None])
    parts = []
    for part in range(2):
        streak = grid.streak[part].index_select(0, pick)
        echo = grid.noise[part].index_select(0, pick).mul_(floor)
        echo.addcmul_(streak, haze)
        echo[..., : grid.near].addcmul_(ladder[part], 1 + 2.5 * poor)
        parts.append((echo, streak))
    return parts


def _ladder(patient: Patient, grid: Sector) -> Tensor:
    """Reverberation between probe and skin, complex [2, beams, near]: rungs 5 mm apart."""
    r = grid.depth[: grid.near]
    theta = grid.theta.float().to(grid.device)[:, None]
    shift = patient.ripples.tolist()
    rungs = torch.zeros(2, grid.beams, grid.near, device=grid.device)
    for k, height in enumerate((0.10, 0.09, 0.11, 0.05, 0.025, 0.012, 0.006), 1):
        wave = torch.sin(theta * (6 + 4 * k) + shift[k]) * 0.5 + 0.6
        wave = wave * torch.exp(-((theta - 0.1 * math.sin(shift[k])) / 0.24).square())
        bend = 0.8 * torch.cos(theta * 3 + shift[k + 3])
        at = k * (5.2 + 0.6 * math.sin(shift[5])) + bend
        rung = torch.exp(-(((r - at) / 0.7) ** 2)) * wave * height
        angle = shift[k] + theta * 9
        rungs[0] += rung * torch.cos(angle)
        rungs[1] += rung * torch.sin(angle)
    return rungs


def _time_gain(patient: Patient, grid: Sector) -> Tensor:
    """The patient's time-gain curve, dB, at every sample: straight between the sliders."""
    sliders = torch.from_numpy(patient.time_gain).float().to(grid.device)
    place = (grid.depth * (1 / 25)).clamp(max=len(sliders) - 1.001)
    first = place.long()
    return torch.lerp(sliders[first], sliders[first + 1], place - first)


def speckle_ratio(size: int = 224, draws: int = 6) -> float:
    """Mean over standard deviation of the envelope in tissue that is the same everywhere.

    Fully developed speckle is Rayleigh distributed: 1.91 (Wagner et al., 1983). Measured over
    `draws` places of the scatterer field, within bands of equal depth.
    """
    grid, ratios = sector(size), []
    for n in range(draws):
        x = grid.points[0].view(1, grid.beams, grid.samples) + 211.3 * n
        z = grid.points[2].view(1, grid.beams, grid.samples)
        re, im = grid.lookup((x, x * 0.31 + 0.2 * z, z), 5 + n)
        envelope = torch.hypot(grid.spread(re), grid.spread(im))[0, 8:-8, 40:-8]
        bands = envelope.unfold(1, 24, 24)  # alike in depth
        ratios.append(float((bands.mean((0, 2)) / bands.std((0, 2))).mean()))
    return sum(ratios) / draws
