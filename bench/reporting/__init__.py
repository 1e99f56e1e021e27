"""Reports: what is in a results folder, as Markdown, HTML, LaTeX, CSV, and text for the terminal. Never imports torch.

collect.py reads and checks, tables.py says what stands where, figures.py draws, render.py gives each format its look.
"""

from bench.reporting.render import render_all, terminal_text

__all__ = ["render_all", "terminal_text"]
