"""Virtual patients with a beating heart, a tracked probe and known anatomy."""

from dreamer.phantom.anatomy import LABEL, STRUCTURES, TARGETS, Patient
from dreamer.phantom.generate import alone, crew, generate
from dreamer.phantom.render import Frames, render, speckle_ratio

__all__ = [
    "LABEL",
    "STRUCTURES",
    "TARGETS",
    "Frames",
    "Patient",
    "alone",
    "crew",
    "generate",
    "render",
    "speckle_ratio",
]
