"""What a site lets a server ask of it: the file behind `fedlora client --policy site.yaml`.

Without a file the defaults hold, and they are strict: low-rank adapters alone, no scores, no class histograms, the packaged
model or one that the site names itself. What an order must not exceed is checked before any row is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..adapters import FORMS, Sparse
from ..checkpoints.pretrained import MINILM
from ..data import template
from ..errors import ConfigError, Problem, near, printable
from ..recipe import reading
from ..recipe.core import read_section
from ..recipe.sections import Count, Format, Natural, Positive, Section, Text
from ..training.tasks import NAMES as TASK_NAMES
from .refusal import Refusal

METHODS = (
    "homlora", "ffa", "fedsa", "share-b", "local", "fedavg-ft", "fedprox", "perfedavg", "feddpa-f", "feddpa-t", "flexlora",
    "hetlora", "pf2lora", "pf2hetlora", "rolora", "fedsvd", "flora", "fedex", "lora-fair", "fedrot", "florist", "ditto", "fedrep",
)  # fmt: skip
TEMPLATE = 500  # characters
SHAPE = (
    "encoding",
    "format",
    "delimiter",
    "sheet",
    "query",
    "missing",
)  # how a site's rows are written: its own matter

SPARSE = "sparse"  # a form that no recipe names: methods that train single entries have it
if TYPE_CHECKING:
    Adapters = str
    TaskName = str
else:
    Adapters = Literal[(*FORMS, SPARSE)]
    TaskName = Literal[TASK_NAMES]
LOW_RANK: tuple[Adapters, ...] = ("lora", "rslora", "dora", "vera")


class Rows(Section):
    """The site's columns. A recipe says which of them it needs, never what they are called."""

    text: Text | tuple[Text, Text] = "text"
    label: Text = "label"
    prompt: Text | Annotated[tuple[Text, ...], Field(min_length=2)] = "prompt"
    completion: Text = "completion"
    messages: Text = "messages"
    template: Text | None = None
    """The site's own text, made of its columns, instead of a recipe's template."""
    columns: tuple[Text, ...] = ()
    """Further columns that a recipe's template may name."""
    classes: Annotated[tuple[Text, ...], Field(min_length=2)] | None = None
    """Classes that a recipe may name; null: any. A label that the recipe does not name is an error at the site."""
    encoding: Text = "utf-8"
    format: Format = "auto"
    delimiter: Text = "auto"
    sheet: Text | None = None
    query: Text | None = None
    """Where the site's data are a database; no order says what is asked of it."""
    missing: Literal["refuse", "drop"] = "refuse"


class Base(Section):
    """The base model."""

    folder: Text | None = None
    """The site's own folder, loaded whatever the recipe calls the model."""
    known: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None] = Field(default={"minilm": None})
    """Models that a recipe may name, each with the sha256 of its weights, or null where the name will do."""


class Allow(Section):
    """Which kinds of training."""

    tasks: tuple[TaskName, ...] = TASK_NAMES
    methods: tuple[Text, ...] = METHODS
    adapters: tuple[Adapters, ...] = LOW_RANK
    """Forms of the update. The others (every weight, biases, embeddings, single entries) show rows word by word."""
    heads: tuple[Literal["shared", "personal", "frozen"], ...] = ("shared", "personal", "frozen")


class Least(Section):
    """What must stand behind anything that leaves."""

    rows: Count = 16
    """Training rows of a client, and rows that an upload is made of (steps times batch)."""
    batch: Count = 4
    """Rows of one gradient."""
    steps: Count = 1
    """Optimizer steps behind an upload."""
    score_rows: Count = 20
    """Rows behind a score."""


class Most(Section):
    """How much a server may ask for."""

    rank: Count = 64
    steps: Count = 1000
    epochs: Positive = 10.0
    batch: Count = 256
    tokens: Count = 512
    """data.max_length."""
    rounds: Count = 500
    """Of a run, attempts included."""
    rounds_a_day: Count = 500
    scores_a_day: Count = 500
    """Evaluations, whether their scores are sent or not."""
    runs_a_day: Count = 20
    seconds: Positive = 3600.0
    """Of one order."""
    gigabytes: Positive = 8.0
    """Of an order's message, and (estimated) of one client's training beside the base."""


class Send(Section):
    """What leaves beside the adapter: nothing, unless it is said."""

    scores: bool = False
    """Training losses and the scores of each client. A server that makes its own head can read shares of classes from them."""
    digits: Natural = 2
    """Decimal digits of a score."""
    histograms: bool = False
    """Rows of each class, where the recipe asks."""


PARTS_OF: dict[str, type[Section]] = {
    "data": Rows,
    "model": Base,
    "allow": Allow,
    "least": Least,
    "most": Most,
    "send": Send,
}


