"""The report for people and for tools: lines for a terminal, JUnit for a CI server, Markdown for a pull request.

Each is a function of the report's plain data alone (`report.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

Report = dict[str, Any]


def used_text(value: float | str | None) -> str:
    """A share of the budget with two decimals; `-` where there is none."""
    return "-" if value is None else f"{float(value):.2f}"


def as_lines(report: Report) -> Iterator[str]:
    """The table in plain text."""
    by_variant = ", ".join(f"{n} {variant}" for variant, n in report["executions_by_variant"].items())
    yield f"{report['subject']} on {report['device']}: {report['executions']} executions ({by_variant})"
    if report["last_run"]:
        yield f"this adapter was last run with: {report['last_run']}"
    for row in report["properties"]:
        used = used_text(row["budget_used"])
        yield f"{row['id']:<11} {row['cases']:>6} cases  budget used {used:>6}  {row['verdict']:<9} {row['sentence']}"
    yield f"cases whose numbers were judged against a budget or another call: {report['value_cases']}"
    yield from _pairs(report)
    yield f"numerics judged by: {', '.join(f'{k}={v}' for k, v in report['numerics'].items())}"
    for reason, count in report["skipped"].items():
        yield f"skipped ({count}): {reason}"
    if report["kernels"]:
        variants = ", ".join(f"{count} {name}" for name, count in report["kernels"].items())
        yield f"kernel variants: {sum(report['kernels'].values())} ({variants})"
    for fact, count in report["facts"].items():
        yield f"{fact}: {count}"
    yield from known_lines(report)


def _pairs(report: Report) -> Iterator[str]:
    pairs = report["feature_pairs"]
    yield f"feature pairs run: {pairs['run']} of {pairs['declared']} declared, each at least {pairs['least']} times"


def known_lines(report: Report) -> Iterator[str]:
    """What became of each known failure."""
    for row in report["known_failures"]:
        what = row.get("property") or f"{row['facet']} (crash)"
        met = f"{row['failed']} of {row['cases']} cases" if row["severity"] == "wrong" else f"{row['cases']} cases"
        yield f"known failure, {row['state']}: {what}, {met}: {row['issue']} (until {row['expires']})"


def as_junit(report: Report) -> str:
    """One test case a property; what was not judged is a skipped one, and what makes the run fail a failed one."""
    rows = report["properties"]
    whole = [
        (kind, reason) for kind in ("not_judged", "stale", "errors", "inconclusive") for reason in report.get(kind, ())
    ]
    failures = sum(row["verdict"] == "violated" for row in rows) + len(whole)
    suite = ElementTree.Element(
        "testsuite",
        name=f"moegate.{report['subject']}.{report['device']}",
        tests=str(len(rows) + len(report["skipped"]) + len(whole)),
        failures=str(failures),
        errors="0",
        skipped=str(len(report["skipped"])),
        time=str(report.get("seconds", 0)),
    )
    for row in rows:
        case = _case(suite, row["id"].split("-")[0], f"{row['id']}: {row['sentence']}")
        if row["verdict"] == "violated":
            failure = ElementTree.SubElement(case, "failure", message=row["finding"].partition("\n")[0], type=row["id"])
            failure.text = row["finding"]
        said = f"{row['cases']} cases, budget used {used_text(row['budget_used'])}, {row['verdict']}"
        ElementTree.SubElement(case, "system-out").text = said
    for kind, reason in whole:
        ElementTree.SubElement(_case(suite, "run", reason), "failure", message=reason, type=kind)
    for reason, count in report["skipped"].items():
        ElementTree.SubElement(_case(suite, "skipped", reason), "skipped", message=f"{count} times")
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _case(suite: ElementTree.Element, family: str, name: str) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", classname=f"{suite.get('name')}.{family}", name=name)


def as_markdown(report: Report) -> str:
    """A comment on a pull request: the verdict, each finding with its case, and the whole table folded away."""
    holds = report["verdict"] == "holds"
    pairs = report["feature_pairs"]
    lines = [
        f"### moegate: `{report['subject']}` on {report['device']}: {'✅' if holds else '❌'} {report['verdict']}",
        "",
        f"{report['executions']:,} executions, {pairs['run']} of {pairs['declared']} feature pairs, "
        f"{len(report['properties'])} properties, profile {report['profile']}.",
    ]
    violated = [row for row in report["properties"] if row["verdict"] == "violated"]
    for row in violated:
        body = row["finding"].partition("\n")[2]
        lines += ["", f"**{row['id']}**: {row['sentence']}", "", "```", *_undented(body), "```"]
    lines += [f"\n**not judged**: {reason}" for reason in report["not_judged"]]
    lines += [f"\n**stale**: {reason}" for reason in report["stale"]]
    lines += [f"\n**error**: {reason}" for reason in report.get("errors", ())]
    lines += [f"\n**inconclusive**: {reason}" for reason in report.get("inconclusive", ())]
    known = list(known_lines(report))
    lines += ["", *(f"* {line}" for line in known)] if known else []
    lines += [
        "",
        "<details><summary>all properties</summary>",
        "",
        "| property | cases | budget used (median) | verdict | what must hold |",
        "|---|--:|--:|---|---|",
    ]
    for row in report["properties"]:
        used = used_text(row["budget_used"])
        median = "" if row["budget_used_median"] is None else f" ({used_text(row['budget_used_median'])})"
        sentence = row["sentence"].replace("|", "\\|")
        lines.append(f"| {row['id']} | {row['cases']} | {used}{median} | {row['verdict']} | {sentence} |")
    lines += ["", "</details>", ""]
    return "\n".join(lines)


def _undented(text: str) -> list[str]:
    return [line.removeprefix("  ") for line in text.splitlines()]


def write_report(report: Report, path: str) -> None:
    """Write a report in the format that the file's name says: `.xml` JUnit, `.md` Markdown, anything else JSON."""
    text = {".xml": as_junit, ".md": as_markdown}.get(Path(path).suffix, lambda r: json.dumps(r, indent=2) + "\n")
    Path(path).write_text(text(report))
