"""Self-contained pages of results: one HTML file with its text, tables, plots and pictures inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from jinja2 import Environment
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from flashdmd_ray.run.files import write_atomically

PALETTE = ("#0b66c3", "#d1495b", "#2a9d5c", "#8a5cc2", "#c77d0a", "#3aa6a6", "#77506b", "#5c677d")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # letters stay letters: they can be searched, and the file is small
    "svg.hashsalt": "flashdmd_ray",  # the same figures give the same bytes
    "font.family": ["sans-serif"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e6ea",
    "axes.edgecolor": "#8a939e",
    "axes.labelcolor": "#3c4650",
    "xtick.color": "#3c4650",
    "ytick.color": "#3c4650",
}


@dataclass(frozen=True)
class Curve:
    """A line of a plot. low, high: a band around it, as long as y; faint: behind the others, without an entry in the legend."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    colour: int = 0
    faint: bool = False


@dataclass(frozen=True)
class Section:
    """Part of a page, in this order. table: heading cells, then rows. plots: SVG, as `plot` returns it. pictures: (caption, PNG file)."""

    title: str
    text: Sequence[str] = ()
    table: Sequence[Sequence[str]] = ()
    plots: Sequence[str] = ()
    pictures: Sequence[tuple[str, Path]] = ()
    code: str = ""
    notes: Sequence[str] = ()


def plot(title: str, x_label: str, curves: Sequence[Curve], x_scale: str = "linear") -> str:
    """SVG of some curves; x_scale: "linear" or "log". The same curves give the same text."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            colour = PALETTE[curve.colour % len(PALETTE)]
            width, alpha = (0.8, 0.3) if curve.faint else (1.6, 1.0)
            label = None if curve.faint else curve.label
            axes.plot(curve.x, curve.y, color=colour, linewidth=width, alpha=alpha, label=label)
            if curve.low:
                axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
        axes.set_title(title, loc="left", fontsize=10, color="#1d2733")
        axes.set_xlabel(x_label)
        axes.set_xscale(x_scale)
        if x_scale == "log":
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.xaxis.set_minor_formatter(NullFormatter())
        if len({curve.label for curve in curves}) > 1:
            axes.legend(frameon=False, fontsize=8)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    return text[text.index("<svg") :]


def write_page(path: Path, title: str, lead: Sequence[str], sections: Sequence[Section]) -> Path:
    """Write the page; returns its path. lead: what a reader should know who reads nothing else."""
    shown = [(section, [(caption, _embedded(file)) for caption, file in section.pictures]) for section in sections]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    write_atomically(path, environment.from_string(PAGE).render(title=title, lead=lead, sections=shown) + "\n")
    return path


def as_markdown(table: Sequence[Sequence[str]]) -> str:
    """A table of a section as Markdown, figures aligned to the right."""
    heading, *rows = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([heading, "|---" + "|---:" * (len(table[0]) - 1) + "|", *rows])


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """Mean of the last `width` values at each place."""
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(width, i + 1) for i in range(len(values))]


def _embedded(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; background: #fff; max-width: 1080px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 10px; }
h2 { font-size: 18px; margin: 34px 0 8px; border-bottom: 1px solid #e3e6ea; padding-bottom: 4px; }
.lead { font-size: 17px; margin: 0 0 8px; }
p { margin: 6px 0; max-width: 82ch; }
.note { color: #5a6672; font-size: 13px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 10px 0; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px 5px 0; text-align: right; border-bottom: 1px solid #e9ecef; white-space: nowrap; }
th { font-weight: 600; color: #3c4650; }
th:first-child, td:first-child { text-align: left; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 14px; }
.plots svg { width: 100%; height: auto; }
figure { margin: 12px 0; overflow-x: auto; }
figcaption { color: #5a6672; font-size: 13px; }
img { max-width: 100%; height: auto; border: 1px solid #e9ecef; }
pre { background: #f5f7f9; padding: 12px; overflow-x: auto; font-size: 13px; line-height: 1.4; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for text in lead %}
<p class="lead">{{ text }}</p>
{% endfor %}
{% for section, pictures in sections %}
<h2>{{ section.title }}</h2>
{% for text in section.text %}
<p>{{ text }}</p>
{% endfor %}
{% if section.table %}
<div class="wide"><table>
<tr>{% for cell in section.table[0] %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in section.table[1:] %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endif %}
{% if section.plots %}
<div class="plots">
{% for svg in section.plots %}
<div>{{ svg | safe }}</div>
{% endfor %}
</div>
{% endif %}
{% for caption, data in pictures %}
<figure><img src="{{ data }}" alt="{{ caption }}"><figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
{% if section.code %}
<pre>{{ section.code }}</pre>
{% endif %}
{% for text in section.notes %}
<p class="note">{{ text }}</p>
{% endfor %}
{% endfor %}
</body>
</html>"""
