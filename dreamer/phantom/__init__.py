"""Virtual patients with a beating heart, a tracked probe and known anatomy."""

from dreamer.phantom.anatomy import LABEL, STRUCTURES, TARGETS
from dreamer.phantom.generate import alone, crew, generate, read_card
from dreamer.phantom.patient import Factors, Patient
from dreamer.phantom.render import Frames, render, speckle_ratio

__all__ = [
    "LABEL",
    "STRUCTURES",
    "TARGETS",
    "Factors",
    "Frames",
    "Patient",
    "alone",
    "crew",
    "generate",
    "read_card",
    "render",
    "speckle_ratio",
]
