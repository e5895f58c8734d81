"""The gate draws the same cases wherever it runs."""

import json
import subprocess
import sys

CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
if sys.argv[2] == "crowded":
    import crowd  # a local module full of constants, as a user's project is
from moegate.conformance.profiles import explore
from moegate.conformance.strategies import align_specs, experts_specs
from moegate.conformance.subject import Capabilities
drawn = []
for strategies in (experts_specs, align_specs):
    explore(strategies("cpu", Capabilities()), lambda spec: drawn.append(repr(spec)), name="x", examples=60)
print(json.dumps(drawn))
"""


def drawn(folder, company):
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), company], capture_output=True, text=True, check=True, cwd=folder
    )
    return json.loads(child.stdout)


def test_the_gate_draws_the_same_cases_whatever_else_is_loaded(tmp_path):
    (tmp_path / "crowd.py").write_text("NUMBERS = [7, 13, 29, 31, 41, 77, 91, 101, 113, 129, 211, 233, 251]\n")
    alone, crowded = drawn(tmp_path, "alone"), drawn(tmp_path, "crowded")
    assert alone == crowded
    assert len(set(alone)) > 60
