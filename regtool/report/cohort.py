"""The page of a cohort: what is not done, what stands out, the summary, Dice label by label, distributions, and every pair with its own page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np

from regtool.report.page import TEMPLATE, environment, number

Row = Mapping[str, Any]

OUTLIER = 3.5  # robust z (Iglewicz and Hoaglin 1993)
LEAST, MOST = 5, 50  # of the ranking that are shown
MEASURES = (  # column, name, worse where it is: higher (1), lower (-1), or no matter (0)
    ("dice", "Dice", -1),
    ("tre_mm", "landmark error, mm", 1),
    ("similarity", "similarity", -1),
    ("displacement_mm_mean", "mean displacement, mm", 1),
    ("jacobian_sd_log", "SD of the log Jacobian", 1),
    ("folding_percent", "folding, %", 1),
    ("seconds", "seconds", 0),
)
COLUMNS = ("dice_after", "tre_mm_after", "similarity_after", "displacement_mm_mean", "folding_percent", "seconds")
STATES = {"ok": ("done", "good"), "qc_failed": ("quality control failed", "bad"), "failed": ("failed", "bad"), "not_run": ("not run", "warn")}
LEFT, RIGHT, ROW, BOX = 110, 790, 30, 10  # of the box plots, in units of their picture
BINS, WIDTH, HEIGHT = 24, 400, 118  # of the histograms


def cohort_html(title: str, rows: Sequence[Row], links: Mapping[str, str], command: str) -> str:
    """One page that needs nothing but the pairs' own pages beside it. rows: as in results.csv; links: relative paths of those pages, by id."""
    counts = {status: sum(row["status"] == status for row in rows) for status in STATES}
    worst = next((status for status in ("failed", "qc_failed", "not_run") if counts[status]), "ok")
    done = [row for row in rows if row["status"] in ("ok", "qc_failed")]
    hrefs = {name: quote(link) for name, link in links.items()}
    style = "".join((TEMPLATE / name).read_text(encoding="utf-8") for name in ("style.css", "cohort.css"))
    ranked = ranking(done)
    most = min(MOST, max(LEAST, sum(score > OUTLIER for _, score, _ in ranked)))
    used = [name for name in COLUMNS if any(name in row for row in rows)]
    return str(
        environment().get_template("cohort.html").render(
            title=title,
            style=style,
            tone=STATES[worst][1],
            verdict="All done" if worst == "ok" else "Not complete" if worst == "not_run" else "Not all good",
            counts=f"{len(rows)} pairs: " + ", ".join(f"{n} {STATES[status][0]}" for status, n in counts.items() if n),
            failed=[(row["id"], hrefs.get(row["id"]), row.get("error", "")) for row in rows if row["status"] == "failed"],
            outliers=[_outlier(k, *one, hrefs) for k, one in enumerate(ranked[:most], 1)],
            limit=OUTLIER,
            summary_columns=("pairs", "median", "quartiles", "mean", "SD", "smallest", "largest"),
            summary=_summary(done),
            labels=_boxes(done),
            histograms=[plot for name, _, found in _measures(done) if (plot := _histogram(name, found)) is not None],
            pair_columns=[name.replace("_after", "").replace("_", " ") for name in used],
            pairs=[(r["id"], hrefs.get(r["id"]), *STATES[r["status"]], [_cell(r.get(name)) for name in used]) for r in rows],
            command=command,
        )
    )  # fmt: skip


def robust_z(values: np.ndarray) -> np.ndarray:
    """0.6745 (x - median) / MAD; all zero where half of the values are the same (Iglewicz and Hoaglin 1993)."""
    if not len(values):
        return values
    deviation = values - np.median(values)
    spread = float(np.median(np.abs(deviation)))
    return np.zeros_like(deviation) if spread == 0 else 0.6745 * deviation / spread


def ranking(rows: Sequence[Row]) -> list[tuple[Row, float, str]]:
    """(row, its largest robust z in the direction that is worse, the measures beyond the limit), the worst first."""
    found: dict[int, list[tuple[float, str]]] = {}
    for name, sign, measured in _measures(rows):
        when, known = measured[-1]
        for (k, value), score in zip(known, robust_z(np.array([value for _, value in known])), strict=True):
            if sign and when != "before":
                found.setdefault(k, []).append((sign * float(score), f"{name} {number(value)}"))
    out = []
    for k, scores in found.items():
        scores.sort(key=lambda one: -one[0])
        beyond = [text for score, text in scores if score > OUTLIER]
        out.append((rows[k], scores[0][0], ", ".join(beyond or [scores[0][1]])))
    return sorted(out, key=lambda one: (-one[1], str(one[0]["id"])))


