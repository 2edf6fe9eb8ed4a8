"""Sources that are addresses: which are databases, and what is wrong with one before anything is opened.

Recipes are checked by this, so it imports nothing that is slow to load.
"""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, urlsplit

from ..errors import Problem

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
WEB = ("http", "https", "ftp", "sftp", "s3", "gs", "gcs", "az", "abfs", "hdfs", "hf", "file", "smb")
SECRET = ("password", "passwd", "pwd", "token")  # of a URL's query


def scheme(source: str) -> str | None:
    """What stands before :// in small letters, None where a source is no address."""
    found = SCHEME.match(source)
    return found[1].lower() if found else None


def is_database(source: str) -> bool:
    """Whether a source is the URL of a database."""
    return scheme(source) not in (None, *WEB)


def unfit(source: str, query: str | None) -> Problem | None:
    """What is wrong with a source that is an address, before anything is opened. Passwords are not shown."""
    kind = scheme(source)
    if kind is None:
        return (
            None
            if query is None
            else Problem("data.query", query, "null, as data.source is no database", "leave it out")
        )
    if kind in WEB:
        what = "files are not downloaded: fetch it first (curl -LO ADDRESS) and name the file"
        return Problem("data.source", source, "a file here, a hub id, or a database", what)
    if _password(source):
        expected = "an address without a password, which would be kept in the run folder"
        what = "let the database's own file or variable hold it, such as ~/.pgpass or PGPASSWORD"
        return Problem("data.source", hidden(source), expected, what)
    if query is None:
        what = 'e.g. query: "SELECT text, label FROM notes ORDER BY id"'
        return Problem("data.query", None, "a query beside a database", what)
    return None


def hidden(source: str) -> str:
    """The address of a database without what may be secret in it."""
    return re.sub(r"(://[^/?#]*?:)[^/?#]*@", r"\1***@", re.sub(r"\?.*", "", source))


def _password(source: str) -> bool:
    try:
        split = urlsplit(source)
        return bool(split.password) or any(k.lower() in SECRET for k, _ in parse_qsl(split.query))
    except ValueError:
        return False
