"""The repository itself: versions, pins, make targets, the wheel, and what an import costs."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUP_FILES = ("pyproject.toml", "constraints.txt", "Makefile", ".ci/run", ".pre-commit-config.yaml")
HEAVY = (
    "torch",
    "transformers",
    "pyarrow",
    "datasets",
    "pydantic",
    "numpy",
    "peft",
    "flwr",
    "sklearn",
    "scipy",
    "pandas",
    "plotly",
)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pins() -> dict[str, Version]:
    lines = [line for line in read("constraints.txt").splitlines() if line and not line.startswith("#")]
    odd = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)]
    assert not odd, f"not name==version, or with a local suffix: {odd}"
    found = [line.split("==") for line in lines]
    assert len({canonicalize_name(n) for n, _ in found}) == len(found)
    return {canonicalize_name(n): Version(v) for n, v in found}


def requirements() -> list[Requirement]:
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    return [Requirement(r) for g in groups for r in g]


# versions and pins ---------------------------------------------------------------------------------------------------
def test_version_is_the_same_everywhere() -> None:
    version = PROJECT["project"]["version"]
    (newest, *_) = re.findall(r"^## (\d+\.\d+\.\d+)", read("CHANGELOG.md"), re.MULTILINE)
    assert newest == version
    own = re.findall(r"^__version__ = \"(.*)\"", read("src/fedlora/__init__.py"), re.MULTILINE)
    assert own in ([], [version])


def test_changelog_names_what_breaks_first() -> None:
    for release in re.split(r"^## ", read("CHANGELOG.md"), flags=re.MULTILINE)[1:]:
        assert re.findall(r"^### (.*)", release, re.MULTILINE)[0] == "Breaking", release.splitlines()[0]


def test_every_requirement_is_pinned_within_its_bounds() -> None:
    exact = pins()
    for r in requirements():
        name = canonicalize_name(r.name)
        if name != "fedlora":
            assert name in exact, f"{r.name} is not in constraints.txt"
            assert exact[name] in r.specifier, f"{r} does not allow the pinned {exact[name]}"
            assert r.specifier, f"{r.name} has no bound"
    assert exact["torch"] == Version("2.13.0")
    assert Version("3.11") in Requirement(f"x{PROJECT['project']['requires-python']}").specifier


def test_what_is_installed_is_what_is_pinned() -> None:
    """In an environment that make has made; others may have what they want."""
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("not in the environment of the Makefile")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True
    )
    installed = {canonicalize_name(p["name"]): Version(p["version"]) for p in json.loads(done.stdout)}
    exact = pins()
    loose = {n for n in installed if n not in exact} - {"pip", "fedlora"}
    assert not loose, f"installed but not in constraints.txt: {sorted(loose)}"
    other = {n: str(v) for n, v in installed.items() if n in exact and Version(v.public) != exact[n]}
    assert not other, f"another version than in constraints.txt: {other}"


@pytest.mark.parametrize("name", SETUP_FILES)
def test_no_registry_is_named(name: str) -> None:
    assert not re.search(r"https?://|index-url|find-links|file:/", read(name))


def test_all_extras_are_in_dev() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    (own,) = [Requirement(r) for r in extras["dev"] if r.startswith("fedlora")]
    assert own.extras == extras.keys() - {"dev", "bench"}  # peers are large, and only measured


# make ----------------------------------------------------------------------------------------------------------------
def make(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": path or os.environ["PATH"]}
    environment.pop("MAKEFLAGS", None)
    environment.pop("MAKELEVEL", None)
    command = [shutil.which("make") or "make", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@needs_make
def test_make_installs_pinned_versions_then_runs(tmp_path: Path) -> None:
    demo = make("-n", "demo", f"VENV={tmp_path / 'v'}")
    assert demo.returncode == 0, demo.stderr
    assert "install -c constraints.txt -e '.[demo,report]'" in demo.stdout
    assert demo.stdout.rstrip().endswith("fedlora demo")
    test = make("-n", "test", f"VENV={tmp_path / 'v'}")
    assert test.returncode == 0, test.stderr
    steps = ["-e '.[dev]'", "/ruff check", "/ruff format --check", "/mypy", "/lint-imports", "-m pytest"]
    places = [test.stdout.index(s) for s in steps]
    assert places == sorted(places)
    assert test.stdout.count("install -c") == 1


@needs_make
def test_make_installs_again_only_when_the_pins_change(tmp_path: Path) -> None:
    stamp = tmp_path / ".installed-dev"
    stamp.touch()
    os.utime(stamp, (4e9, 4e9))
    assert "-m pip" not in make("-n", "lint", f"VENV={tmp_path}").stdout
    os.utime(stamp, (1, 1))
    assert "-m pip" in make("-n", "lint", f"VENV={tmp_path}").stdout


def tools(folder: Path, pythons: Sequence[tuple[str, str]]) -> str:
    """A PATH with the shell's tools and nothing else, and these fake Pythons: (name, shell script)."""
    folder.mkdir()
    for tool in ("sh", "rm", "touch", "echo"):
        found = shutil.which(tool)
        assert found
        (folder / tool).symlink_to(found)
    for name, script in pythons:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    return str(folder)


