"""The quality page of one registration: one HTML string that needs nothing beside it, readable in light and dark."""

from __future__ import annotations

import base64
import math
import shlex
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined

from regtool.geometry.image import DisplacementField
from regtool.report.figures import PageContent, qc_png

__all__ = ["PageContent", "qc_html", "qc_png"]

STATUS = {"ok": ("good", "done"), "qc_failed": ("bad", "quality control failed")}

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root { --paper: #fbfbfa; --card: #fff; --ink: #1c1e21; --soft: #62676d; --line: #dfe1e4; --good: #12713c; --bad: #b3261e; --warn: #8a5a00 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #101214; --card: #191c1f; --ink: #e6e8ea; --soft: #9aa1a8; --line: #2e3338; --good: #5fd693; --bad: #ff8a80; --warn: #ffc35c }
}
* { box-sizing: border-box }
body { margin: 0; padding: 1.5rem; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 125rem; margin: auto }
h1 { font-size: 1.35rem; margin: 0 0 .3rem; overflow-wrap: anywhere }
h2 { font-size: 1rem; margin: 0 0 .5rem }
img { display: block; width: 100%; height: auto; border-radius: 6px }
figure { margin: 1rem 0; overflow-x: auto }
figure img { min-width: 60rem }
figcaption, .soft { color: var(--soft); font-size: .9rem }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 1rem }
section { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .9rem 1.1rem; overflow-x: auto }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; vertical-align: top; border-top: 1px solid var(--line) }
tr:first-child > * { border-top: 0 }
th { font-weight: normal; color: var(--soft); white-space: nowrap }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
.good { color: var(--good) } .bad { color: var(--bad) } .warn { color: var(--warn) }
.status { font-weight: 600 }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.5 ui-monospace, monospace }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<div><span class="status {{ tone }}">{{ status }}</span> <span class="soft">{{ subtitle }}</span></div>
{% if warnings %}
<ul class="warn">{% for text in warnings %}<li>{{ text }}</li>{% endfor %}</ul>
{% endif %}
<figure>
<img src="data:image/png;base64,{{ picture }}" alt="fixed, moving, warped, differences, deformed grid and Jacobian determinant">
<figcaption>{{ caption }}</figcaption>
</figure>
<div class="cards">
{% for heading, rows in tables %}
<section><h2>{{ heading }}</h2><table>{% for name, value in rows -%}
<tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>
{%- endfor %}</table></section>
{% endfor %}
{% if thresholds %}
<section><h2>Thresholds</h2><table>{% for name, value, limit, passed in thresholds -%}
<tr><th scope="row">{{ name }}</th><td>{{ value }}</td><td>limit {{ limit }}</td>
<td class="{{ 'good' if passed else 'bad' }}">{{ "pass" if passed else "FAIL" }}</td></tr>
{%- endfor %}</table></section>
{% endif %}
{% if command %}<section><h2>Command</h2><pre>{{ command }}</pre></section>{% endif %}
</div>
</main>
</body>
</html>
"""

CAPTION = (
    "Slices through the middle of the anatomy. Differences: orange where the fixed image is brighter, blue where the moving one is; both columns on "
    "one scale. The grid shows where each fixed point is read in the moving image, x + u(x). Jacobian determinant: 1 keeps the volume, blue is "
    "smaller and orange larger in the moving image, pink folds (0 or less)."
)


def qc_html(content: PageContent, png: bytes) -> str:
    """One self-contained page; every text is escaped, so a file name cannot become markup. png: the figure, `qc_png(content)`."""
    report = content.report
    status = str(report.get("status", "done"))
    tone, words = STATUS.get(status, ("warn", status.replace("_", " ")))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE).render(
        title=content.title,
        status=words,
        tone=tone,
        subtitle=", ".join(str(report[key]) for key in ("method", "device") if report.get(key)),
        warnings=report.get("warnings") or [],
        picture=base64.b64encode(png).decode("ascii"),
        caption=CAPTION,
        tables=[(heading, rows) for heading, rows in _tables(content) if rows],
        thresholds=[(_plain(name), number(value), number(limit), passed) for name, value, limit, passed in content.thresholds],
        command=_command(report.get("command")),
    )


def displacement_length(field: DisplacementField) -> tuple[float, float]:
    """Mean and maximum of |u| in mm, slab by slab so that no second field is made."""
    total, largest = 0.0, 0.0
    for row in range(field.grid.shape[0]):
        length = field.data[:, row].square().sum(dim=0).sqrt()
        total += float(length.sum(dtype=torch.float64))
        largest = max(largest, float(length.max()))
    return total / field.grid.voxels, largest


def number(value: object) -> str:
    """Four digits for floats; whatever else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "none" if value is None else str(value)
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:.0f}"


