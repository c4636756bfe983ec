"""The sector: how pixels, beams and the probe's own frame belong together, and the point spread.

Probe frame, mm: origin at the apex of the sector, x to the right of the image, z along the middle
beam, y out of the image plane. The fan is that of the published real scan, in pixels of a frame of
224 x 224; `depth` is how far the last pixel of the middle beam lies from the apex.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

SIZE = 224  # px: the frame in which APEX and RADIUS are given
APEX = (111.5, -1.0)  # column and row of the apex, px
RADIUS = 221.0  # px, from the apex to the end of every beam
HALF_ANGLE = math.radians(30.7)
DEPTH = 160.0  # mm, the default
GRID = 7  # cells of the occupancy grid, per side
SIZES = (32, 1024)  # px, smallest and largest frame

NEAR = 52.0  # mm: no chest wall lies deeper
PULSE = 0.72  # mm, standard deviation of the pulse's envelope
BEAM_WIDTH = 0.72  # degrees, standard deviation of the beam at its focus
FOCUS = 80.0  # mm
DIVERGENCE = 0.60  # degrees added to the width 80 mm away from the focus
SCATTERER = 0.6  # mm, edge of the cell that holds one scatterer
COMPOUND_AXIAL, COMPOUND_LATERAL = 0.5, 0.5  # mm and degrees, SD of the speckle reduction
BANK = 12  # noise images to choose from
_TABLE = 2**18  # entries of the scatterers' table
_PRIMES = (73856093, 19349663, 83492791)  # Teschner et al., VMV 2003, equation 1


def pixel_to_probe(row, column, size: int = SIZE, depth: float = DEPTH):
    """Probe-frame x and z, mm, of pixels (scalars or arrays) of a `size` x `size` frame."""
    scale = size / SIZE
    mm = depth / (RADIUS * scale)
    x = (column - ((APEX[0] + 0.5) * scale - 0.5)) * mm
    return x, (row - ((APEX[1] + 0.5) * scale - 0.5)) * mm


def probe_to_pixel(x, z, size: int = SIZE, depth: float = DEPTH):
    """Row and column of points x, z (mm, in the image plane), the inverse of `pixel_to_probe`."""
    scale = size / SIZE
    mm = depth / (RADIUS * scale)
    return z / mm + (APEX[1] + 0.5) * scale - 0.5, x / mm + (APEX[0] + 0.5) * scale - 0.5


class Corner(NamedTuple):
    """One of the four polar samples around every pixel: its index and its bilinear weight."""

    index: Tensor
    weight: Tensor


class PointSpread(NamedTuple):
    """Weights at offsets 0, 1, ...: `pulse` along the beam, `beam` [offsets, samples] across."""

    pulse: list[float]
    beam: Tensor


def polar_grid(size: int, depth: float) -> tuple[Tensor, Tensor]:
    """Beam angles (radians) and sample depths (mm) for frames of `size` pixels."""
    beams, samples = 26 + round(0.3 * size), 50 + round(0.8 * size)
    theta = torch.linspace(-HALF_ANGLE, HALF_ANGLE, beams, dtype=torch.float64)
    return theta, torch.linspace(0, depth, samples, dtype=torch.float64)


def point_spread(theta: Tensor, r: Tensor) -> PointSpread:
    """A pulse of constant length and a beam narrowest at its focus; white noise keeps its power."""
    sigma = PULSE / float(r[1] - r[0])
    offsets = torch.arange(max(1, math.ceil(2.2 * sigma)) + 1)
    pulse = torch.exp(-((offsets / sigma) ** 2) / 2)
    pulse = pulse / (pulse[0] ** 2 + 2 * (pulse[1:] ** 2).sum()).sqrt()
    width = BEAM_WIDTH + DIVERGENCE * ((r - FOCUS) / 80) ** 2
    width = width / math.degrees(float(theta[1] - theta[0]))
    offsets = torch.arange(max(1, math.ceil(2.2 * float(width.max()))) + 1)
    beam = torch.exp(-((offsets[:, None] / width) ** 2) / 2)
    beam = beam / (beam[0] ** 2 + 2 * (beam[1:] ** 2).sum(0)).sqrt()
    return PointSpread(pulse.tolist(), beam.float())


def coherent_gain(spread: PointSpread) -> float:
    """What the point spread makes of a field of ones, halfway down."""
    middle = spread.beam[:, spread.beam.shape[1] // 2]
    return (spread.pulse[0] + 2 * sum(spread.pulse[1:])) * float(middle[0] + 2 * middle[1:].sum())


class Sector:
    """The polar grid, the point spread and the way to pixels for frames of one size and depth."""

    def __init__(self, size: int, device: torch.device, depth: float = DEPTH):
        self.size, self.device = size, device
        self.theta, r = polar_grid(size, depth)
        self.beams, self.samples = len(self.theta), len(r)
        self.dr = depth / (self.samples - 1)
        self.step = math.degrees(float(self.theta[1] - self.theta[0]))  # degrees between beams
        self.near = min(self.samples, math.ceil(NEAR / self.dr))
        self.direction = torch.stack((self.theta.sin(), self.theta.cos())).float().to(device)
        self.depth = r.float().to(device)
        across, along = self.direction[:, :, None] * self.depth
        self.points = torch.stack((across, torch.zeros_like(across), along)).flatten(1)
        self.pulse, beam = point_spread(self.theta, r)
        self.beam = beam.to(device)
        # A smooth surface adds up in phase, speckle does not: keep their ratio at every size.
        self.surface = coherent_gain(point_spread(*polar_grid(112, DEPTH)))
        self.surface /= coherent_gain(PointSpread(self.pulse, beam))
        # Samples closer than the scatterers' cells share one: no gain from that.
        both = torch.tensor(self.pulse[:0:-1] + self.pulse, dtype=torch.float64)
        place = torch.arange(len(both), dtype=torch.float64) * self.dr
        alike = (1 - (place[:, None] - place).abs() / SCATTERER).clamp(min=0)
        self.tissue = 1.0 if self.dr >= SCATTERER else float((both @ alike @ both) ** -0.5)
        self._pixels(depth)
        self._noise()

    def _pixels(self, depth: float) -> None:
        """Bilinear weights from the polar grid to the pixels inside the sector."""
        axis = torch.arange(self.size, dtype=torch.float64)
        row, column = torch.meshgrid(axis, axis, indexing="ij")
        x, z = pixel_to_probe(row, column, self.size, depth)
        r, theta = torch.hypot(x, z), torch.atan2(x, z)
        within = (r <= depth) & (theta.abs() <= HALF_ANGLE) & (z > 0)
        self.inside = within.flatten().nonzero()[:, 0].to(self.device)
        at_beam = (theta[within] + HALF_ANGLE) / (2 * HALF_ANGLE) * (self.beams - 1)
        at_sample = r[within] / self.dr
        beam = at_beam.floor().clamp(0, self.beams - 2)
        sample = at_sample.floor().clamp(0, self.samples - 2)
        u, v = at_beam - beam, at_sample - sample
        first = (beam * self.samples + sample).long()
        weights = {
            0: (1 - u) * (1 - v),
            1: (1 - u) * v,
            self.samples: u * (1 - v),
            self.samples + 1: u * v,
        }
        self.corners = [
            Corner((first + offset).to(self.device), weight.float().to(self.device))
            for offset, weight in weights.items()
        ]
        nearest = at_beam.round() * self.samples + at_sample.round()
        self.nearest = nearest.long().to(self.device)
        cell = torch.arange(self.size) * GRID // self.size
        cell = (cell[:, None] * GRID + cell).flatten()
        self.cell = cell[within.flatten()].to(self.device)
        self.cell_area = torch.bincount(cell, minlength=GRID**2).to(self.device)

    def _noise(self) -> None:
        """The scatterers' table, and a bank of electronic noise and of streaks across beams."""
        generator = torch.Generator().manual_seed(20240229)
        self.scatterers = torch.randn(_TABLE, generator=generator).to(self.device)
        noise = torch.randn(2, BANK, self.beams, self.samples, generator=generator)
        streak = torch.randn(2, BANK, self.beams, self.samples, generator=generator)
        self.noise = self.axial(noise).to(self.device)
        beam = torch.arange(self.beams)
        apart = (beam[:, None] - beam).abs() * self.step
        wide = torch.exp(-((apart / 2.5) ** 2) / 2)
        wide = wide / wide.square().sum(1, keepdim=True).sqrt()
        self.streak = self.axial(wide @ streak).to(self.device)
        # Side lobes: energy from beams up to 7 degrees away.
        lobes = torch.exp(-((apart / 4.0) ** 2) / 2) * (apart < 7)
        self.side_lobes = (lobes / lobes.sum(1, keepdim=True)).to(self.device)

    def axial(self, field: Tensor) -> Tensor:
        """A field [..., samples] blurred by the pulse."""
        out = field * self.pulse[0]
        for k, weight in enumerate(self.pulse[1:], 1):
            out[..., k:].add_(field[..., :-k], alpha=weight)
            out[..., :-k].add_(field[..., k:], alpha=weight)
        return out

    def spread(self, field: Tensor) -> Tensor:
        """A scatterer field [N, beams, samples] blurred by the point spread, of unit power."""
        field = self.axial(field)
        out = field * self.beam[0]
        for k in range(1, len(self.beam)):
            out[:, k:].addcmul_(field[:, :-k], self.beam[k])
            out[:, :-k].addcmul_(field[:, k:], self.beam[k])
        return out

    def compound(self, grey: Tensor) -> Tensor:
        """The machine's speckle reduction: neighbouring log-compressed samples averaged."""
        along = min(0.25, 0.5 * (COMPOUND_AXIAL / self.dr) ** 2)
        across = min(0.25, 0.5 * (COMPOUND_LATERAL / self.step) ** 2)
        smooth = grey * (1 - 2 * along)
        smooth[..., 1:].add_(grey[..., :-1], alpha=along)
        smooth[..., :-1].add_(grey[..., 1:], alpha=along)
        grey = smooth * (1 - 2 * across)
        grey[:, 1:].add_(smooth[:, :-1], alpha=across)
        grey[:, :-1].add_(smooth[:, 1:], alpha=across)
        return grey

    def cells(self, material: tuple[Tensor, ...], salt: int, edge: float) -> Tensor:
        """A number (int32) for the cube of edge `edge` mm in which each material point lies."""
        index = None
        for axis, prime in zip(material, _PRIMES, strict=True):
            number = (axis * (1 / edge)).floor_().to(torch.int32).mul_(prime)
            index = number.add_(salt) if index is None else index.bitwise_xor_(number)
        return index

    def white(self, cells: Tensor) -> Tensor:
        """White noise of unit variance: the same cell, the same value."""
        places = cells.bitwise_and(_TABLE - 1).flatten()
        return self.scatterers.index_select(0, places).view(cells.shape)

    def lookup(self, material: tuple[Tensor, ...], salt: int, edge: float = SCATTERER):
        """Real and imaginary part of a white field fixed to the tissue, at material points, mm."""
        cells = self.cells(material, salt, edge)
        return self.white(cells ^ (cells >> 15)), self.white(cells + 97531)

    def convert(self, polar: Tensor) -> Tensor:
        """Grey levels on the polar grid [N, beams, samples] as frames uint8 [N, S, S]."""
        flat = polar.flatten(1)
        total = sum(flat.index_select(1, corner.index) * corner.weight for corner in self.corners)
        return self._frame(total.add_(0.5).to(torch.uint8))

    def truth(self, values: Tensor) -> Tensor:
        """The nearest sample's value of a uint8 field [N, beams, samples], as frames [N, S, S]."""
        return self._frame(values.flatten(1).index_select(1, self.nearest))

    def _frame(self, values: Tensor) -> Tensor:
        image = torch.zeros(len(values), self.size**2, dtype=torch.uint8, device=values.device)
        image[:, self.inside] = values
        return image.view(-1, self.size, self.size)

    def occupancy(self, label: Tensor, structures: int) -> Tensor:
        """Share of each cell's area [N, structures, 7, 7] that each label 1, 2, ... covers."""
        count = len(label)
        found = label.flatten(1)[:, self.inside].long() - 1
        place = torch.arange(count, device=label.device)[:, None] * structures + found
        place = place * GRID**2 + self.cell
        area = torch.bincount(place.flatten(), minlength=count * structures * GRID**2)
        area = area.view(count, structures, GRID, GRID) / self.cell_area.view(GRID, GRID)
        return area.float()


@lru_cache(maxsize=8)
def sector(size: int, device: str = "cpu", depth: float = DEPTH) -> Sector:
    """The sector for frames of `size` pixels, `depth` mm deep; made once and kept."""
    return Sector(size, torch.device(device), depth)
