"""What README and CONTRIBUTING say is true: their commands, code and tables are run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli import environment, fedlora, model_folder, rows, write_csv

from fedlora.methods import METHODS
from fedlora.methods.contract import FAMILIES
from fedlora.methods.facts import facts

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def block(text: str, mark: str) -> str:
    """The fenced block after a comment."""
    found = re.search(rf"<!-- {re.escape(mark)} -->\n```\w*\n(.*?)```", text, flags=re.DOTALL)
    assert found, mark
    return found[1]


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the README's recipe, notes.csv, and a small model in place of the packaged one."""
    folder = tmp_path_factory.mktemp("readme")
    model_folder(folder / "model")
    data = [(text, label, ("north", "south", "east")[i % 3]) for i, (text, label, _) in enumerate(rows(150))]
    write_csv(folder / "notes.csv", data, ("text", "label", "hospital"))
    recipe = block(README, "test: recipe")
    assert "{name: minilm}" in recipe
    (folder / "notes.yaml").write_text(recipe.replace("minilm", str(folder / "model")), encoding="utf-8")
    return folder


MEASURED = "methods --cost"  # every method on a whole base: minutes


def commands() -> list[list[str]]:
    """The arguments of the README's commands, line by line."""
    lines = [shlex.split(x, comments=True) for x in block(README, "test: commands").splitlines() if x.strip()]
    assert len(lines) == 12
    assert {x[0] for x in lines} == {"fedlora"}
    return [x[1:] for x in lines]


@pytest.mark.slow
def test_the_readme_command_that_measures(notes: Path) -> None:
    [command] = [c for c in commands() if " ".join(c).startswith(MEASURED)]
    fedlora(*command, cwd=notes)


def test_readme_commands(notes: Path) -> None:
    for command in commands():
        if not " ".join(command).startswith(MEASURED):
            fedlora(*command, cwd=notes)
    assert (notes / "runs/comparison.html").exists()
    assert {p.name for p in (notes / "adapters").iterdir()} == {"north", "south", "east"}


def test_readme_sites(notes: Path) -> None:
    pytest.importorskip("flwr")
    for line in block(README, "test: sites").splitlines():
        fedlora(*line.split()[1:], cwd=notes)
    assert (notes / "runs/sites/report.html").exists()


def test_the_page_on_privacy(notes: Path) -> None:
    page = (ROOT / "docs/privacy.md").read_text(encoding="utf-8")
    recipe = block(page, "test: recipe").replace("{name: minilm}", f"{{name: {notes / 'model'}}}")
    (notes / "private.yaml").write_text(recipe, encoding="utf-8")
    said = [fedlora(*x.split("#")[0].split()[1:], cwd=notes) for x in block(page, "test: commands").splitlines()]
    assert "of 8" in said[-1].stdout


