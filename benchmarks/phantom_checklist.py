"""Share of virtual patients whose target planes show what a standard view must show.

    python benchmarks/phantom_checklist.py [patients] [first]

Each patient is imaged at the target pose at five phases, and unshadowed areas, positions and
contrast are checked in the image; a patient passes a plane if no item fails at any phase. The items
follow what the ASE guideline for a comprehensive transthoracic examination names in each view
(Mitchell et al., J Am Soc Echocardiogr 2019;32:1-64); the limits are our choice. The aim is 95%.
"""

import sys
from collections import Counter

import numpy as np
import torch
from numpy.typing import NDArray

from dreamer.phantom import LABEL, TARGETS, Frames, Patient, render
from dreamer.phantom.sector import pixel_to_probe

SEED = 25  # of patients that were never looked at while limits or shapes were chosen
PHASES = (0.0, 0.2, 0.36, 0.46, 0.7)  # end diastole, systole, end systole, filling, diastasis
CLOSED = (0.0, 0.2, 0.36)  # atrioventricular valves shut
SIZE = 224


class View:
    """One frame of a standard view, with what can be measured in it, mm and grey levels."""

    def __init__(self, frame: Frames, depth: float):
        self.image = frame.image.numpy().astype(float)
        self.label, self.visible = frame.label.numpy(), frame.visible.numpy()
        self.x, self.z = pixel_to_probe(*np.mgrid[:SIZE, :SIZE].astype(float), SIZE, depth)
        self.pixel = float((self.x[0, 1] - self.x[0, 0]) ** 2)

    def mask(self, name: str) -> NDArray[np.bool_]:
        return (self.label == LABEL[name]) & self.visible

    def area(self, *names: str) -> float:
        return sum(self.mask(name).sum() for name in names) * self.pixel

    def centre(self, name: str) -> NDArray[np.float64]:
        """Mean x (right) and z (deep) of the visible part; NaN where there is none."""
        seen = self.mask(name)
        if not seen.any():
            return np.array([np.nan, np.nan])
        return np.array([self.x[seen].mean(), self.z[seen].mean()])

    def end(self, name: str, right: bool) -> NDArray[np.float64]:
        """The left or right end of a structure, averaged over its outermost 3 mm."""
        seen = self.mask(name)
        if not seen.any():
            return np.array([np.nan, np.nan])
        x, z = self.x[seen], self.z[seen]
        edge = x > x.max() - 3 if right else x < x.min() + 3
        return np.array([x[edge].mean(), z[edge].mean()])

    def apart(self, first: str, second: str) -> float:
        """Smallest distance between the visible parts of two structures, mm."""
        a, b = self.mask(first), self.mask(second)
        if not (a.any() and b.any()):
            return float("inf")
        dx = self.x[a][:, None] - self.x[b]
        return float(np.hypot(dx, self.z[a][:, None] - self.z[b]).min())

    def stretch(self, *names: str) -> float:
        """Longer over shorter principal axis of the structures together: 1 for a disc."""
        seen = np.logical_or.reduce([self.mask(name) for name in names])
        if seen.sum() < 10:
            return float("inf")
        low, high = np.linalg.eigvalsh(np.cov(self.x[seen], self.z[seen]))
        return float(np.sqrt(high / low))

    def contrast(self, name: str, blood: str) -> float:
        """Mean grey level of a structure over that of a chamber (at least 4 grey levels)."""
        if not (self.mask(name).any() and self.mask(blood).any()):
            return 0.0
        dark = max(self.image[self.mask(blood)].mean(), 4)
        return float(self.image[self.mask(name)].mean() / dark)


def four_chamber(view: View, phase: float) -> dict[str, bool]:
    lv, rv = view.centre("left_ventricle"), view.centre("right_ventricle")
    la, ra = view.centre("left_atrium"), view.centre("right_atrium")
    mitral, tricuspid = view.end("mitral_valve", False), view.end("tricuspid_valve", True)
    offset = mitral[1] - tricuspid[1]
    items = {
        "left ventricle": view.area("left_ventricle") > 700,
        "right ventricle": view.area("right_ventricle") > 250,
        "left atrium": view.area("left_atrium") > 400,
        "right atrium": view.area("right_atrium") > 400,
        "left heart on the right": lv[0] > rv[0] + 20 and la[0] > ra[0] + 20,
        "atria beyond the ventricles": la[1] > lv[1] + 30 and ra[1] > rv[1] + 20,
        "both atrioventricular valves": view.area("mitral_valve") > 20
        and view.area("tricuspid_valve") > 20,
        "atrial septum": view.area("interatrial_septum") > 20,
        "no aorta": view.area("aorta") < 15,
        "septum stands out": view.contrast("septum", "left_ventricle") > 2.5,
        "mitral valve stands out": view.contrast("mitral_valve", "left_ventricle") > 2.0,
    }
    if phase in CLOSED:
        items["tricuspid hinge nearer to the apex"] = 2 < offset < 16
        items["crux"] = bool(np.abs(mitral - tricuspid).max() < 20)
    return items


