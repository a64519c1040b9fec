"""Repeat recorded results: run the command in each file of `docs/results/` again.

The new files go to another folder, to be compared with the recorded ones. A benchmark that was
interrupted goes on where it stopped. Files without a command of this checkout (those that
`controlprefix compare` wrote elsewhere, or of scripts that have another name now), and files
measured on a GPU that are not named, are listed and left out.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lib.results import RESULTS, ROOT

console = Console()


def command_of(recorded: Mapping[str, Any], data: str) -> list[str] | None:
    """The script and arguments that wrote a file, with the data where they are here."""
    command = shlex.split(recorded.get("command") or "")
    if len(command) < 2 or not (script := ROOT / "benchmarks" / Path(command[1]).name).exists():
        return None
    arguments = [
        data if word == "DATA" or word.endswith("shared/data") else word for word in command[2:]
    ]
    if "--results" in arguments:
        position = arguments.index("--results")
        del arguments[position : position + 2]
    return [str(script), *arguments]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", metavar="DATA", help="folder of the public data sets")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="results to repeat; default all")
    parser.add_argument("--recorded", type=Path, default=RESULTS, help="folder of the old files")
    parser.add_argument("--results", type=Path, default=Path("repeated"), help="of the new ones")
    options = parser.parse_args(argv)
    files = {file.stem: file for file in sorted(options.recorded.glob("*.json"))}
    if unknown := set(options.names or ()).difference(files):
        parser.error(f"no result {', '.join(sorted(unknown))}; there are: {', '.join(files)}")
    failed: list[str] = []
    repeated: set[tuple[str, ...]] = set()
    for name in options.names or files:
        recorded = json.loads(files[name].read_text())
        if recorded.get("machine", {}).get("gpu") and not options.names:
            console.print(f"{name}: measured on a GPU", style="yellow")
            continue
        command = command_of(recorded, str(Path(options.data).resolve()))
        if command is None:
            console.print(f"{name}: its command is not of this checkout", style="yellow")
            continue
        if tuple(command) in repeated:  # one script may write several files
            continue
        repeated.add(tuple(command))
        console.print(f"{name}: {shlex.join(command)}", style="bold", highlight=False)
        command += ["--results", str(options.results.resolve())]
        if subprocess.run([sys.executable, *command]).returncode:
            failed.append(name)
    if failed:
        raise SystemExit(f"these failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
