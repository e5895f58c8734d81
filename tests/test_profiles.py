"""The gate draws the same cases wherever it runs; the other profiles draw new ones wherever they run."""

import json
import os
import subprocess
import sys

CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
if sys.argv[2] == "crowded":
    import crowd  # a local module full of constants, as a user's project is
from moegate.conformance.profiles import explore
from moegate.conformance.strategies import align_specs, experts_specs
from moegate.conformance.selection import SELECTION
from moegate.conformance.subject import Capabilities
SELECTION.profile = sys.argv[3]
drawn = []
for strategies in (experts_specs, align_specs):
    explore(strategies("cpu", Capabilities()), lambda spec: drawn.append(repr(spec)), name="x", examples=30)
print(json.dumps(drawn))
"""


def drawn(folder, company="alone", profile="gate", **environment):
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), company, profile],
        env={name: value for name, value in os.environ.items() if name != "CI"} | environment,
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
    )
    return json.loads(child.stdout)


def test_the_gate_draws_the_same_cases_whatever_else_is_loaded(tmp_path):
    (tmp_path / "crowd.py").write_text("NUMBERS = [7, 13, 29, 31, 41, 77, 91, 101, 113, 129, 211, 233, 251]\n")
    alone, crowded = drawn(tmp_path, "alone"), drawn(tmp_path, "crowded")
    assert alone == crowded
    assert len(set(alone)) > 30


def test_the_gate_draws_the_same_cases_where_hypothesis_sees_a_ci(tmp_path):
    assert drawn(tmp_path) == drawn(tmp_path, CI="true")


def test_a_night_draws_new_cases_where_hypothesis_sees_a_ci_too(tmp_path):
    first, second = (drawn(tmp_path, profile="nightly", CI="true") for _ in range(2))
    assert len(set(first) - set(second)) > 10
