"""The built-in corpus: what every Python installation says about itself, sentence by sentence.

Docstrings of the standard library and the reference topics of `pydoc_data`, labelled by area; modules (and topics) are
natural clients. Sources are parsed, never imported. The same Python version gives the same corpus everywhere: modules
that distributions package apart (tkinter, turtle, idlelib, test) are left out.
"""

from __future__ import annotations

import ast
import inspect
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

REFERENCE = "language reference"
TOPICS = "pydoc_data/topics.py"
WORDS = range(4, 61)  # words; shorter sentences say little, and longer ones are lists that lost their bullets
AREAS: dict[str, str] = {
    "networking": "asynchat asyncore cgi ftplib http imaplib ipaddress nntplib poplib smtpd smtplib socket socketserver ssl "
    "telnetlib urllib webbrowser wsgiref xmlrpc",
    "text and markup": "base64 binhex codecs configparser csv difflib email gettext html json locale mailbox mailcap "
    "mimetypes netrc pipes plistlib pprint quopri re reprlib shlex string stringprep textwrap xml",
    "concurrency": "_threading_local asyncio concurrent contextvars multiprocessing queue sched selectors signal "
    "subprocess threading",
    "files and archives": "_pyio bz2 chunk dbm filecmp fileinput fnmatch genericpath glob gzip io lzma ntpath os pathlib "
    "pickle pickletools posixpath shelve shutil sndhdr stat tarfile tempfile wave aifc sunau zipfile",
    "data types": "_collections_abc _pydatetime _strptime _weakrefset abc bisect calendar collections copy copyreg dataclasses datetime enum "
    "functools graphlib heapq hmac operator types typing uuid weakref zoneinfo",
    "numeric": "_pydecimal _pylong colorsys fractions numbers random statistics",
    "testing and debugging": "bdb cProfile cgitb cmd doctest faulthandler linecache logging pdb profile pstats timeit trace "
    "traceback tracemalloc unittest warnings",
    "interpreter": "_sitebuiltins argparse ast code codeop compileall contextlib ctypes dis getopt imp importlib inspect "
    "keyword modulefinder opcode optparse pkgutil platform py_compile pyclbr pydoc rlcompleter runpy site symtable "
    "sysconfig token tokenize venv zipapp zipimport",
}  # fmt: skip

_CODE = re.compile(r">>>|\.\.\. |[=<>{}|\\^~@#$%]|--|\w\(\w|\w\[|__|_\w|\d\.\d\.\d|://|:=|\[\d")
_ROLE = re.compile(r":[a-z:]+:`[~!]?([^`<]+)(?: <[^>]*>)?`|`([^`'\s]+)'")  # :class:`~a.B` and `this'
_MARKS = re.compile(r"``?|\'\'|\*")
_RULE = re.compile(r"\s*[-=*~^#.]{3,}\s*")  # the line under a heading
_ITEM = re.compile(r"\s*(?:[-*+o•]|\d+[.)])\s")
_STOP = re.compile(r"(?<=[a-z)\"'])\.\s+(?=[A-Z])")
_ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|etc|vs|cf|resp)$")
_OPENING = re.compile(r"(?:Changed|New|Added) in version|Deprecated since|See also|Availability|Bases:")


def corpus() -> pa.Table:
    """The corpus as a table: text, area, module (all strings). Rows are ordered by area, then module, then position.

    A sentence that occurs twice is kept once, where it comes first, so that train and test cannot share it.
    Raises DataError where the sources of the standard library are not installed.
    """
    import pyarrow as pa

    folder = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    rows: list[tuple[str, str, str]] = []
    for area, module, text in _documents(folder):
        for sentence in sentences(text):
            key = re.sub(r"\W+", " ", sentence).casefold()
            if key not in seen:
                seen.add(key)
                rows.append((sentence, area, module))
    if not rows:
        raise DataError(f"data.source: demo found no sources of the standard library in {folder}, expected its .py files; "
                        "install them or give a file of your own")  # fmt: skip
    return pa.table(
        {name: list(column) for name, column in zip(("text", "area", "module"), zip(*rows, strict=True), strict=True)}
    )


def _documents(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(area, module, text) of every docstring of the listed modules, then of every topic."""
    for area, names in AREAS.items():
        for name in names.split():
            found = [folder / f"{name}.py", *sorted((folder / name).rglob("*.py"))]
            for path in found:
                parts = path.relative_to(folder).with_suffix("").parts
                if path.is_file() and not {"test", "tests"} & set(parts):
                    module = ".".join(p for p in parts if p != "__init__")
                    for text in _docstrings(path):
                        yield area, module, text
    topics = folder / TOPICS
    if topics.is_file():
        for name, text in sorted(_topics(topics).items()):
            yield REFERENCE, f"topic {name}", text


def _docstrings(path: Path) -> Iterator[str]:
    """Docstrings of a source file in the order of its lines."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [n for n in ast.walk(_parse(path)) if isinstance(n, documented)]
    for node in sorted(nodes, key=lambda n: getattr(n, "lineno", 0)):
        text = ast.get_docstring(node)
        if text:
            yield text


def _topics(path: Path) -> dict[str, str]:
    """The literal dictionary that `path` assigns to `topics`."""
    for node in _parse(path).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "topics" for t in node.targets):
            return dict(ast.literal_eval(node.value))
    return {}


def _parse(path: Path) -> ast.Module:
    import tokenize
    import warnings

    with tokenize.open(path) as f, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hides warnings about invalid escapes in the standard library
        return ast.parse(f.read())


def sentences(text: str) -> Iterator[str]:
    """Readable sentences of a docstring: no code, doctests, headings, tables, lists of parameters or markup."""
    quoted = False
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        lines = paragraph.split("\n")
        indents = {len(line) - len(line.lstrip()) for line in lines}
        verbatim = quoted and 0 not in indents  # an indented block after "::" is quoted as it is
        quoted = verbatim or lines[-1].rstrip().endswith("::")
        if not verbatim and len(indents) == 1 and not any(_ITEM.match(x) or _RULE.fullmatch(x) for x in lines):
            yield from filter(readable, _split(" ".join(line.strip() for line in lines)))


def _split(paragraph: str) -> Iterator[str]:
    """Cut at full stops that end a sentence; every sentence ends with one."""
    joined = ""
    for piece in _STOP.split(_MARKS.sub("", _ROLE.sub(r"\1\2", paragraph))):
        joined += piece
        if _ABBREVIATION.search(joined):  # the full stop of "e.g." does not end a sentence
            joined += ". "
        else:
            yield re.sub(r"\s+", " ", joined).strip().rstrip(".") + "."
            joined = ""


def readable(sentence: str) -> bool:
    """Whether this is prose: begins with a capital, has WORDS words, most of them plain, and nothing that looks like code."""
    words = sentence.split()
    plain = sum(w.strip(".,;:!?()\"'").isalpha() for w in words)
    return (
        len(words) in WORDS
        and sentence[0].isupper()
        and words[0].strip(",").isalpha()
        and plain >= 0.8 * len(words)
        and not sentence.endswith(":.")  # it announces a list or an example, which was cut
        and not _CODE.search(sentence)
        and not _OPENING.match(sentence)
    )
