"""Reports: a results folder as Markdown, HTML, LaTeX, CSV, and text for the terminal. Never imports torch.

collect.py reads and checks, tables.py says what stands where, notes.py what a row's footnotes say, figures.py
draws, render.py gives each format its look.
"""

from bench.report.render import render_all, terminal_text

__all__ = ["render_all", "terminal_text"]
