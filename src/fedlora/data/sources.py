"""Where examples come from: files, globs, folders, `save_to_disk` folders, databases, hub ids, the built-in demo, or a table at
hand."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError, DataError, Problem, near
from ..hub import reachable, reason
from ..seeds import np_rng
from . import addresses
from .files import FORMATS, Shape, is_data_file, missing, read_file
from .lines import CLIENT, shown

if TYPE_CHECKING:
    import pyarrow as pa

HUB_ID = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?")


def read(
    source: Any,
    *,
    format: str = "auto",
    subset: str | None = None,
    split: str | None = None,
    encoding: str = "utf-8",
    delimiter: str = "auto",
    sheet: str | None = None,
    query: str | None = None,
    client: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> pa.Table:
    """The rows of `source`.

    source: "demo"; a file, which gzip or zip may pack; a glob; a list of files or globs; a folder of data files, or of folders of .txt
    files, each named as its label; a folder written by `save_to_disk`; the URL of a database, with `query`; a hub id; or a pyarrow table
    or `datasets.Dataset`. format, encoding, delimiter, sheet: of files (`files.Shape`). subset and split: configuration and split of
    a hub data set; split also picks a split of a saved data set, or the files of a folder named after it (train.parquet,
    train-00000-of-00002.parquet, train/).
    client: "file" adds the column "__client__", the name of the file each row comes from. Files and queries add the place of each row
    (`lines`). limit: a random choice of that many rows, in their order, which depends on `seed` alone.
    Raises DataError for what is missing, empty or malformed.
    """
    table = _read(source, subset, split, Shape(format, encoding, delimiter, sheet, query), client == "file")
    if table.num_rows == 0:
        raise DataError(f"data.source: {_shown(source)} has no rows, expected at least one")
    return limited(table, limit, seed)


def limited(table: pa.Table, limit: int | None, seed: int) -> pa.Table:
    """A random choice of `limit` rows, in their order."""
    if limit is not None and limit < 1:
        raise ConfigError([Problem("data.limit", limit, "an integer >= 1 or null")])
    if limit is None or limit >= table.num_rows:
        return table
    chosen = np_rng(seed, "limit").choice(table.num_rows, limit, replace=False)
    return table.take(np.sort(chosen))


def _read(source: Any, subset: str | None, split: str | None, shape: Shape, by_file: bool) -> pa.Table:
    import pyarrow as pa

    if isinstance(source, Sequence) and not isinstance(source, str) and len(source) == 1:
        (source,) = source
    if isinstance(source, (str, Path)):
        name = str(source)
        if name == "demo" and not by_file:
            from .demo import corpus

            return corpus()
        if wrong := addresses.unfit(name, shape.query):
            raise ConfigError([wrong])
        if addresses.is_database(name):
            if by_file:
                raise ConfigError([Problem("data.client", "file", "a column of the query", "a database has no files")])
            from .database import select

            return select(name, str(shape.query))
        path = Path(name).expanduser()
        if path.is_dir() and not by_file and _saved(path):
            return _from_disk(path, split)
        if path.exists() or by_file or not _may_be_hub_id(name):
            return _files(_paths(source, split, shape.format), shape, by_file, path if path.is_dir() else None)
        return from_hub(name, subset, split)
    if isinstance(source, pa.Table):
        return source
    if hasattr(source, "with_format") and hasattr(
        source, "column_names"
    ):  # datasets.Dataset, without importing datasets
        return _arrow(_pick(source, split, "the data set"))
    if isinstance(source, Sequence) and source and all(isinstance(s, (str, Path)) for s in source):
        for s in map(str, source):
            if addresses.scheme(s) is not None:
                what = addresses.hidden(s)
                raise ConfigError(
                    [Problem("data.source", what, "files in a list of several", "an address stands alone")]
                )
        return _files([p for s in source for p in _paths(s, split, shape.format)], shape, by_file)
    raise DataError(
        f"data.source: got {type(source).__name__}, expected a path, a list of paths, a hub id, a pyarrow table or a data set"
    )


# files ----------------------------------------------------------------------------------------------------------------


def _paths(source: str | Path, split: str | None, format: str) -> list[Path]:
    """The data files of a path, glob or folder, sorted. Texts (.txt) of a folder count where it holds no other data, since many a
    folder of tables has a readme."""
    path = Path(source).expanduser()
    if path.is_dir():
        inside = path / split if split and (path / split).is_dir() else path
        every = sorted(p for p in inside.rglob("*") if p.is_file() and not p.name.startswith("."))
        found = [p for p in every if format != "auto" or is_data_file(p)]
        tables = [p for p in found if p.suffix.lower() != ".txt"]
        found = tables or found if format == "auto" else found
        if not found:
            raise DataError(
                f"data.source: folder {inside} holds no data file ({', '.join(FORMATS)}); {near('', [p.name for p in inside.iterdir()])}"
            )
        return _of_split(found, split, path) if split and inside == path else found
    if not path.exists() and glob.has_magic(str(path)):
        found = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
        if not found:
            start = next(p for p in path.parents if not glob.has_magic(str(p)))
            around = sorted(p.name for p in start.iterdir()) if start.is_dir() else []
            raise DataError(f"data.source: no file matches {source}; in {start}: {near(path.name, around)}")
        return found
    if not path.exists():
        raise missing(path)
    return [path]


def _of_split(paths: list[Path], split: str, folder: Path) -> list[Path]:
    names = {p: re.sub(r"-\d+-of-\d+$", "", p.name.partition(".")[0]) for p in paths}
    chosen = [p for p in paths if names[p] == split]
    if not chosen:
        raise DataError(
            f"data.split: no file of {folder} is named after the split {split!r}; {near(split, sorted(set(names.values())))}"
        )
    return chosen


def _files(paths: list[Path], shape: Shape, by_file: bool, folder: Path | None = None) -> pa.Table:
    """The rows of all files. folder: where they were found, if their folders say labels."""
    import pyarrow as pa

    tables = [read_file(p, shape) for p in paths]
    if shape.format == "txt" or all(p.suffix.lower() == ".txt" for p in paths):
        tables = _labelled(tables, paths, folder)
    first = tables[0]
    for path, table in zip(paths, tables, strict=True):
        if set(table.column_names) != set(first.column_names):
            odd = sorted(set(table.column_names) ^ set(first.column_names))
            raise DataError(f"data.source: {path} has columns {shown(table)}, {paths[0]} has {shown(first)}; expected the same in "
                            f"every file: rename or add {', '.join(map(repr, odd))}, or give fewer files")  # fmt: skip
    if by_file:
        tables = [
            t.append_column(CLIENT, pa.array([n] * t.num_rows)) for n, t in zip(_names(paths), tables, strict=True)
        ]
    if len(tables) == 1:
        return tables[0]
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as e:
        raise DataError(f"data.source: the {len(paths)} files from {paths[0]} to {paths[-1]} do not fit together "
                        f"({str(e).splitlines()[0]}); expected one type in each column") from e  # fmt: skip


def _labelled(tables: list[pa.Table], paths: list[Path], folder: Path | None) -> list[pa.Table]:
    """Texts with the column "label", the name of the folder that each file lies in, if they lie in folders of a folder."""
    import pyarrow as pa

    beside = [p for p in paths if folder is not None and p.parent == folder]
    if folder is None or len(beside) == len(paths):
        return tables
    if beside:
        raise DataError(f"data.source: {beside[0]} lies beside the folders of {folder}, whose names are labels; expected every "
                        "text in a folder; move it, or name the folders' parent")  # fmt: skip
    return [t.append_column("label", pa.array([p.parent.name])) for t, p in zip(tables, paths, strict=True)]


def _names(paths: list[Path]) -> list[str]:
    """The stem of each file; with its folders below the common one where stems alone would not tell files apart."""
    stems = [p.stem for p in paths]
    if len(set(stems)) == len(stems):
        return stems
    resolved = [p.resolve() for p in paths]
    depth = min(len(p.parts) for p in resolved) - 1
    while len({p.parts[:depth] for p in resolved}) > 1:
        depth -= 1
    return ["/".join(p.with_suffix("").parts[depth:]) for p in resolved]


# datasets -------------------------------------------------------------------------------------------------------------


def _may_be_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not is_data_file(Path(name))


def from_hub(name: str, subset: str | None = None, split: str | None = None, **options: Any) -> pa.Table:
    """One split of a hub data set (or of any folder that `datasets.load_dataset` takes).

    Without a network, what an earlier call downloaded is used. Raises DataError if the data set cannot be loaded.
    """
    try:
        loaded = _load(name, subset, split, options)
    except Exception as e:  # datasets raises whatever its storage, parser and network layers raise
        folder = Path(name).parent
        around = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        what = f"{name!r} (subset {subset!r}, split {split!r})" if subset or split else f"{name!r}"
        hint = f"; here: {near(Path(name).name, around)}" if around else ""
        raise DataError(f"data.source: {what} is no file or folder here and cannot be loaded from the hub ({reason(_refused(e, name), f'datasets/{name}')}); "
                        f"name a copy on this machine with --set data.source=FILE, or connect to the network{hint}") from e  # fmt: skip
    return _arrow(_pick(loaded, split, repr(name)))


def _refused(e: Exception, name: str) -> Exception:
    """The hub's own refusal, which `datasets` drops from the error that it raises; `e` where that is something else."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import auth_check
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(e, DatasetNotFoundError):
        try:
            auth_check(name, repo_type="dataset")
        except HfHubHTTPError as own:
            return own
        except Exception:  # whatever a network raises: what `datasets` has said is told
            return e
    return e


