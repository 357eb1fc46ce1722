"""The frame of a report's page and its plain parts: sections and tables."""

from __future__ import annotations

from html import escape
from importlib import resources

from autocompress.report.facts import Table


def page(title: str, body: str, style: str = "") -> str:
    """A whole page: one file, no scripts, no links elsewhere.

    Args:
        style: rules behind those of every report.
    """
    rules = resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{rules}{style}</style>\n"
        f"</head>\n<body>\n{body}\n<footer>Written by autocompress.</footer>\n</body>\n</html>\n"
    )


def section(heading: str, *parts: str) -> str:
    """A heading and what is under it; nothing where that is empty."""
    content = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(heading)}</h2>\n{content}\n</section>" if content else ""


def html_table(table: Table, style: str = "") -> str:
    """A table whose first column heads its rows."""
    if not table.rows:
        return ""
    heads = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    rows = []
    for index, (first, *rest) in enumerate(table.rows):
        strong = ' class="strong"' if index == table.strong else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        rows.append(f'<tr{strong}><th scope="row">{escape(first)}</th>{cells}</tr>')
    named = f' class="{style}"' if style else ""
    return (
        f'<div class="scroll"><table{named}>\n<caption><span>'
        f"{escape(table.caption)}</span></caption>\n"
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{chr(10).join(rows)}\n</tbody></table></div>"
    )