@pytest.mark.slow
def test_the_page_on_flowertune(tmp_path: Path) -> None:
    """With a small model that has a chat template, and a few instructions, in place of what the recipe names."""
    import json

    from test_chats import bytewise, small_llama

    small_llama(bytewise(), tmp_path / "model")
    rows = [{"instruction": f"Say {i}.", "input": ("", "now")[i % 2], "output": f"word {i}"} for i in range(400)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    small = ["model.name=./model", "data.source=rows.jsonl", "federation.rounds=2", "train.steps=2", "evaluation.every=2",
             "data.max_length=100", "method.rank=8"]  # fmt: skip
    page = (ROOT / "docs/flowertune.md").read_text(encoding="utf-8")
    for line in block(page, "test: commands").splitlines():
        words = line.split()[1:]
        more = [x for s in small for x in ("--set", s)] if words[0] in ("check", "run") else []
        said = fedlora(*words, *more, cwd=tmp_path).stdout
        assert words[0] != "check" or ("20 train" in said and "2 a round" in said and "bytes a round" in said)
    assert (tmp_path / "entry/adapter_model.safetensors").exists()


def test_readme_python(notes: Path) -> None:
    code = block(README, "test: python")
    assert len([x for x in code.split("\n\n")[1].splitlines() if x]) <= 15
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        cwd=notes,
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("FedSA-LoRA 0.")


def test_the_pages_on_methods_are_current() -> None:
    """docs/methods.md and README's list are what docs/build.py makes of the methods; no method is missing."""
    built = docs_build()
    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    assert page == built.methods(), "make docs"
    assert built.readme() == README, "make docs"
    rows = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert sorted(rows) == sorted(METHODS) and all(f"`{m}`" in README for m in METHODS)


def test_what_is_said_of_methods_by_hand() -> None:
    """Rank 8 on a layer of 768 x 768 in fp32: 24,576 bytes a factor."""
    one = 8 * 768 * 4
    said = {m: facts(METHODS[m]) for m in METHODS}
    for name, trained, frozen, down, up, exact in (
        ("homlora", ["A", "B", "head"], [], 2 * one, 2 * one, False),
        ("ffa", ["B", "head"], ["A"], one, one, True),
        ("fedsa", ["A", "B", "head"], [], one, one, None),
        ("local", ["A", "B", "head"], [], 0, 0, None),
        ("fedsvd", ["B", "head"], [], 2 * one, one, True),
        ("fedex", ["A", "B", "head"], [], 2 * one, 2 * one, True),
        (
            "hetlora",
            ["A", "B", "head"],
            [],
            one + 8,
            one + 8,
            False,
        ),  # rank 4 for the first of the plan, and its number
        ("fedsb", ["R", "head"], ["A0", "B0"], 8 * 8 * 4, 8 * 8 * 4, None),
        ("scaffold", ["A", "B", "head"], ["cA", "cB", "cbias", "cweight"], None, None, False),
    ):
        f = said[name]
        assert (f["trained"], f["frozen"], f["exact"]) == (trained, frozen, exact), name
        if down is not None:
            assert (f["down"], f["up"]) == (down, up), name
    for f in said.values():
        assert f["family"] in FAMILIES, f["name"]
        assert f["exact"] or f["family"] != "exact", f["name"]


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda p: p.name
)
def test_links_lead_somewhere(path: Path) -> None:
    prose = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)", prose):
        if not target.startswith("https://"):
            assert (path.parent / target).exists(), target


def passes_with_example(folder: Path, examples: dict[str, str], tests: list[str], least: int) -> None:
    """The worked example, put where CONTRIBUTING says, passes these tests and those of the registries; nothing else is
    touched, and `make docs` is run.

    examples: the example's name in CONTRIBUTING -> "" for a new file of that name, or "FILE: TEXT", after which it stands.
    """
    for name in ("src", "tests", "docs", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, folder)
    for name, place in examples.items():
        text = block(CONTRIBUTING, f"example: {name}")
        file, _, after = place.partition(": ")
        if not place:
            (folder / name).write_text(text, encoding="utf-8")
        elif after:
            old = (folder / file).read_text(encoding="utf-8")
            assert old.count(after) == 1, (file, after)
            (folder / file).write_text(old.replace(after, after + text), encoding="utf-8")
        else:
            patched(folder / file, text)
    own = environment() | {"PYTHONPATH": str(folder / "src")}
    subprocess.run([sys.executable, "docs/build.py"], cwd=folder, check=True, env=own)
    registries = [
        "tests/test_docs.py::test_the_pages_on_methods_are_current",
        "tests/test_docs.py::test_the_page_on_recipes_is_current",
    ]
    plain = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    for chosen, count in ((tests, least), (registries, 2)):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *plain, *chosen],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            env=own,
        )
        assert done.returncode == 0, done.stdout[-3000:]
        passed = re.search(r"(\d+) passed", done.stdout)
        assert passed
        assert int(passed[1]) >= count


def patched(path: Path, diff: str) -> None:
    """Apply the lines of one piece of a diff: " " stays, "-" goes, "+" comes."""
    lines = diff.splitlines()
    old = "".join(x[1:] + "\n" for x in lines if x[0] != "+")
    new = "".join(x[1:] + "\n" for x in lines if x[0] != "-")
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new), encoding="utf-8")


TABLE_OF_TESTS = "tests/test_contract.py: TABLE = {\n"


def test_contributing_example_is_a_method(tmp_path: Path) -> None:
    examples = {"src/fedlora/methods/even.py": "", "row": TABLE_OF_TESTS}
    passes_with_example(tmp_path, examples, ["tests/test_contract.py", "-k", "even or every_method_has_a_row"], 7)


