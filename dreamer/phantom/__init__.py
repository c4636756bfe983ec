"""Virtual patients with a beating heart, a tracked probe and known anatomy."""

from dreamer.phantom.anatomy import LABEL, STRUCTURES, TARGETS, Patient
from dreamer.phantom.generate import generate
from dreamer.phantom.render import Frames, render, speckle_ratio

__all__ = [
    "LABEL",
    "STRUCTURES",
    "TARGETS",
    "Frames",
    "Patient",
    "generate",
    "render",
    "speckle_ratio",
]
