"""Run a workflow's own shell steps here, as its runner would: conditions, environment, outputs, paths and exit codes.

Steps that use an action are recorded and not run, and so are those that the caller names.
"""

import json
import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import yaml

_TOKEN = re.compile(r"'(?:[^']|'')*'|&&|\|\||!=|==|!|[A-Za-z_][\w-]*(?:\.[\w*-]+)*")
_WORDS = {"&&": " and ", "||": " or ", "!": " not ", "!=": "!=", "==": "==", "true": "True", "false": "False"}
_FUNCTIONS = ("success", "failure", "always", "fromJSON")


def load(path):
    """A workflow, with `on` under that name: YAML 1.1 reads it as true."""
    data = yaml.safe_load(Path(path).read_text())
    data["on"] = data.pop(True)
    return data


def evaluate(expression, context, has_failed=False):
    """The value of a GitHub expression over the few operators and functions that our workflows use."""

    def look_up(name):
        value = context
        for part in name.split("."):
            value = value.get(part, "") if isinstance(value, dict) else ""
        return value

    def python(match):
        token = match[0]
        if token.startswith("'"):
            return repr(token[1:-1].replace("''", "'"))
        if token in _WORDS or token in _FUNCTIONS:
            return _WORDS.get(token, token)
        return f"look_up({token!r})"

    functions = {
        "success": lambda: not has_failed,
        "failure": lambda: has_failed,
        "always": lambda: True,
        "fromJSON": json.loads,
    }
    text = " ".join(_TOKEN.sub(python, expression).split())
    return eval(text, {"__builtins__": {}, "look_up": look_up, **functions})


def fill(text, context):
    """A text with its `${{ }}` filled in."""

    def value(match):
        found = evaluate(match[1], context)
        return "" if found in (None, False) else str(found)

    return re.sub(r"\$\{\{(.*?)\}\}", value, str(text))


@dataclass
class Step:
    """What became of a step: "success", "failure", "skipped" or, of an action or a step left out, "not run"."""

    name: str
    outcome: str
    output: str = ""
    uses: dict = field(default_factory=dict)


@dataclass
class Job:
    """What became of a job; `summary` is its Markdown."""

    steps: list
    summary: str = ""

    @property
    def has_failed(self):
        return any(step.outcome == "failure" for step in self.steps)

    def outcomes(self):
        return {step.name: step.outcome for step in self.steps}

    def output(self):
        return "\n".join(f"--- {step.name}: {step.outcome}\n{step.output}" for step in self.steps)


def run_job(workflow, name, *, context, checkout, temporary, environment, left_out=()):
    """Run one job's steps; None where its condition keeps it from running.

    Args:
        workflow: as `load` gives it.
        name: the job's.
        context: what expressions see: `github`, `vars`.
        checkout: the repository, as the checkout step would leave it.
        temporary: the runner's folder for files.
        environment: of every step.
        left_out: names of steps that are not run.
    """
    job = workflow["jobs"][name]
    context = {**context, "runner": {"temp": str(temporary)}, "steps": {}}
    if not evaluate(job.get("if", "success()"), context):
        return None
    fill(job["runs-on"], context)  # an expression that cannot be evaluated would stop the job
    files = {
        variable: temporary / variable.lower() for variable in ("GITHUB_OUTPUT", "GITHUB_PATH", "GITHUB_STEP_SUMMARY")
    }
    for file in files.values():
        file.write_text("")
    base = {**environment, "RUNNER_TEMP": str(temporary), "CI": "true", **{k: str(file) for k, file in files.items()}}
    for level in (workflow, job):
        base |= {key: fill(value, context) for key, value in (level.get("env") or {}).items()}
    done = Job([])
    for number, step in enumerate(job["steps"]):
        title = step.get("name") or step.get("uses") or f"step {number}"
        if not evaluate(step.get("if", "success()"), context, done.has_failed):
            result = Step(title, "skipped")
        elif "uses" in step or title in left_out:
            inputs = {key: fill(value, context) for key, value in (step.get("with") or {}).items()}
            result = Step(title, "not run", uses=inputs)
        else:
            files["GITHUB_OUTPUT"].write_text("")
            path = os.pathsep.join([*reversed(files["GITHUB_PATH"].read_text().split()), base["PATH"]])
            own = {key: fill(value, context) for key, value in (step.get("env") or {}).items()}
            ran = subprocess.run(
                ["bash", "-e", "-c", fill(step["run"], context)],
                cwd=checkout,
                env={**base, **own, "PATH": path},
                capture_output=True,
                text=True,
                check=False,
            )
            result = Step(title, "failure" if ran.returncode else "success", ran.stdout + ran.stderr)
        outputs = dict(line.split("=", 1) for line in files["GITHUB_OUTPUT"].read_text().splitlines())
        if "id" in step:
            outcome = "success" if result.outcome == "not run" else result.outcome
            context["steps"][step["id"]] = {"outcome": outcome, "outputs": outputs}
        done.steps.append(result)
    done.summary = files["GITHUB_STEP_SUMMARY"].read_text()
    return done
