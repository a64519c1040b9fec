"""Pages of reports from Jinja templates, and their files and plots."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from controlprefix._io import requires_extra
from controlprefix.errors import StoreError


def render(template: str, images: Mapping[str, bytes], **values: Any) -> str:
    """A page of a report, with its images in it.

    Args:
        template: Name of a file in `templates`, such as `training.html`.
        images: PNG files by name.
        **values: What else the template needs.

    Raises:
        MissingDependencyError: If jinja2 is not installed.
    """
    with requires_extra("eval", "an HTML report"):
        from jinja2 import Environment, PackageLoader, StrictUndefined

    urls = {
        name: f"data:image/png;base64,{base64.b64encode(image).decode()}"
        for name, image in images.items()
    }
    environment = Environment(
        autoescape=True,
        loader=PackageLoader("controlprefix.reports"),
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template(template).render(images=urls, **values)


def write_report(folder: str | Path, files: Mapping[str, str | bytes]) -> None:
    """Write the files of a report.

    Args:
        folder: Created if it does not exist.
        files: Their contents by name.

    Raises:
        StoreError: If the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            (folder / name).write_bytes(data)
    except OSError as error:
        raise StoreError(f"cannot write the report to {folder}: {error}") from error


def figure_of(size: Sequence[float]) -> Any:
    """An empty matplotlib figure.

    Args:
        size: Width and height in inches.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    with requires_extra("eval", "a report"):
        from matplotlib.figure import Figure

    return Figure(figsize=(size[0], size[1]), layout="constrained", dpi=120)


def to_png(figure: Any) -> bytes:
    """A matplotlib figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