class Policy(BaseModel):
    """A site's policy, whole. Immutable; raises ConfigError with every problem found."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    data: Rows = Rows()
    model: Base = Base()
    allow: Allow = Allow()
    least: Least = Least()
    most: Most = Most()
    send: Send = Send()

    def __init__(self, **raw: Any) -> None:
        problems = [Problem(k, raw[k], "a section of a policy", near(k, PARTS_OF)) for k in raw if k not in PARTS_OF]
        fields: dict[str, Any] = {}
        for name, kind in PARTS_OF.items():
            fields[name], _, wrong = read_section(name, kind, raw.get(name))
            problems += wrong
        if not problems:
            problems += _inconsistent(**fields)
        if problems:
            raise ConfigError(problems)
        super().__init__(**fields)

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """The policy in a YAML file. Raises ConfigError."""
        return cls(**reading.mapping(reading.read(path), "policy"))

    def with_columns(
        self, said: Mapping[str, Any], model: str | None = None, histograms: bool = False, scores: bool = False
    ) -> Policy:
        """This policy with what the command line says of columns, model and what is sent. Raises ConfigError."""
        raw = self.model_dump(mode="json")
        raw["data"] |= dict(said)
        raw["model"] |= {"folder": model} if model else {}
        raw["send"] |= {"histograms": self.send.histograms or histograms, "scores": self.send.scores or scores}
        return type(self)(**raw)

    def to_yaml(self) -> str:
        return reading.dump(self.model_dump(mode="json"))

    def overlay(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The section data of a server's recipe as this site reads it: roles are the server's, names are the site's.

        given: that section. Raises Refusal for a template that names other columns than the site's.
        """
        d = self.data
        out: dict[str, Any] = {k: given.get(k) for k in ("classes", "max_length")} | {k: getattr(d, k) for k in SHAPE}
        used = [k for k in ("text", "label", "prompt", "completion", "messages") if given.get(k) is not None]
        out |= {k: getattr(d, k) for k in used} | {"chat": given.get("chat") or False}
        if isinstance(given.get("text"), (list, tuple)) != isinstance(d.text, tuple) and "text" in used:
            both = (
                f"the recipe reads {'pairs' if isinstance(d.text, str) else 'single texts'}, this site has {d.text!r}"
            )
            raise Refusal("policy", f"data.text: {both}", "data.text")
        roles = {k for k in used if k in ("text", "prompt")}
        asked = None if given.get("template") is None else self._checked(given["template"], roles)
        if d.template or asked:
            out["template"] = d.template or asked
            if d.template and "{text}" not in d.template:
                out.pop("text", None)
        return out

    def _checked(self, asked: Any, roles: set[str]) -> str:
        """A server's template, of this site's columns, each at most once. Raises Refusal."""
        own = {*self.data.columns, *((self.data.text,) if isinstance(self.data.text, str) else self.data.text)}
        try:
            named = [n for _, n in template.parts(str(asked)) if n is not None]
        except ValueError as e:
            raise Refusal("policy", f"data.template: {asked!r} has {e}", "data.template") from None
        odd = sorted(set(named) - own - roles)
        shown = printable(", ".join(odd), 200)
        if odd:
            raise Refusal(
                "policy",
                f"data.template: it names {shown}; this site's policy allows {', '.join(sorted(own))}",
                "data.template",
            )
        if len(set(named)) < len(named) or len(str(asked)) > TEMPLATE:
            raise Refusal(
                "policy", f"data.template: a column twice, or more than {TEMPLATE} characters", "data.template"
            )
        return str(asked)

    def names(self) -> frozenset[str]:
        """Names of models that a recipe may use; the packaged one has two."""
        known = set(self.model.known)
        return frozenset(known | {"minilm", MINILM} if known & {"minilm", MINILM} else known)

    def wanted(self, name: str) -> str | None:
        """The fingerprint that a model of this name must have, None where any will do."""
        return self.model.known.get(name)

    def parts(self) -> frozenset[str]:
        """Parts of a leaf (beside the head's) that may leave."""
        forms = [Sparse if a == SPARSE else FORMS[a] for a in self.allow.adapters]
        return frozenset(p for form in forms for p in form.trained()) | {"rank", "norm"}


def _inconsistent(data: Rows, allow: Allow, least: Least, most: Most, **_: Any) -> Iterator[Problem]:
    from ..recipe import rules
    from ..recipe.hyperparameters import table

    shape: Any = data  # these rules read fields that a recipe's section data has too
    yield from (*rules.encoding(shape), *rules.delimiter(shape))

    yield from (Problem("allow.methods", m, "a method", near(m, table())) for m in allow.methods if m not in table())
    texts = (data.text,) if isinstance(data.text, str) else data.text
    if data.label in (*texts, *data.columns):
        yield Problem(
            "data.label", data.label, "another column than those of the text", "or a text would hold its own answer"
        )
    if data.template is not None:
        try:
            template.names(data.template)
        except ValueError as e:
            yield Problem("data.template", data.template, "plain {name} of columns", f"it has {e}")
    for low, high in (("batch", "batch"), ("steps", "steps")):
        if getattr(least, low) > getattr(most, high):
            yield Problem(
                f"least.{low}",
                getattr(least, low),
                f"at most most.{high}, {getattr(most, high)}",
                "no order could be done",
            )