def long_axis(view: View, phase: float) -> dict[str, bool]:
    lv, rv = view.centre("left_ventricle"), view.centre("right_ventricle")
    la, aorta = view.centre("left_atrium"), view.centre("aorta")
    items = {
        "left ventricle": view.area("left_ventricle") > 500,
        "right ventricle": view.area("right_ventricle") > 60,
        "left atrium": view.area("left_atrium") > 350,
        "aorta": view.area("aorta") > 200,
        "base on the right": aorta[0] > lv[0] + 20 and la[0] > lv[0] + 20,
        "aorta before the atrium": la[1] > aorta[1] + 15,
        "right ventricle in front": lv[1] > rv[1] + 20,
        "mitral valve": view.area("mitral_valve") > 20,
        "aortic wall continues the septum": view.apart("septum", "aorta") < 5,
        "mitral valve meets the aortic root": view.apart("mitral_valve", "aorta") < 8,
        "no right atrium": view.area("right_atrium") < 40,
        "descending aorta behind": view.area("descending_aorta") > 60
        and view.centre("descending_aorta")[1] > la[1] + 15,
        "septum stands out": view.contrast("septum", "left_ventricle") > 2.5,
        "mitral valve stands out": view.contrast("mitral_valve", "left_ventricle") > 2.0,
    }
    if phase in (0.0, 0.46, 0.7):
        items["aortic cusps"] = view.area("aortic_valve") > 15
    return items


def aortic_short_axis(view: View, phase: float) -> dict[str, bool]:
    aorta, la = view.centre("aorta"), view.centre("left_atrium")
    items = {
        "aorta": view.area("aorta", "aortic_valve") > 250,
        "aorta is round": view.stretch("aorta", "aortic_valve") < 1.45,
        "left atrium behind": view.area("left_atrium") > 300 and la[1] > aorta[1] + 15,
        "right atrium on the left": view.area("right_atrium") > 60
        and view.centre("right_atrium")[0] < aorta[0] - 10,
        "outflow tract in front": view.area("right_ventricle") > 100
        and view.centre("right_ventricle")[1] < aorta[1],
        "pulmonary artery on the right": view.area("pulmonary_artery") > 40
        and view.centre("pulmonary_artery")[0] > aorta[0] + 10,
        "atrial septum": view.area("interatrial_septum") > 5,
        "wall stands out": view.contrast("heart_wall", "left_atrium") > 2.0,
    }
    if phase in (0.0, 0.7):
        items["three closed cusps"] = view.area("aortic_valve") > 30
        items["cusps stand out"] = view.contrast("aortic_valve", "left_atrium") > 2.0
    return items


def mitral_short_axis(view: View, phase: float) -> dict[str, bool]:
    lv, rv = view.centre("left_ventricle"), view.centre("right_ventricle")
    items = {
        "left ventricle": view.area("left_ventricle") > 250,
        "left ventricle is round": view.stretch("left_ventricle") < 1.5,
        "right ventricle on the left and in front": view.area("right_ventricle") > 150
        and rv[0] < lv[0] and rv[1] < lv[1],
        "septum between": view.area("septum") > 150,
        "myocardium": view.area("myocardium") > 300,
        "no left atrium": view.area("left_atrium") < 30,
        "no aorta": view.area("aorta") < 15,
        "muscle stands out": view.contrast("myocardium", "left_ventricle") > 2.0,
    }  # fmt: skip
    if phase == 0.46:
        items["open mitral leaflets"] = view.area("mitral_valve") > 20
        items["leaflets stand out"] = view.contrast("mitral_valve", "left_ventricle") > 1.7
    return items


VIEWS = {
    "a4c": four_chamber,
    "plax": long_axis,
    "psax-av": aortic_short_axis,
    "psax-mv": mitral_short_axis,
}


def failures(patient: Patient, target: str) -> list[tuple[float, str]]:
    """Phase and item of everything that a patient's frames at the target plane fail to show."""
    phases = torch.tensor(PHASES, dtype=torch.float64)
    pose = torch.zeros(len(PHASES), 6, dtype=torch.float64)
    frames = render(patient, pose, phases, target=target, size=SIZE)
    missing = []
    for number, phase in enumerate(PHASES):
        view = View(Frames(*(field[number] for field in frames)), patient.depth)
        items = VIEWS[target](view, phase)
        missing += [(phase, item) for item, shown in items.items() if not shown]
    return missing


if __name__ == "__main__":
    count, first = (int(word) for word in (*sys.argv[1:], "50", "0")[:2])
    for target, title in TARGETS.items():
        found = [failures(Patient((SEED, first + number)), target) for number in range(count)]
        passed = sum(not items for items in found) / count
        print(f"{title}: {passed:.0%} of {count} patients pass")
        counted = Counter(f"{item} at {phase}" for items in found for phase, item in items)
        for item, number in counted.most_common():
            print(f"    {number} fail: {item}")