@needs_make
def test_make_says_which_python_it_needs(tmp_path: Path) -> None:
    """A Python that is too old, a shim that only complains, and none at all."""
    old = 'case "$*" in *version_info*) exit 1;; *) echo Python 3.9.6;; esac'
    shim = "echo command not found >&2; exit 127"
    for case, pythons in {"old": [("python3", old), ("python3.12", shim)], "none": []}.items():
        done = make("lint", f"VENV={tmp_path / 'v'}", "SHELL=/bin/sh", path=tools(tmp_path / case, pythons))
        assert done.returncode != 0
        assert "fedlora needs Python 3.11 or newer" in done.stderr
        assert ("python3 here is: Python 3.9.6" if pythons else "python3 here is: missing") in done.stderr
        assert "make lint PYTHON=" in done.stderr
        assert not (tmp_path / "v").exists()


@needs_make
def test_make_takes_the_first_python_that_works(tmp_path: Path) -> None:
    """The shim before it is passed over; what is made is used, and a failed installation leaves no stamp."""
    log = tmp_path / "log"
    good = f'echo "$0 $*" >> {log}; case "$*" in *venv*--clear*) exit 3;; esac'
    path = tools(tmp_path / "bin", [("python3.13", "exit 127"), ("python3.12", good), ("python3", good)])
    done = make("lint", f"VENV={tmp_path / 'v'}", "SHELL=/bin/sh", path=path)
    assert done.returncode != 0
    calls = log.read_text(encoding="utf-8")
    assert "python3.12 -m venv --clear" in calls
    assert "bin/python3 " not in calls
    assert not list(tmp_path.glob("v/.installed*"))


def test_ci_runs_the_test_command() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text
    assert text.rstrip().endswith("\nmake test")


def test_pre_commit_downloads_nothing() -> None:
    repos = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert {r["repo"] for r in repos} == {"local"}
    assert {h["id"] for r in repos for h in r["hooks"]} == {"ruff", "ruff-format", "mypy", "lint-imports"}


# wheel ---------------------------------------------------------------------------------------------------------------
def test_wheel_holds_the_package_whole_and_nothing_else(tmp_path: Path) -> None:
    if find_spec("hatchling") is None:
        pytest.skip("needs hatchling, which the extra dev installs")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    version = PROJECT["project"]["version"]
    assert wheel.name == f"fedlora-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as z:
        inside = {n for n in z.namelist() if not n.startswith(f"fedlora-{version}.dist-info/")}
        metadata = z.read(f"fedlora-{version}.dist-info/METADATA").decode()
        scripts = z.read(f"fedlora-{version}.dist-info/entry_points.txt").decode()
        assert z.read(f"fedlora-{version}.dist-info/licenses/LICENSE").decode() == read("LICENSE")
    source = ROOT / "src"
    own = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert inside == own
    assert "fedlora/py.typed" in inside
    assert "fedlora = fedlora.cli:entry" in scripts
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata


# words ----------------------------------------------------------------------------------------------------------------
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/*.md"), *ROOT.glob("examples/**/*.md")]
)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_lines_of_pages_are_short(page: Path) -> None:
    """At most 120 columns, so that pages can be read and compared anywhere. Rows of tables and addresses may run on."""
    lines = page.read_text(encoding="utf-8").splitlines()
    short = [re.sub(r"https?://\S+", "", x) for x in lines if not x.startswith("|")]
    assert not [x for x in short if len(x) > 120]


# imports -------------------------------------------------------------------------------------------------------------
def loaded(code: str) -> list[str]:
    """Modules that `code` loads in a fresh interpreter."""
    program = f"import sys, json\n{code}\nprint('\\n' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


HELP = "from fedlora.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass"
LIGHT = {  # what must not be loaded, and how many modules may be: 63, 257 and 321 when this was written, in 0.05 to 0.3 s
    "import fedlora": (HEAVY, 100),
    "import fedlora.recipe": ([m for m in HEAVY if m != "pydantic"], 350),
    HELP: (HEAVY, 420),
}


@pytest.mark.parametrize("code", LIGHT)
def test_import_is_light(code: str) -> None:
    """Modules are counted, not seconds: those say more of the machine's other work."""
    forbidden, most = LIGHT[code]
    modules = loaded(code)
    assert not {m.partition(".")[0] for m in modules} & set(forbidden)
    assert len(modules) < most


