"""Tables and curves as Markdown, HTML, LaTeX, CSV and text for the terminal.

Every format prints the text that the cells hold, so all print the same numbers. Whatever a template prints is
escaped for its format unless it was made here as markup.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup
from tabulate import SEPARATING_LINE, tabulate

from bench import __version__, shipped
from bench.errors import UserError
from bench.files import write_text
from bench.report import figures, tables
from bench.report.collect import Section, answers, collect
from bench.report.numbers import numbers
from bench.report.tables import Cell, Row, Table
from bench.score.conventions import convention
from bench.store.results import Store


@dataclass(frozen=True)
class Part:
    """What a report says of one section."""

    section: Section
    summary: Table
    classes: Table
    jobs: Table
    curve: Markup


def render_all(
    store: Store, out: Path, how: str = "default", protocols: Sequence[str] | None = None
) -> Mapping[str, Path]:
    """Write report.md, report.html, report.tex and report.csv of what is in a results folder.

    Args:
        store: the results folder.
        out: where the files go.
        how: name of the convention that the tables follow; the CSV has all.
        protocols: labels of those wanted; None: all.

    Returns:
        Paths by format: "markdown", "html", "latex", "csv".

    Raises:
        UserError: nothing to report, an unknown name, or a folder that cannot be written.
    """
    convention(how)
    sections = collect(store, protocols)
    frames = [numbers([section]) for section in sections]
    parts = [_part(section, frame, how) for section, frame in zip(sections, frames, strict=True)]
    overview = tables.overview([(part.section, part.summary) for part in parts], how)
    words = {"version": __version__, "how": how, "convention": convention(how)}
    says = {**words, "overview": overview, "parts": parts}
    table = pd.concat(frames).to_csv(index=False, float_format="%.6f", lineterminator="\n")
    content = {
        "markdown": ("report.md", _template("report.md.j2", markdown).render(says)),
        "html": ("report.html", _template("report.html.j2").render(says)),
        "latex": ("report.tex", _template("report.tex.j2", latex).render(says)),
        "csv": ("report.csv", table),
    }
    return {kind: _write(out / name, text) for kind, (name, text) in content.items()}


def terminal_text(store: Store, protocols: Sequence[str], how: str = "default") -> str:
    """The tables of some protocols as plain text, with footnotes and the convention.

    Args:
        store: the results folder.
        protocols: their labels.
        how: name of the convention.
    """
    present = [
        wanted for wanted in protocols if any(answers(link.protocol, wanted) for link in store.links())
    ]
    if not present:
        return f"nothing finished yet of {', '.join(protocols)}"
    sections = collect(store, present)
    return "\n\n".join(text_table(tables.summary(section, numbers([section]), how)) for section in sections)


def _part(section: Section, measured: pd.DataFrame, how: str) -> Part:
    return Part(
        section,
        tables.summary(section, measured, how, intervals=True),
        tables.per_class(section, measured, how),
        tables.jobs(section),
        Markup(figures.curve(section, figures.lines(section, measured, how))),
    )


def _write(path: Path, text: str) -> Path:
    """A file that is seen whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        what = f"cannot be written ({error.strerror}); choose another with --out DIR"
        raise UserError(f"report folder {path.parent}: {what}") from None
    return path


def _template(name: str, escape: Callable[[str], str] | None = None) -> jinja2.Template:
    """A template that escapes everything it prints but markup: for HTML if no other way is given."""

    def finalize(value: Any) -> Any:
        return value if escape is None or isinstance(value, Markup) else Markup(escape(str(value)))

    marks = {"block": "{% %}", "variable": "{{ }}", "comment": "{# #}"}
    if name.endswith(".tex.j2"):  # braces are LaTeX's own
        marks = {"block": "<% %>", "variable": "<< >>", "comment": "<# #>"}
    strings: dict[str, Any] = {
        f"{kind}_{side}_string": mark
        for kind, pair in marks.items()
        for side, mark in zip(("start", "end"), pair.split(), strict=True)
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(shipped.folder("reports") / "templates"),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **strings,
    )
    environment.globals["pipe"] = lambda table: Markup(pipe_table(table))
    environment.globals["tabular"] = lambda table: Markup(latex_tabular(table))
    return environment.get_template(name)


