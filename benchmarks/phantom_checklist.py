"""Share of virtual patients whose target planes show what a standard view must show.

    python benchmarks/phantom_checklist.py [patients]

Each patient is imaged at the target pose at five phases; a patient passes a plane if no item of
`dreamer.phantom.checklist` fails at any phase. The aim is 95%.
"""

import sys
from collections import Counter

from dreamer.phantom import TARGETS, Patient
from dreamer.phantom.checklist import failures

SEED = 25  # of patients that were never looked at while limits or shapes were chosen

if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    for target, title in TARGETS.items():
        found = [failures(Patient((SEED, number)), target) for number in range(count)]
        passed = sum(not items for items in found) / count
        print(f"{title}: {passed:.0%} of {count} patients pass")
        counted = Counter(f"{item} at {phase}" for items in found for phase, item in items)
        for item, number in counted.most_common():
            print(f"    {number} fail: {item}")