PARQUET = "refs/convert/parquet"  # the branch in which the hub keeps a Parquet copy of a data set


def _load(name: str, subset: str | None, split: str | None, options: Mapping[str, Any]) -> Any:
    """`datasets.load_dataset`, from its cache alone where the hub does not answer.

    Some older data sets are a script, which `datasets` no longer runs; for those we read the hub's Parquet copy.
    """
    import datasets

    offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = offline or not (Path(name).is_dir() or reachable())
    try:
        return datasets.load_dataset(name, subset, split=split, trust_remote_code=False, **options)
    except RuntimeError as e:
        if "scripts are no longer supported" not in str(e):
            raise
        return datasets.load_dataset(
            name, data_dir=subset, split=split, revision=PARQUET, trust_remote_code=False, **options
        )
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _saved(path: Path) -> bool:
    return any((path / marker).is_file() for marker in ("dataset_dict.json", "dataset_info.json", "state.json"))


def _from_disk(path: Path, split: str | None) -> pa.Table:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as e:  # as above
        raise DataError(
            f"data.source: {path} looks like a save_to_disk folder but cannot be loaded ({str(e).splitlines()[0]}); save it again"
        ) from e
    return _arrow(_pick(loaded, split, str(path)))


def _pick(loaded: Any, split: str | None, what: str) -> Any:
    """The split of a DatasetDict: the one asked for, the only one, or "train"."""
    if not isinstance(loaded, dict):
        return loaded
    names = list(loaded)
    wanted = split or (names[0] if len(names) == 1 else "train")
    if wanted not in loaded:
        raise DataError(f"data.split: {what} has no split {wanted!r}, it has {', '.join(names)}; {near(wanted, names)}")
    return loaded[wanted]


def _arrow(data: Any) -> pa.Table:
    """The rows of a `datasets.Dataset`, its filters applied; the schema keeps the names of ClassLabel columns."""
    return data.with_format("arrow")[:]


def _shown(source: Any) -> str:
    return str(source) if isinstance(source, (str, Path)) else f"a {type(source).__name__}"
