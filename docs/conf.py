"""Sphinx: MyST for the pages, autodoc for the Python reference, Typer for the command line.

Sphinx, since it is maintained, reads docstrings itself, and fails on a broken reference.
"""

from pathlib import Path

import typer.cli
import typer.main

import controlprefix
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


(HERE / "reference" / "cli.md").write_text(command_line_page())
