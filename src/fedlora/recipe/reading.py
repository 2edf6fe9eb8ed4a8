"""YAML in and out, by the rules of YAML 1.2: 1e-3 is a number, `no` and `on` are words, a date is text."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from ..errors import ConfigError, Problem, near

PLAIN: dict[
    str, tuple[str, Sequence[str]]
] = {  # YAML 1.2's core schema: tag -> (pattern, characters it can start with)
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "null": (r"~|null|Null|NULL|", ("~", "n", "N", "")),
    "merge": (r"<<", "<"),
}


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's plain scalars; a key that occurs twice is an error."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]  # the stubs take it for an attribute

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                first = seen[key.value].start_mark.line + 1
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} occurs twice, first in line {first}", key.start_mark
                )
            seen[key.value] = key
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would not read as text, and writes short lists on one line."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


for _tag, (_pattern, _first) in PLAIN.items():
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _int(loader: Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


Loader.add_constructor("tag:yaml.org,2002:int", _int)
Dumper.add_representer(tuple, lambda d, v: d.represent_sequence("tag:yaml.org,2002:seq", v, flow_style=True))
Dumper.add_representer(list, lambda d, v: d.represent_sequence("tag:yaml.org,2002:seq", v, flow_style=True))


def parse(text: str, source: str) -> Any:
    """The value of a YAML text. Raises ConfigError with line and column; `source` says whose."""
    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        at = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        line = text.splitlines()[mark.line].strip() if mark and mark.line < len(text.splitlines()) else ""
        why = ", ".join(p for p in (e.context, e.problem) if p)
        raise ConfigError([Problem(at, line, "valid YAML", why)]) from e
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise ConfigError([Problem(source, text[:40], "valid YAML", str(e))]) from e


def read(path: str | Path) -> dict[str, Any]:
    """The mapping in a recipe file. Raises ConfigError for a file that is missing, unreadable or something else."""
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as e:
        raise ConfigError([Problem(str(path), "no such file", "a recipe file", _around(path))]) from e
    except IsADirectoryError as e:
        inside = [str(path / p.name) for p in sorted(path.iterdir()) if p.suffix in (".yaml", ".yml")]
        raise ConfigError([Problem(str(path), "a folder", "a recipe file", near(path.name, inside))]) from e
    except UnicodeDecodeError as e:
        got = f"byte 0x{e.object[e.start]:02x} at offset {e.start}"
        raise ConfigError([Problem(str(path), got, "UTF-8 text", "save the file as UTF-8")]) from e
    except OSError as e:
        raise ConfigError([Problem(str(path), e.strerror, "a readable file", "check its permissions")]) from e
    return mapping(parse(text, str(path)), str(path))


def _around(path: Path) -> str:
    """The files that might have been meant."""
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {str(folder)!r} does not exist either"
    return near(path.name, sorted(p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml")))


def mapping(value: Any, path: str) -> dict[str, Any]:
    """`value` if it is a mapping with text keys. Raises ConfigError otherwise."""
    if not isinstance(value, Mapping):
        raise ConfigError([Problem(path, value, "a mapping of sections", "start with model:, data: and method:")])
    odd = [k for k in value if not isinstance(k, str)]
    if odd:
        raise ConfigError([Problem(path, k, "text as key", f"put it in quotes: {str(k)!r}") for k in odd])
    return dict(value)


def dump(value: Mapping[str, Any]) -> str:
    """YAML text that reads back as `value` under YAML 1.1 and 1.2 alike."""
    return yaml.dump(dict(value), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