# ---- escaping ----------------------------------------------------------------------------------------------

LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%",
    "_": r"\_", "^": r"\^{}", "~": r"\~{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    "±": r"$\pm$", "\n": " ",
}  # fmt: skip


def latex(text: str) -> str:
    """Text for LaTeX: every special character is printed as it is."""
    return "".join(LATEX.get(letter, letter) for letter in text)


def markdown(text: str) -> str:
    """Text for Markdown, also inside a table."""
    return re.sub(r"([\\`*_\[\]<>|~&])", r"\\\1", text).replace("\n", " ")


# ---- tables ------------------------------------------------------------------------------------------------


def pipe_table(table: Table) -> str:
    """A table in Markdown: best bold, second underlined, rows that stand apart after an empty one."""

    def cell(c: Cell) -> str:
        text = markdown(c.text)
        text = {"best": f"**{text}**", "second": f"<u>{text}</u>"}.get(c.rank, text)
        return text + _superscript(table.marks(c.notes))

    def row(r: Row) -> list[str]:
        return [markdown(r.title) + _superscript(table.marks(r.notes)), *map(cell, r.cells)]

    body = _apart(table, row, [""] * len(table.columns))
    align = ("left", *["right"] * (len(table.columns) - 1))
    headers = [markdown(c) for c in table.columns]
    return tabulate(
        body, headers=headers, tablefmt="pipe", disable_numparse=True, colalign=align if body else None
    )


def latex_tabular(table: Table) -> str:
    """A table as a LaTeX tabular with booktabs rules; rows that stand apart come after a rule."""

    def marks(notes: Sequence[str]) -> str:
        return f"$^{{{','.join(map(str, table.marks(notes)))}}}$" if notes else ""

    def cell(c: Cell) -> str:
        text = latex(c.text)
        text = {"best": rf"\textbf{{{text}}}", "second": rf"\underline{{{text}}}"}.get(c.rank, text)
        return text + marks(c.notes)

    def row(r: Row) -> list[str]:
        return [latex(r.title) + marks(r.notes), *map(cell, r.cells)]

    lines = [r"\midrule" if line is None else " & ".join(line) + r" \\" for line in _apart(table, row, None)]
    head = " & ".join(map(latex, table.columns)) + r" \\"
    begin = rf"\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}"
    end = [r"\bottomrule", r"\end{tabular}"]
    return "\n".join([begin, r"\toprule", head, r"\midrule", *lines, *end])


def text_table(table: Table) -> str:
    """A table for the terminal, with its caption, footnotes and lines."""
    before = {"best": "*", "second": "_"}

    def cell(c: Cell) -> str:
        return before.get(c.rank, "") + c.text + _brackets(table.marks(c.notes))

    def row(r: Row) -> list[str]:
        return [r.title + _brackets(table.marks(r.notes)), *map(cell, r.cells)]

    body = _apart(table, row, SEPARATING_LINE)
    align = ("left", *["right"] * (len(table.columns) - 1))
    grid = tabulate(body, headers=table.columns, tablefmt="simple", disable_numparse=True, colalign=align)
    lines = [table.caption, grid]
    lines += [f"[{number}] {note}" for number, note in enumerate(table.notes, 1)]
    if any(c.rank for r in table.rows for c in r.cells):
        lines.append("* best, _ second of a column")
    return "\n".join([*lines, *table.says])


def _apart(table: Table, row: Callable[[Row], list[str]], separator: Any) -> list[Any]:
    """Rows as lists of text, a separator before those that stand apart."""
    together, apart = ([row(r) for r in table.rows if r.apart is side] for side in (False, True))
    return [*together, *([separator] if together and apart else []), *apart]


def _superscript(marks: Sequence[int]) -> str:
    return f"<sup>{','.join(map(str, marks))}</sup>" if marks else ""


def _brackets(marks: Sequence[int]) -> str:
    return f" [{','.join(map(str, marks))}]" if marks else ""