def _tables(content: PageContent) -> list[tuple[str, list[tuple[str, str]]]]:
    """The cards: (heading, rows of name and value). What the report lacks is left out."""
    report = content.report
    similarity, jacobian = report.get("similarity") or {}, report.get("jacobian") or {}
    mean, largest = displacement_length(content.displacement)
    result = []
    if similarity:
        result.append((f"similarity ({similarity.get('name', '')})", f"{number(similarity.get('before'))} → {number(similarity.get('after'))}"))
    for name, measure, unit in (("Dice", "dice", ""), ("TRE", "tre_mm", " mm")):
        before, after = ((report.get(when) or {}).get(measure) for when in ("before", "after"))
        if before and after:
            result.append((f"{name}, mean", f"{number(before['mean'])} → {number(after['mean'])}{unit}"))
    result.append(("displacement, mean", f"{number(mean)} mm"))
    result.append(("displacement, largest", f"{number(largest)} mm"))
    if "folding_percent" in jacobian:
        result.append(("folding", f"{number(jacobian['folding_percent'])} %"))
    result += [(f"Jacobian {key.replace('_', ' ')}", number(jacobian[key])) for key in ("min", "max", "mean", "sd_log") if key in jacobian]
    stages = [(str(s.get("name")), _stage(s)) for s in report.get("stages") or []]
    seconds = [(name, f"{number(value)} s") for name, value in (report.get("seconds") or {}).items()]
    return [("Result", result), ("Stages", stages), ("Seconds", seconds), ("Images", _images(report)), ("Run", _run(report))]


def _stage(stage: dict[str, Any]) -> str:
    """`kept, similarity 0.5, 1.2 s`."""
    out = ["kept" if stage.get("kept") else "rolled back"]
    if stage.get("similarity") is not None:
        out.append(f"similarity {number(stage['similarity'])}")
    if stage.get("seconds") is not None:
        out.append(f"{number(stage['seconds'])} s")
    return ", ".join(out)


def _images(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Path, size and spacing of both images."""
    rows = []
    for role in ("fixed", "moving"):
        facts = report.get(role) or {}
        size = " × ".join(str(n) for n in facts.get("size") or [])
        spacing = " × ".join(number(s) for s in facts.get("spacing") or [])
        rows += [(name, value) for name, value in ((role, str(facts.get("path") or "")), ("size", size), ("spacing, mm", spacing)) if value]
    return rows


def _run(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Method, model, device, seed, memory, versions."""
    model = report.get("model") or {}
    rows = [(key, str(report[key])) for key in ("method", "device", "seed") if report.get(key) is not None]
    if model:
        rows.append(("model", " ".join(str(x) for x in (model.get("name"), (model.get("sha256") or "")[:12]) if x)))
    if report.get("peak_memory_mb") is not None:
        rows.append(("peak memory", f"{number(report['peak_memory_mb'])} MB"))
    return rows + [(str(name), str(version)) for name, version in (report.get("versions") or {}).items()]


def _command(command: object) -> str:
    """As it was typed, whether the report holds one string or the words."""
    return shlex.join(str(word) for word in command) if isinstance(command, list | tuple) else str(command or "")


def _plain(name: str) -> str:
    """`max_tre_mm` as `max tre mm`."""
    return name.replace("_", " ")