@pytest.mark.slow
def test_contributing_example_is_a_delta_form(tmp_path: Path) -> None:
    tests = ["tests/test_contract.py", "tests/test_export.py", "-k", "loudness or every_delta_form_has_a_row"]
    examples = {"src/fedlora/adapters/loudness.py": "", "row of a form": TABLE_OF_TESTS}
    passes_with_example(tmp_path, examples, tests, 10)


@pytest.mark.slow
def test_contributing_example_is_a_guard(tmp_path: Path) -> None:
    tests = ["tests/test_guards.py", "-k", "fedsa-damped or slora-pf2lora-damped or every_guard_has_a_row"]
    where = "tests/test_guards.py: ROWS: dict[str, Guard] = {\n"
    passes_with_example(tmp_path, {"src/fedlora/federation/guards/damped.py": "", "row of a guard": where}, tests, 7)


@pytest.mark.slow
def test_contributing_example_is_a_partition(tmp_path: Path) -> None:
    tests = ["tests/test_partition.py", "-k", "power or every_partition"]
    where = "tests/test_partition.py: KINDS: dict[str, Partition] = {\n"
    examples = {"src/fedlora/data/partitions/power.py": "", "row of a partition": where}
    passes_with_example(tmp_path, examples, tests, 5)


@pytest.mark.slow
def test_contributing_example_is_a_metric(tmp_path: Path) -> None:
    file = "src/fedlora/training/tasks/classification.py"
    examples = {file: file, "row of a metric": "tests/test_metrics.py: ORACLES = {\n"}
    passes_with_example(tmp_path, examples, ["tests/test_metrics.py"], 6)


@pytest.mark.slow
def test_contributing_example_is_a_task(tmp_path: Path) -> None:
    """The worked example, put where CONTRIBUTING says, passes the contract and is trained from a recipe."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    path = "src/fedlora/training/tasks/ordinal.py"
    (tmp_path / path).write_text(block(CONTRIBUTING, f"example: {path}"), encoding="utf-8")
    own = environment() | {"PYTHONPATH": f"{tmp_path / 'src'}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests/test_task_contract.py"), "-k", "ordinal",
               "-p", "no:cacheprovider", "-p", "no:xdist"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=own)
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) == 5
    model_folder(tmp_path / "model")
    write_csv(tmp_path / "rows.csv", rows(90))
    code = """
import fedlora as fl
summary = fl.run({
    "model": {"name": "model", "task": "ordinal"}, "method": "homlora", "train": {"steps": 2}, "federation": {"rounds": 2},
    "data": {"source": "rows.csv", "text": "text", "label": "label", "classes": ["food", "sport", "sea"], "max_length": 16},
    "partition": {"clients": 3}, "run": {"output": "run"}})
print(fl.__file__, summary["metric"], summary["test"], fl.load("run").predict(["the ball"])[0].answer)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=own, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    file, metric, score, answer = done.stdout.split()
    assert file.startswith(str(tmp_path)) and metric == "mae" and 0 <= float(score) <= 2
    assert answer in ("food", "sport", "sea")


def test_nothing_speaks_of_where_it_was_made() -> None:
    """No paths of a particular machine in what is shipped."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    for name in tracked:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".yaml", ".toml", ".html", ".json", "") and path.is_file():
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"/(home|Users|root|work)/\w+/", text.replace("/home/thesis", "")), name


def docs_build() -> Any:
    """docs/build.py as a module."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("docs_build", ROOT / "docs/build.py")
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_on_recipes_is_current() -> None:
    """docs/recipes.md is what docs/build.py makes of the types."""
    module = docs_build()
    assert (ROOT / "docs/recipes.md").read_text(encoding="utf-8") == module.text(), "run make docs"


def test_what_is_verified_is_a_test() -> None:
    """docs/verified.md names tests that are there."""
    page = (ROOT / "docs/verified.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", page)
    assert len(named) > 20
    for file, test in named:
        text = (ROOT / file).read_text(encoding="utf-8")
        assert not test or f"def {test}(" in text, (file, test)
