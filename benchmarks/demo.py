"""The figures of `controlprefix demo`, with where and when they were measured."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from controlprefix.cli import demo

from lib.results import arguments, save


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(__doc__).parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "demo.json"
        demo.run(f"sqlite:///{folder}/demo.db", Console(), file)
        results = json.loads(file.read_text())
    save(options.results, "demo", results)


if __name__ == "__main__":
    main()
