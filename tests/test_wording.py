"""Names, docstrings and comments use the words of the glossary (docs/reference/glossary.md)."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("controlprefix", "attributes", "store", "tests", "benchmarks", "examples")
FILES = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
VAGUE_NAMES = {"asked", "drawn", "found", "given", "kept", "known", "made"}
VAGUE_NAMES |= {"mine", "one", "said", "seen", "shown", "some", "theirs", "told", "wanted"}
# Words that the glossary replaces, and what it has instead.
WORDS = {
    r"judges?": "attribute classifier",
    r"fluency": "base-model NLL",
    r"looks? of validation": "validation pass",
    r"held[- ]out look": "validation pass",
    r"cached piece": "chunk",
    r"dealt out": "shuffled",
    r"whoever|whose own|of one's own": "name the user",
}


def texts(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each comment, docstring and help text."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("# ")
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.keyword(arg="help", value=ast.Constant(value=str(help_text), lineno=line)):
                yield line, help_text
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            continue
        if text := ast.get_docstring(node):
            yield node.body[0].lineno, text


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_definitions_and_names_are_plain(file: Path) -> None:
    source = file.read_text()
    problems = []
    for line, text in texts(source):
        if re.search(r"(^\s*|: |\. )Of (the|a|an|each|what|its|all)\b", text, re.M):
            problems.append(f"{line}: a definition starts with 'Of': {text[:60]!r}")
        problems += [
            f"{line}: {match.group()!r}; the glossary says {word!r}"
            for pattern, word in WORDS.items()
            if file != Path(__file__) and (match := re.search(rf"\b({pattern})\b", text, re.I))
        ]
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=name, ctx=ast.Store(), lineno=line) if name in VAGUE_NAMES:
                problems.append(f"{line}: {name!r} does not say what the value is")
    assert not problems, "\n".join(problems)
