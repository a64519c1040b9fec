"""Files of records: JSON Lines, JSON, CSV, TSV and Parquet, also gzipped, by suffix and content."""

import csv
import gzip
import io
import itertools
import json
import sys
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from controlprefix._io import requires_extra
from controlprefix.data.messages import resolve_image_paths
from controlprefix.errors import TrainingDataError

STDIN = "-"
_DELIMITERS = ",;\t|"
_SNIFFED_ROWS = 50
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_MAX_CELL_CHARACTERS = 1 << 30
_ROW_FIELDS = {"prompt", "messages", "completion", "text"}
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_SUFFIXES = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}


class Record(NamedTuple):
    """A row of a file.

    Attributes:
        place: Where it is, such as `rows.csv line 3`.
        fields: Its fields; cells that are empty are left out.
        problem: What is wrong with it; then it has no fields.
    """

    place: str
    fields: Mapping[str, Any]
    problem: str = ""

    def without(self, columns: Collection[str]) -> Self:
        """The row without some columns."""
        fields = {name: value for name, value in self.fields.items() if name not in columns}
        return self._replace(fields=fields)


def read_records(path: str | Path) -> Iterator[Record]:
    """Read the records of a file; `-` is standard input.

    The format follows from the suffix (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`, each also
    with `.gz`), or else from the content. A `.json` file holds a list of objects, an object with
    one such list, or JSON Lines. CSV needs a header; its delimiter is found.
    Paths of images may be relative to the file.

    Raises:
        TrainingDataError: If the file cannot be read, or has none of these formats.
        MissingDependencyError: If it is Parquet and pyarrow is not installed.
    """
    folder = Path(path).parent
    for record in _records(path):
        yield record._replace(fields=resolve_image_paths(record.fields, folder))


def _records(path: str | Path) -> Iterator[Record]:
    name = "standard input" if str(path) == STDIN else str(path)
    content = read_bytes(path)
    kind = _kind(path, content)
    if kind == "parquet":
        yield from _parquet(name, content)
        return
    text = decoded(name, content)
    if kind == "csv":
        yield from _csv(name, text)
    elif kind == "json":
        yield from _json(name, text)
    else:
        yield from _json_lines(name, text)


def has_records(path: str | Path) -> bool:
    """Whether a file's suffix says that it holds records rather than plain text."""
    return _suffix(path) in _SUFFIXES


def read_bytes(path: str | Path) -> bytes:
    """The content of a file or of standard input, decompressed.

    Raises:
        TrainingDataError: If it cannot be read.
    """
    try:
        content = sys.stdin.buffer.read() if str(path) == STDIN else Path(path).read_bytes()
        return gzip.decompress(content) if content.startswith(_GZIP) else content
    except (OSError, EOFError, zlib.error) as error:
        raise TrainingDataError(f"cannot read {path}: {error}") from error


def decoded(name: str, content: bytes) -> str:
    """The text of a file's content: UTF-8, or UTF-16 with a byte order mark.

    Raises:
        TrainingDataError: If it is in another encoding, or no text.
    """
    has_utf16_mark = content.startswith(_UTF16_MARKS)
    try:
        return content.decode("utf-16" if has_utf16_mark else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise TrainingDataError(
            f"cannot read {name}: line {line} is not UTF-8 text ({error.reason}); convert the "
            "file, for example with: iconv -f latin1 -t utf-8"
        ) from error


def _suffix(path: str | Path) -> str:
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _kind(path: str | Path, content: bytes) -> str:
    if content.startswith(_PARQUET):
        return "parquet"
    kind = _SUFFIXES.get(_suffix(path), "")
    start = content.removeprefix(b"\xef\xbb\xbf").lstrip()
    if content.startswith(_UTF16_MARKS):
        start = content.decode("utf-16", errors="ignore").lstrip().encode()
    if kind in {"json", "jsonl"} and start.startswith(b"["):
        return "json"
    if kind:
        return kind
    if start.startswith((b"[", b"{")):
        return "json"
    first_line = start.split(b"\n", 1)[0]
    if any(delimiter.encode() in first_line for delimiter in ",;\t"):
        return "csv"
    raise TrainingDataError(
        f"cannot tell the format of {path}: it is neither JSON, CSV, TSV nor Parquet; give it a "
        f"suffix: {', '.join(_SUFFIXES)}"
    )


def _json_lines(name: str, text: str) -> Iterator[Record]:
    # Lines end at \n only: other separators may occur inside a text.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{name} line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Record(place, {}, f"not JSON: {error}")
            continue
        yield _object(place, fields)


def _json(name: str, text: str) -> Iterator[Record]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object per line
            yield from _json_lines(name, text)
            return
        raise TrainingDataError(f"{name} is not JSON: {error}") from error
    except (ValueError, RecursionError) as error:
        raise TrainingDataError(f"{name} is not JSON: {error}") from error
    if isinstance(value, dict) and _ROW_FIELDS & value.keys():
        value = [value]
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        if len(lists) == 1 and all(isinstance(item, dict) for item in lists[0]):
            value = lists[0]
        else:
            value = [value]
    if not isinstance(value, list):
        raise TrainingDataError(f"{name} holds neither a list of objects nor an object")
    for number, fields in enumerate(value, 1):
        yield _object(f"{name} row {number}", fields)


def _object(place: str, fields: Any) -> Record:
    if not isinstance(fields, dict):
        return Record(place, {}, "not a JSON object")
    return Record(place, {key: value for key, value in fields.items() if value is not None})


def _csv(name: str, text: str) -> Iterator[Record]:
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    delimiter = _delimiter(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    end = 0
    while True:
        place = f"{name} line {end + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Record(place, {}, f"not CSV: {error}")
            return
        end = reader.line_num
        if not any(cell.strip() for cell in cells):
            continue
        if not header:
            header = [cell.strip() for cell in cells]
            repeated = [column for column, count in Counter(header).items() if count > 1]
            if repeated:
                raise TrainingDataError(f"{place}: two columns are named {repeated[0]!r}")
            continue
        if len(cells) > len(header):
            yield Record(place, {}, f"{len(cells)} cells, but the header has {len(header)}")
            continue
        pairs = zip(header, cells, strict=False)
        yield Record(place, {column: cell for column, cell in pairs if cell.strip()})


def _delimiter(text: str) -> str:
    """The delimiter with which most of the first lines have as many cells as the header."""

    def fit(delimiter: str) -> tuple[float, int]:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        try:
            rows = [row for row in itertools.islice(reader, _SNIFFED_ROWS) if row]
        except csv.Error:
            return 0.0, 0
        if not rows or len(rows[0]) < 2:
            return 0.0, 0
        return sum(len(row) == len(rows[0]) for row in rows) / len(rows), len(rows[0])

    return max(_DELIMITERS, key=fit)


def _parquet(name: str, content: bytes) -> Iterator[Record]:
    with requires_extra("data", "a Parquet file"):
        import pyarrow
        import pyarrow.parquet
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content))
    except (pyarrow.ArrowException, OSError) as error:
        raise TrainingDataError(f"cannot read {name}: {error}") from error
    for number, fields in enumerate(table.to_pylist(), 1):
        yield _object(f"{name} row {number}", fields)