# tasks ---------------------------------------------------------------------------------------------------------------
def asks_for_a_task(code: str) -> list[int]:
    """Lines that ask which task it is: a comparison, a case or a key with a task's name, or isinstance of a task's class."""
    import ast

    from fedlora.training.tasks import NAMES, TASKS

    classes = {c.__name__ for c in TASKS.values()}
    named = lambda node: [n for n in ast.walk(node) if isinstance(n, ast.Constant) and n.value in NAMES]  # noqa: E731
    found = set()
    for node in ast.walk(ast.parse(code)):
        parts: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        elif isinstance(node, ast.Dict):
            parts = [k for k in node.keys if k is not None]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            inside = {getattr(n, "id", getattr(n, "attr", "")) for n in ast.walk(node.args[1])}
            found |= {node.lineno} if inside & classes else set()
        found |= {node.lineno for p in parts if named(p)} if hasattr(node, "lineno") else set()
    return sorted(found)


def test_nobody_asks_which_task_it_is() -> None:
    """A further task is one file: what depends on the task, the task says."""
    package = ROOT / "src/fedlora"
    odd = {
        f"{p.relative_to(package)}:{line}"
        for p in package.rglob("*.py")
        if p.parent != package / "tasks"
        for line in asks_for_a_task(p.read_text(encoding="utf-8"))
    }
    assert not odd
    for code in (
        "task.kind == 'regression'", "if 'causal-lm' != kind: pass", "kind in ('regression', 'x')", "{'multi-label': 1}[kind]",
        "isinstance(t, (int, tasks.CausalLM))", "match kind:\n case 'regression':\n  pass",
    ):  # fmt: skip
        assert asks_for_a_task(code), code
    assert not asks_for_a_task("load('regression'); x == 'other'; isinstance(t, Task)")


# words ---------------------------------------------------------------------------------------------------------------
DESCRIBED = ("methods", "adapters", "training", "federation", "evaluation", "model", "checkpoints", "data", "serving")


def undescribed(files: dict[str, str]) -> list[str]:
    """Public classes and functions without a docstring; one that overrides a function with a docstring has that one's."""
    known: dict[str, list[tuple[list[str], dict[str, bool]]]] = {}
    trees = {name: ast.parse(text) for name, text in files.items()}
    for tree in trees.values():
        for n in (x for x in ast.walk(tree) if isinstance(x, ast.ClassDef)):
            bases = [b.id if isinstance(b, ast.Name) else getattr(b, "attr", "") for b in n.bases]
            own = {m.name: bool(ast.get_docstring(m)) for m in n.body if isinstance(m, ast.FunctionDef)}
            known.setdefault(n.name, []).append((bases, own))

    def described(cls: str, method: str, seen: frozenset[str] = frozenset()) -> bool:
        bases = [b for bs, _ in known.get(cls, []) for b in bs if b not in seen]
        return any(
            any(own.get(method) for _, own in known.get(b, [])) or described(b, method, seen | {b}) for b in bases
        )

    out = []
    for name, tree in trees.items():
        for n in tree.body:
            if not isinstance(n, ast.FunctionDef | ast.ClassDef) or n.name.startswith("_"):
                continue
            out += [] if ast.get_docstring(n) else [f"{name}: {n.name}"]
            for m in n.body if isinstance(n, ast.ClassDef) else ():
                public = isinstance(m, ast.FunctionDef) and not m.name.startswith("_")
                if public and not ast.get_docstring(m) and not described(n.name, m.name):
                    out.append(f"{name}: {n.name}.{m.name}")
    return out


def test_everything_public_is_described() -> None:
    files = {
        str(f.relative_to(ROOT)): f.read_text(encoding="utf-8")
        for room in DESCRIBED
        for f in sorted((ROOT / "src/fedlora" / room).rglob("*.py"))
    }
    assert undescribed(files) == []
    bad = "class A:\n    'x'\n    def f(self): 'y'\n    def g(self): ...\nclass B(A):\n    'x'\n    def f(self): ...\ndef h(): ..."
    assert undescribed({"x": bad}) == ["x: A.g", "x: h"]


SCRIPTS = sorted(f for folder in ("bench", "examples", "docs", "tests") for f in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_what_a_script_imports_of_us_is_there(path: Path) -> None:
    """Scripts that no quick test runs must follow when a name moves."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "fedlora":
            if node.module.startswith("fedlora.flower"):
                pytest.importorskip("flwr")
            module = importlib.import_module(node.module)
            for name in (a.name for a in node.names):
                assert hasattr(module, name) or find_spec(f"{node.module}.{name}"), f"{node.module} has no {name}"
