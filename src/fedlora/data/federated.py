"""Examples and who holds them: a federation's data, from a recipe or from a user's own arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..arguments import checked
from ..errors import ConfigError, DataError, Problem, near
from ..seeds import np_rng
from .examples import Arrays, Rows, Tokens
from .load import DEMO_CLIENT, Column, Look, Reader, load
from .partition import Given, group, label_permutation
from .partitions import PARTITIONS
from .split import histograms, like, split
from .together import Together, divided, split_together
from .together import given as given_together

NATURAL = "column"


@dataclass(frozen=True)
class FederatedData:
    """Every example once, and the rows of each client by split. The last `unseen` clients never train."""

    examples: Tokens | Arrays
    ids: Sequence[str]  # of the clients
    splits: Mapping[str, Rows]  # "train", and "validation" and "test" where there are any
    label_names: tuple[str, ...] = ()  # empty for regression, and for language modelling without a class column
    label_maps: np.ndarray | None = None  # int64 [clients classes]: concept shift, label -> the client's label
    unseen: int = 0
    groups: np.ndarray | None = None  # int64 [n] class of each row; None: that of the examples' labels
    truncated: int = 0  # rows cut to the longest length
    outputs: tuple[str, ...] = ()  # names of the model's outputs, where they are no classes of rows: tags, or labels
    references: Mapping[int, tuple[str, ...]] | None = (
        None  # row -> texts that answer its prompt, of all rows that do not train
    )

    def histogram(self, split: str) -> np.ndarray:
        """Rows of each class that each client holds in a split, int64 [clients classes]."""
        labels = self.examples.labels if self.groups is None else self.groups
        if labels is None or not self.label_names:
            raise DataError(f"histogram: these data have no classes, expected labels for split {split!r}")
        return histograms(self.splits[split], labels, len(self.label_names))

    def constant(self) -> float | None:
        """Accuracy on test of what needs no model: each client's most frequent class in training. Mean over the clients that
        have both; None without classes or test rows."""
        if not self.label_names or "test" not in self.splits or not len(self.examples):
            return None
        end = len(self.ids) - self.unseen
        train, test = self.histogram("train")[:end], self.histogram("test")[:end]
        both = (train.sum(1) > 0) & (test.sum(1) > 0)
        if not both.any():
            return None
        right = test[both, train[both].argmax(1)]
        return float((right / test[both].sum(1)).mean())

    def only(self, k: int) -> FederatedData:
        """Client k and its rows alone."""
        splits = {s: Rows(np.array([0, r.sizes[k]]), r[k]) for s, r in self.splits.items()}
        maps = None if self.label_maps is None else self.label_maps[k : k + 1]
        return replace(self, ids=[self.ids[k]], splits=splits, label_maps=maps, unseen=0)


def roster(ids: Sequence[str], sizes: Mapping[str, Sequence[int]], label_names: Sequence[str] = ()) -> FederatedData:
    """Clients whose rows are elsewhere: only how many each has of a split is known, sizes[split][client]."""
    splits = {
        s: Rows(np.concatenate([[0], np.cumsum(n)]).astype(np.int64), np.zeros(0, np.int64)) for s, n in sizes.items()
    }
    return FederatedData(Arrays({"labels": np.zeros(0, np.int64)}), ids, splits, tuple(label_names))


def assemble(
    tokenizer: Any,
    data: Mapping[str, Any],
    partition: Mapping[str, Any],
    task: Reader,
    seed: int,
    cache: Path | None = None,
    look: Look | None = None,
) -> FederatedData:
    """The data that the recipe's sections `data` and `partition` describe. look: is shown what was read (doctor.py). Raises
    ConfigError or DataError."""
    by = data.get("client") or partition.get("column")
    if partition["kind"] == NATURAL and by is None and data["source"] == "demo":
        by = DEMO_CLIENT
    loaded = load(tokenizer, data, task, seed, by, cache, look, partition.get("group"))
    kind = NATURAL if data.get("client") else partition["kind"]
    fed = _divided(
        loaded.examples, loaded.groups, loaded.names, loaded.column, loaded.origin, {**partition, "kind": kind}, seed,
        loaded.together,
    )  # fmt: skip
    site = data.get("site")
    if site is not None:
        fed = replace(fed, ids=[site] if kind != NATURAL and len(fed.ids) == 1 else [f"{site}/{c}" for c in fed.ids])
    kept = None
    if loaded.references is not None:
        held = [int(i) for s, r in fed.splits.items() if s != "train" for i in r.rows]
        kept = {i: tuple(loaded.references[i]) for i in held}
    return replace(fed, truncated=loaded.truncated, outputs=loaded.outputs, references=kept)


@checked
def from_arrays(
    columns: Mapping[str, Any], kind: str = "iid", clients: int = 8, seed: int = 0, by: Sequence[Any] | None = None,
    together: Sequence[Any] | None = None, label_names: Sequence[str] = (), validation: float = 0.1, test: float = 0.2, *,
    alpha: float | None = None, share: float | None = None, classes: int | None = None, domains: int | None = None, min_size: int | None = None,
    unseen: int = 0, permute_labels: bool = False, options: Mapping[str, Any] | None = None,
) -> FederatedData:  # fmt: skip
    """A federation of a user's own arrays [n ...] or lists; the column "labels" holds the targets.

    kind, clients, validation, test, alpha, share, classes, domains, min_size, unseen, permute_labels: as in the recipe's
    section partition, where None leaves what the kind has. options: those of a kind of your own. by: one value per row, for the
    kinds column and domain. together: one value per row; rows of one value go to one client and to one side of its split.

    Raises ConfigError for wrong arguments, and DataError for arrays that are no examples.
    """
    named = {"alpha": alpha, "share": share, "classes": classes, "domains": domains, "min_size": min_size}
    section = {"kind": kind, "clients": clients, "validation": validation, "test": test, "unseen": unseen}
    section |= (
        {"permute_labels": permute_labels} | {n: v for n, v in named.items() if v is not None} | dict(options or {})
    )
    examples = _arrays(columns)
    _refuse(section, len(examples), by=by, together=together)
    labels = examples.labels
    groups = labels if labels is not None and labels.ndim == 1 and labels.dtype.kind in "iu" else None
    names = tuple(label_names) or (
        tuple(str(i) for i in range(int(labels.max()) + 1)) if groups is not None and labels is not None else ()
    )
    if groups is not None and not 0 <= groups.min() <= groups.max() < len(names):
        low, high = int(groups.min()), int(groups.max())
        raise DataError(
            f"labels: numbers from {low} to {high}, expected classes from 0 to {len(names) - 1 if label_names else 'their number - 1'}; "
            "np.unique(labels, return_inverse=True)[1] numbers them so"
        )
    column, units = (None if v is None else _numbered(v) for v in (by, together))
    return _divided(examples, groups, names, column, np.zeros(len(examples), np.int8), section, seed, units)


def _arrays(columns: Mapping[str, Any]) -> Arrays:
    """Columns as examples. Raises DataError for what no tensor can hold, and for none at all."""
    out = {}
    for name, given in columns.items():
        try:
            v = given.detach().cpu().numpy() if hasattr(given, "detach") else np.asarray(given)
        except ValueError as e:
            raise DataError(f"column {name!r}: {e}, expected rows of one shape; pad them") from e
        if v.dtype.kind not in "fiub" and v.size:
            kind = "texts" if v.dtype.kind == "U" else v.dtype.name
            raise DataError(
                f"column {name!r}: holds {kind} (such as {str(v.flat[0])[:40]!r}), expected numbers; turn texts into numbers first, or "
                "write a recipe, whose data may be texts"
            )
        if v.ndim == 0:
            raise DataError(f"column {name!r}: one number, expected one for each row")
        out[name] = v.astype(np.int64) if name == "labels" and v.dtype.kind in "iu" else v
    if not out or not len(next(iter(out.values()))):
        raise DataError("columns: there are no rows, expected at least one for each client")
    return Arrays(out)


def _refuse(section: Mapping[str, Any], rows: int, **each: Sequence[Any] | None) -> None:
    """Raise ConfigError for options that no partition has or that are out of range. each: one value per row, or None."""
    bad = []
    options_of = {f.name for cls in PARTITIONS.values() for f in fields(cls)}  # type: ignore[arg-type]
    known = options_of | {"kind", "clients", "validation", "test", "min_size", "unseen", "permute_labels"}
    for n in sorted(section.keys() - known):
        bad.append(Problem(f"from_arrays.{n}", section[n], "an option of a partition", near(n, known)))
    if section["kind"] not in PARTITIONS:
        bad.append(
            Problem("from_arrays.kind", section["kind"], "a kind of partition", near(section["kind"], PARTITIONS))
        )
    least: dict[str, float] = {"clients": 1, "min_size": 0, "unseen": 0, "classes": 1, "domains": 1}
    bad += [
        Problem(f"from_arrays.{n}", section[n], f"an integer >= {v}") for n, v in least.items() if section.get(n, v) < v
    ]
    if "alpha" in section and not section["alpha"] > 0:
        bad.append(Problem("from_arrays.alpha", section["alpha"], "a number > 0"))
    shares = [n for n in ("validation", "test", "share") if n in section and not 0 <= section[n] <= 1]
    bad += [Problem(f"from_arrays.{n}", section[n], "a share from 0 to 1") for n in shares]
    for n, v in each.items():
        if v is not None and len(v) != rows:
            bad.append(Problem(f"from_arrays.{n}", f"{len(v)} values", f"one for each of {rows} rows"))
    if bad:
        raise ConfigError(bad)


def _numbered(values: Sequence[Any]) -> Column:
    names, codes = np.unique(np.asarray(values), return_inverse=True)
    return Column(codes.astype(np.int64), names.tolist())


def _divided(
    examples: Tokens | Arrays, groups: np.ndarray | None, names: tuple[str, ...], column: Column | None, origin: np.ndarray,
    section: Mapping[str, Any], seed: int, units: Column | None = None,
) -> FederatedData:  # fmt: skip
    """Partition the rows of origin 0, cut splits from them or take those of the files. units: rows that stay together."""
    together = None if units is None else Together(units.codes, units.names)
    own = np.flatnonzero(origin == 0)
    labels = np.zeros(len(origin), np.int64) if groups is None else groups
    if together is not None:
        together.apart(origin)
        if column is not None and PARTITIONS[section["kind"]].by_column:
            together.within(column.codes, column.names, "the partition's column")
    rows, ids = _partition(section, labels, column, own, groups is not None, seed, together)
    unseen = section.get("unseen", 0)
    if unseen >= len(ids):
        raise ConfigError([Problem("partition.unseen", unseen, f"less than the number of clients, {len(ids)}")])
    if unseen:
        rows, ids = _unseen_last(rows, ids, unseen, seed)
    files = {s: np.flatnonzero(origin == o) for o, s in ((1, "validation"), (2, "test")) if (origin == o).any()}
    shares = {s: section[s] for s in ("validation", "test") if s not in files}
    scaled = _targets(examples, labels)
    rows = Rows(rows.offsets, own[rows.rows])
    splits = (
        split(rows, scaled, shares, seed) if together is None else split_together(together, rows, scaled, shares, seed)
    )
    splits = {s: r for s, r in splits.items() if s == "train" or shares[s] > 0}
    for name, new in files.items():
        if section["kind"] == NATURAL and column is not None:
            splits[name] = _of_owner(column, ids, new, name)
        else:
            strata = column.codes if section["kind"] == "domain" and column is not None else labels
            called = [] if section["kind"] == "domain" else names
            deal = partial(_dealt, splits["train"], strata, seed, called)
            found = deal(new) if together is None else given_together(together, new, strata, deal)
            splits[name] = Rows(found.offsets, new[found.rows])
    maps = label_permutation(len(ids), len(names), seed) if section.get("permute_labels") else None
    return FederatedData(examples, ids, splits, names, maps, unseen, groups)


def _dealt(train: Rows, strata: np.ndarray, seed: int, names: Sequence[str], new: np.ndarray) -> Rows:
    return like(train, strata, strata[new], seed, names)


def _unseen_last(rows: Rows, ids: Sequence[str], unseen: int, seed: int) -> tuple[Rows, list[str]]:
    """Clients in an order in which a random `unseen` of them come last. The last of a partition that follows the labels would
    hold classes that nobody else has."""
    chosen = np.sort(np_rng(seed, "partition", "unseen").choice(len(ids), unseen, replace=False))
    order = [*np.setdiff1d(np.arange(len(ids)), chosen).tolist(), *chosen.tolist()]
    offsets = np.concatenate([[0], np.cumsum(rows.sizes[order])]).astype(np.int64)
    return Rows(offsets, np.concatenate([rows[k] for k in order])), [ids[k] for k in order]


def _targets(examples: Tokens | Arrays, labels: np.ndarray) -> np.ndarray:
    """What the splits of a client must agree in: classes, or the values of a regression."""
    own = examples.labels
    return own if own is not None and own.ndim == 1 and own.dtype.kind == "f" else labels


def _partition(
    p: Mapping[str, Any], labels: np.ndarray, column: Column | None, own: np.ndarray, labelled: bool, seed: int,
    together: Together | None,
) -> tuple[Rows, list[str]]:  # fmt: skip
    """Which of the rows `own` each client has, by their places there, and the clients' ids."""
    kind = p["kind"]
    if kind not in PARTITIONS:
        raise ConfigError([Problem("partition.kind", kind, f"one of {', '.join(PARTITIONS)}", near(kind, PARTITIONS))])
    cls = PARTITIONS[kind]
    if cls.by_label and not labelled:
        free = [name for name, c in PARTITIONS.items() if not c.by_label and name != "domain"]
        expected = "a kind that needs no classes"
        raise ConfigError([Problem("partition.kind", kind, expected, f"choose {', '.join(free[:-1])} or {free[-1]}")])
    if cls.by_column and column is None:
        raise ConfigError([Problem("partition.column", None, f"a column for kind {kind}", "name it")])
    options = {f.name: p[f.name] for f in fields(cls) if f.name in p}  # type: ignore[arg-type]
    partition, least = cls(**options), p.get("min_size", 1)

    def of(rows: np.ndarray, min_size: int) -> Given:
        codes, names = (None, ()) if column is None else (column.codes[rows], column.names)
        return Given(labels[rows], p["clients"], seed, min_size, codes, names)

    ids = partition.ids(of(own, least))
    if together is None or cls.natural:
        return partition.rows(of(own, least)), ids
    by_group = lambda rows: partition.rows(of(rows, min(least, 1)))  # noqa: E731
    return divided(together, own, labels, p["clients"], least, seed, by_group), ids


def _of_owner(column: Column, ids: Sequence[str], rows: np.ndarray, name: str) -> Rows:
    """Rows of a test or validation file, given to the natural clients that its column names.

    Rows of clients that were left out of training are left out as well.
    """
    number = {id: k for k, id in enumerate(ids)}
    names = [str(v) for v in column.names]
    owner = np.array([number.get(v, -1) for v in names], np.int64)[column.codes[rows]]
    if not (owner >= 0).any():
        shown = ", ".join(repr(names[c]) for c in np.unique(column.codes[rows])[:3])
        raise DataError(f"data.{name}: none of its clients ({shown}, ...) trains; expected clients such as {ids[0]!r}")
    kept = group(owner, len(ids), np.flatnonzero(owner >= 0))
    return Rows(kept.offsets, rows[kept.rows])
