"""The recipes that come with the package: what there is, and a copy of one to change."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, Problem, near

# Part of the package. The recipes in papers/ repeat the tables of the papers.
FOLDER = Path(__file__).parents[1] / "recipes"
# Editors with a YAML language server complete and check a recipe by the schema that its first line names.
SCHEMA = FOLDER / "recipe.schema.json"
MARK = "# yaml-language-server: $schema="


@dataclass(frozen=True)
class Shipped:
    """One recipe. The comment at the file's top says what it shows, and after "Size:" how much work it is."""

    name: str
    path: Path
    shows: str
    size: str

    @property
    def paper(self) -> bool:
        """Whether it repeats a table of a paper."""
        return self.path.parent != FOLDER


def shipped() -> list[Shipped]:
    """All recipes of the package: first the single ones, then the sweeps of papers, by name."""
    found = [_described(p) for p in FOLDER.rglob("*.yaml")]
    return sorted(found, key=lambda r: (r.paper, r.name))


def _described(path: Path) -> Shipped:
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [x.removeprefix("#").strip() for x in lines if x.startswith("#") and not x.startswith(MARK)]
    size = next((c.removeprefix("Size:").strip() for c in comments if c.startswith("Size:")), "")
    return Shipped(path.stem, path, comments[0] if comments else "", size)


def copy(name: str, folder: Path) -> Path:
    """A copy of the recipe `name` as folder/name.yaml, whose first line names the schema of this installation.

    Raises ConfigError for an unknown name or a file that is there.
    """
    return write_new(folder / f"{name}.yaml", known(name).path.read_text(encoding="utf-8"), "recipes")


def known(name: str) -> Shipped:
    """The recipe of that name. Raises ConfigError for an unknown one."""
    found = {r.name: r for r in shipped()}
    if name not in found:
        raise ConfigError([Problem("recipes", name, "the name of a shipped recipe", near(name, found))])
    return found[name]


def write_new(target: Path, text: str, field: str) -> Path:
    """Write a recipe as a new file, with the schema's address in its first line. Raises ConfigError for a file that is there."""
    body = text.partition("\n")[2] if text.startswith(MARK) else text
    try:
        # Mode "x" fails if the file exists, even if another process has just made it.
        with target.open("x", encoding="utf-8") as f:
            f.write(f"{MARK}{SCHEMA.as_uri()}\n{body}")
    except FileExistsError:
        remedy = "move the file away, or go to another folder"
        raise ConfigError([Problem(field, str(target), "a file that is not there yet", remedy)]) from None
    except OSError as e:
        raise ConfigError([Problem(field, str(target), f"a file to write ({e.strerror})", "check its folder")]) from e
    return target
