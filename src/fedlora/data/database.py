"""The rows that a query gives, from any database that SQLAlchemy knows; SQLite and PostgreSQL are tested.

The source is a URL such as sqlite:///notes.db or postgresql://user@host/name. Nothing is written: the connection is read-only where
the database has such, and what a query did is rolled back.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from . import values
from .addresses import hidden, scheme
from .lines import placed

if TYPE_CHECKING:
    import pyarrow as pa

SECONDS = 10  # that PostgreSQL is given to answer, unless the address says connect_timeout
DRIVERS = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}  # the driver of the extra


def select(source: str, query: str, field: str = "data.query") -> pa.Table:
    """The rows of a query. field: the recipe's field that says it.

    Raises DataError for a database that cannot be reached, a query that it does not understand, and one without rows.
    """
    try:
        import sqlalchemy as sa
    except ModuleNotFoundError as e:
        raise DataError(
            f"data.source: {hidden(source)} is a database, and SQLAlchemy is not installed: pip install 'fedlora[sql]'"
        ) from e
    engine = _engine(source)
    try:
        with engine.connect() as connection:
            read_only = {"postgresql_readonly": True} if engine.dialect.name == "postgresql" else {}
            # Without parameters, because a colon or a percent sign in the query is none.
            found = connection.execution_options(no_parameters=True, **read_only).exec_driver_sql(query)
            if not found.returns_rows:
                raise DataError(f"{field}: got {query!r}, expected a query that gives rows (SELECT ...)")
            names, rows = list(found.keys()), [tuple(r) for r in found]
            connection.rollback()
    except sa.exc.DBAPIError as e:
        reason = " ".join(str(e.orig).split())
        what = (
            "the database does not answer"
            if isinstance(e, sa.exc.OperationalError) and e.connection_invalidated
            else "it says"
        )
        raise DataError(f"{field}: {hidden(source)} cannot run {query!r}; {what}: {reason}") from e
    except sa.exc.SQLAlchemyError as e:
        raise DataError(f"{field}: {hidden(source)} cannot run {query!r}: {' '.join(str(e).split())}") from e
    finally:
        engine.dispose()
    if not rows:
        raise DataError(f"{field}: {query!r} gives no rows (columns {names}), expected at least one")
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise DataError(
            f"{field}: {query!r} gives more than one column {twice[0]!r}, expected distinct names; rename one with AS"
        )
    return placed(values.table(names, rows), "the query's row", range(1, len(rows) + 1))


def _engine(source: str) -> Any:
    import sqlalchemy as sa

    try:
        url = sa.make_url(source)
        url = url.set(drivername=DRIVERS.get(url.drivername, url.drivername))
        if url.get_backend_name() == "sqlite":
            url = _existing(url)
        waits = url.get_backend_name() == "postgresql" and "connect_timeout" not in url.query
        arguments = {"connect_timeout": SECONDS} if waits else {}
        return sa.create_engine(url, poolclass=sa.NullPool, connect_args=arguments)
    except sa.exc.NoSuchModuleError as e:
        raise DataError(f"data.source: {hidden(source)}: no database is called {scheme(source)!r}; expected e.g. sqlite:///notes.db "
                        "or postgresql://user@host/name") from e  # fmt: skip
    except ModuleNotFoundError as e:
        hint = "pip install 'fedlora[sql]'" if e.name == "psycopg" else f"install {e.name}, SQLAlchemy's driver for it"
        raise DataError(f"data.source: {hidden(source)}: {e.name} is not installed: {hint}") from e
    except (sa.exc.ArgumentError, ValueError) as e:
        raise DataError(f"data.source: {hidden(source)} is no address of a database ({e}); expected e.g. sqlite:///notes.db or "
                        "postgresql://user@host/name") from e  # fmt: skip


def _existing(url: Any) -> Any:
    """The address of an SQLite file for reading alone. Raises DataError if there is no such file: SQLite would make one."""
    from .files import missing

    if not url.database or url.database == ":memory:":
        raise DataError("data.source: sqlite:// in memory is empty, expected a file, e.g. sqlite:///notes.db")
    path = Path(url.database).expanduser()
    if not path.is_file():
        raise missing(path)
    return url.set(database=f"{path.absolute().as_uri()}", query={**url.query, "mode": "ro", "uri": "true"})
