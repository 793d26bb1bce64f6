"""One HTML page with tables and pictures, which needs no other file."""

import base64
from collections.abc import Mapping, Sequence
from html import escape

from saqqara import __version__
from saqqara.configs.json_text import json_text
from saqqara.evaluation.result import Result

from .summary import group_cells, main_figure, overall_cells, summarise

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ccc; text-align: right }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% } pre { background: #f4f4f4; padding: .7rem; overflow-x: auto }
"""

ABOUT = {
    "needle": "One fact at five depths of a text. Score: the answer holds the value.",
    "ruler": "Generated tasks in the style of RULER. Score: share of the reference strings found.",
    "perplexity": "Real text after a context that went through retention; lower is better.",
    "agreement": "Along full's greedy answers: tokens that the setting holds most likely, too.",
}


def page(results: Sequence[Result], pictures: Mapping[str, bytes]) -> str:
    """The page.

    Args:
        results: one of each task, all with the same settings.
        pictures: PNG by name; `<task>-...` stand with their task, others at the end.
    """
    model = results[0].model
    parts = [
        f"<h1>Retention settings compared</h1><p>Model <code>{escape(model)}</code>, Saqqara "
        f"{escape(__version__)}. In brackets: 95% intervals (proportions: Wilson; means and "
        "ratios: bootstrap over prompts). Kept is the expected share of the prompt's keys and "
        "values, not counting that pages are filled up.</p>",
        "<h2>Summary</h2>",
        _table(_summary(results)),
    ]
    used = set()
    for result in results:
        mine = [name for name in pictures if name.startswith(f"{result.task}-")]
        used |= {*mine}
        parts.append(_section(result, [(name, pictures[name]) for name in mine]))
    parts += [
        f"<h2>Tokens kept</h2><p>By layer and kv head, expected where heads differ.</p>"
        f"{_image(name, data)}"
        for name, data in pictures.items()
        if name not in used
    ]
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Retention settings compared"
        f"</title><style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _summary(results: Sequence[Result]) -> list[list[str]]:
    """Every setting with the main figure of every task."""
    header, columns = ["retention", "kept"], []
    for result in results:
        rows = summarise(result)
        header.append(f"{result.task}: {main_figure(rows[0])[0]}")
        columns.append([main_figure(row) for row in rows])
    cells = [header]
    for at, label in enumerate(results[0].labels):
        values = [estimate.text(form) for _, estimate, form in (column[at] for column in columns)]
        cells.append([label, f"{results[0].kept_shares[label]:.1%}", *values])
    return cells


def _section(result: Result, pictures: Sequence[tuple[str, bytes]]) -> str:
    about = escape(ABOUT.get(result.task, ""))
    parts = [f"<h2>{escape(result.task)}</h2><p>{about}</p>", _table(overall_cells(result))]
    if len(result.groups) > 1:
        parts.append(_table(group_cells(result)))
    parts += [_image(name, data) for name, data in pictures]
    settings = json_text({"settings": result.settings, "retentions": result.retentions}, indent=1)
    parts.append(f"<details><summary>settings</summary><pre>{escape(settings)}</pre></details>")
    return "".join(parts)


def _table(cells: Sequence[Sequence[str]]) -> str:
    header = "".join(f"<th>{escape(cell)}</th>" for cell in cells[0])
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in cells[1:]
    )
    return f"<table><tr>{header}</tr>{rows}</table>"


def _image(name: str, data: bytes) -> str:
    text = base64.b64encode(data).decode("ascii")
    return f'<p><img alt="{escape(name)}" src="data:image/png;base64,{text}"></p>'
