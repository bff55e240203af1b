"""One HTML file that needs no network; no clock and no random ids in it: the same run gives the same bytes."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Final

import msgspec

from loadtest.report import Table
from loadtest.simulator.charts import Chart


class Section(msgspec.Struct, frozen=True, kw_only=True):
    title: str
    paragraphs: list[str] = []
    tables: list[Table] = []
    charts: list[Chart] = []


class Page(msgspec.Struct, frozen=True, kw_only=True):
    title: str
    verdict: list[str]
    """What to take away, a sentence or two each."""
    sections: list[Section]
    command: str
    """What makes this page again."""


STYLE: Final = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: #222; background: #fff;
  max-width: 1080px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 12px; }
h2 { font-size: 19px; margin: 40px 0 8px; padding-top: 10px; border-top: 1px solid #ddd; }
h3 { font-size: 15px; margin: 26px 0 2px; }
p { margin: 6px 0; max-width: 80ch; }
.verdict { background: #f3f7fb; border-left: 4px solid #0072B2; padding: 10px 16px; margin: 14px 0; }
.note, figcaption { color: #555; font-size: 13px; max-width: 95ch; }
figure { margin: 22px 0; }
figure h3 { margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: 6px 0 14px; }
th, td { padding: 5px 10px; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th { color: #444; font-weight: 600; border-bottom: 2px solid #bbb; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; }
td:last-child { white-space: normal; }
table.words td, table.words th { text-align: left; white-space: normal; }
tbody tr:hover { background: #f7f7f7; }
code { display: block; font: 12px/1.5 ui-monospace, Menlo, Consolas, monospace; background: #f5f5f5;
  border: 1px solid #e2e2e2; border-radius: 4px; padding: 8px 12px; white-space: pre-wrap; overflow-wrap: anywhere; }
@media print {
  @page { size: A4; margin: 12mm; }
  body { max-width: none; padding: 0; font-size: 11px; }
  figure, table, .verdict { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  table { font-size: 8.5px; }
  th, td { padding: 2px 4px; }
}
"""

DRAW: Final = """
const draw = chart => Plotly.newPlot(chart.id, chart.data, chart.layout, {responsive: true, displayModeBar: false});
charts.forEach(draw);
addEventListener("beforeprint", () => charts.forEach(chart => Plotly.Plots.resize(chart.id)));
"""


def render(page: Page) -> str:
    """The page with its plots and the program that draws them (plotly, MIT licence), about 5 MB."""
    from plotly.offline import get_plotlyjs  # 5 MB of text, that a run without a page does not need

    charts = [chart for section in page.sections for chart in section.charts]
    drawn = [{"id": chart.id, "data": chart.data, "layout": chart.layout} for chart in charts]
    # Inside a script element only `</` could end it before its time.
    data = msgspec.json.encode(drawn).decode().replace("</", "<\\/")
    verdict = "".join(f"<p>{_text(sentence)}</p>" for sentence in page.verdict)
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(page.title)}</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            f"<h1>{_text(page.title)}</h1>",
            f'<div class="verdict">{verdict}</div>' if verdict else "",
            *(_section(section) for section in page.sections),
            "<h2>Made by</h2>",
            f"<code>{_text(page.command)}</code>",
            "<noscript><p>The plots need JavaScript; the tables do not.</p></noscript>",
            f"<script>{get_plotlyjs()}</script>" if charts else "",
            f"<script>const charts = {data};{DRAW}</script>" if charts else "",
            "</body>",
            "</html>",
            "",
        ]
    )


def _section(section: Section) -> str:
    parts = [f"<h2>{_text(section.title)}</h2>"]
    parts += [f"<p>{_text(paragraph)}</p>" for paragraph in section.paragraphs]
    parts += [_table(table) for table in section.tables]
    parts += [_figure(chart) for chart in section.charts]
    return "\n".join(parts)


def _table(table: Table) -> str:
    head = "".join(f"<th>{_text(column)}</th>" for column in table.columns)
    rows = "\n".join(_row(row) for row in table.rows)
    title = f"<h3>{_text(table.title)}</h3>" if table.title else ""
    # Figures stand to the right; a table without a title of its own is one of words.
    kind = "" if table.title else ' class="words"'
    return (
        f'{title}<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )


def _row(cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>"


def _figure(chart: Chart) -> str:
    return (
        f"<figure><h3>{_text(chart.title)}</h3><figcaption>{_text(chart.note)}</figcaption>\n"
        f'<div id="{_text(chart.id)}" style="height: {chart.height_px}px"></div></figure>'
    )


def _text(text: str) -> str:
    return html.escape(text)
