"""The report as one HTML file that needs nothing else: script, style, data and plotting library are all in it.

Its content security policy allows the scripts written here, by their hashes, and no request whatever; so a name or a
message in the data can neither run nor fetch anything, even if some text were not escaped.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from .contents import Contents

_HERE = Path(__file__).parent
POINT_TEXTS = ("commit", "time", "driver", "path")
POINT_NUMBERS = ("us", "low", "high", "floor", "runs", "mhz")


def render(contents: Contents) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"us": _us, "percent": _percent, "change": _change, "day": _day}
    scripts = {"plotly": get_plotlyjs(), "page": (_HERE / "page.js").read_text()}
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'unsafe-inline'; img-src data: blob:; "
        f"script-src {' '.join(_hash(script) for script in scripts.values())}"
    )
    return environment.get_template("page.html.j2").render(
        # What is ours goes in as it is; all else is escaped.
        scripts={name: Markup(script) for name, script in scripts.items()},
        style=Markup((_HERE / "page.css").read_text()),
        policy=policy,
        data=_compact(contents.series),
        **{name: value for name, value in vars(contents).items() if name != "decisions"},
        decisions={
            layer: {platform: asdict(cell) for platform, cell in row.items()}
            for layer, row in contents.decisions.items()
        },
    )


def _compact(series: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The series for the page's script: points as rows without names, and each text once.

    Commits, times and paths are those of hundreds of points; a page of 400 series would else be 40 MiB.
    """
    texts: dict[str, int] = {}

    def shorter(value: Any) -> Any:
        return texts.setdefault(value, len(texts)) if isinstance(value, str) else value

    names = POINT_TEXTS + POINT_NUMBERS
    rows = [
        {
            **one,
            "points": [
                [*(shorter(point[name]) for name in POINT_TEXTS), *(_rounded(point[name]) for name in POINT_NUMBERS)]
                for point in one["points"]
            ],
        }
        for one in series
    ]
    return {"texts": list(texts), "names": names, "num_texts": len(POINT_TEXTS), "series": rows}


def _rounded(value: float | None) -> float | None:
    """To a tenth of a nanosecond, where a value is in microseconds."""
    return None if value is None else round(value, 4)


def _hash(script: str) -> str:
    """A script's hash as a content security policy names it; browsers hash what stands between the tags."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _us(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _change(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1%}"


def _day(time: Any) -> str:
    return str(time)[:16].replace("T", " ")