def _measures(rows: Sequence[Row]) -> list[tuple[str, int, list[tuple[str, list[tuple[int, float]]]]]]:
    """(name, sign, [(when, [(row, value)])]): before and after where it was measured twice, else once; each kind of similarity by itself."""
    out = []
    for column, name, sign in MEASURES:
        similar = column == "similarity"
        for kind in sorted({str(row["similarity"]) for row in rows}) if similar else [""]:
            keys = [("before", f"{column}_before"), ("after", f"{column}_after"), *([("", column)] if not similar else [])]
            own = [k for k, row in enumerate(rows) if not kind or row["similarity"] == kind]
            values = [(when, [(k, float(rows[k][key])) for k in own if rows[k].get(key) is not None]) for when, key in keys]
            if known := [(when, found) for when, found in values if found]:
                out.append((f"{name} ({kind})" if kind else name, sign, known))
    return out


def _outlier(rank: int, row: Row, score: float, reason: str, hrefs: Mapping[str, str]) -> dict[str, Any]:
    facts = {"rank": rank, "id": row["id"], "link": hrefs.get(row["id"]), "error": row.get("error", "")}
    return {**facts, "score": f"{score:.1f}", "tone": "bad" if score > OUTLIER else "", "reason": reason}


def _cell(value: Any) -> str:
    return "" if value is None else number(value)


def _values(rows: Sequence[Row], column: str) -> np.ndarray:
    return np.array([float(row[column]) for row in rows if row.get(column) is not None])


def _summary(rows: Sequence[Row]) -> list[tuple[str, str, list[str]]]:
    out = []
    for name, _, measured in _measures(rows):
        for when, known in measured:
            v = np.array([value for _, value in known])
            q1, median, q3 = np.percentile(v, (25, 50, 75))
            spread = float(v.std(ddof=1)) if len(v) > 1 else 0.0
            numbers = [number(x) for x in (float(v.mean()), spread, float(v.min()), float(v.max()))]
            out.append((name, when, [str(len(v)), number(float(median)), f"{number(float(q1))} to {number(float(q3))}", *numbers]))
    return out


def _boxes(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Box plots of each label's Dice, the mean of all first, then by median after (Balakrishnan 2018, figure 5)."""
    labels = {name.rpartition("_")[2] for row in rows for name in row if name.startswith("dice_after_")}
    if not labels:
        return None
    ordered = sorted(labels, key=lambda label: (-float(np.median(_values(rows, f"dice_after_{label}"))), int(label)))
    drawn = []
    for k, label in enumerate([*([""] if len(ordered) > 1 else []), *ordered]):
        middle = 8 + ROW * k + ROW / 2
        boxes = []
        for when, shift in (("before", -BOX / 2 - 1), ("after", BOX / 2 + 1)):
            values = _values(rows, f"dice_{when}_{label}" if label else f"dice_{when}")
            if len(values):
                boxes.append(_box(values, when, middle + shift))
        drawn.append({"name": f"label {label}" if label else "mean", "middle": middle, "boxes": boxes})
    ticks = [(_x(t / 5), f"{t / 5:.1f}") for t in range(6)]
    return {"height": 8 + ROW * len(drawn) + 28, "left": LEFT, "rows": drawn, "ticks": ticks}


def _box(values: np.ndarray, when: str, middle: float) -> dict[str, Any]:
    q1, median, q3 = (float(q) for q in np.percentile(values, (25, 50, 75)))
    reach = 1.5 * (q3 - q1)
    within = values[(values >= q1 - reach) & (values <= q3 + reach)]
    low, high = float(within.min()), float(within.max())
    return {
        "when": when,
        "middle": middle,
        "top": middle - BOX / 2,
        "thick": BOX,
        "low": _x(low),
        "high": _x(high),
        "first": _x(q1),
        "width": round(_x(q3) - _x(q1), 2),
        "median": _x(median),
        "beyond": [_x(float(v)) for v in sorted(values[(values < low) | (values > high)])],
        "text": f"{when}: median {number(median)}, quartiles {number(q1)} to {number(q3)}, {len(values)} pairs",
    }


def _x(value: float) -> float:
    return round(LEFT + (RIGHT - LEFT) * value, 2)


def _histogram(name: str, measured: Sequence[tuple[str, Sequence[tuple[int, float]]]]) -> dict[str, Any] | None:
    """Before and after over each other, in the same bins; None where all values are the same."""
    found = [(when, np.array([value for _, value in known])) for when, known in measured]
    low, high = (float(pick([pick(values) for _, values in found])) for pick in (np.min, np.max))
    if low == high:
        return None
    edges = np.linspace(low, high, BINS + 1)
    counted = [(when, np.histogram(values, edges)[0]) for when, values in found]
    most = max(int(n.max()) for _, n in counted)
    bars = [
        {
            "when": when or "after",
            "x": round(k * WIDTH / BINS, 2),
            "y": round(HEIGHT + 2 - HEIGHT * n / most, 2),
            "width": round(WIDTH / BINS - 1, 2),
            "height": round(HEIGHT * n / most, 2),
            "text": f"{n} pairs {when}: {number(float(edges[k]))} to {number(float(edges[k + 1]))}",
        }
        for when, counts in counted
        for k, n in enumerate(int(c) for c in counts)
        if n
    ]
    ticks = [(0, number(low), "start"), (WIDTH / 2, number((low + high) / 2), "middle"), (WIDTH, number(high), "end")]
    return {"name": name, "bars": bars, "ticks": ticks}
