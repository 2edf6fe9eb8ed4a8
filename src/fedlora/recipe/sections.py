"""The sections of a recipe: what can be said, of which type, in which range, with which default.

Rules that join fields stand in rules.py; the section method, whose fields are the method's own, in hyperparameters.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..data import partitions
from ..federation import trackers
from ..training.tasks import NAMES

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
if TYPE_CHECKING:
    TaskName = str
else:
    # The names of all tasks as a type, so that errors, schema and docs list them.
    TaskName = Literal[NAMES]
PartShare = Annotated[float, Field(ge=0, lt=1)]  # a share of rows, below 1 so that some rows are left
Text = Annotated[str, Field(min_length=1)]
Format = Literal["auto", "csv", "tsv", "json", "jsonl", "parquet", "xlsx", "txt"]

if TYPE_CHECKING:
    TrackerName = str
else:
    TrackerName = Literal[trackers.NAMES]
if TYPE_CHECKING:
    PartitionKind = str
else:
    # The names of all kinds as a type, so that errors, schema and docs list them.
    PartitionKind = Literal[partitions.NAMES]


class Section(BaseModel):
    """Immutable, and closed: an unknown field is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )


class Model(Section):
    """The pretrained base and where it is adapted."""

    name: Text = "minilm"
    """A hub id, a local folder, or a short name: "minilm" (carried by the extra "demo"), "mpnet", "smollm2"."""
    adapter: Text | None = None
    """Where training starts: a folder with a LoRA adapter of this base, as PEFT saves it, or a hub id. null starts at the base."""
    task: TaskName = "classification"
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Of task multi-label: a label is said where its probability is above this."""
    targets: Text | Annotated[tuple[Text, ...], Field(min_length=1)] = "auto"
    """Layers with a delta: "auto" (PEFT's table, or queries and values), "all-linear", name endings, or one regular expression."""
    attention: Literal["auto", "eager", "sdpa"] = "auto"
    dtype: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """Of the frozen base; adapters are always fp32. "auto": bf16 where the device has bf16 products, else fp32; the run keeps what it
    chose. "int8": linear layers in a byte a weight with int8 products, on CPUs, for methods that differentiate once."""
    kernels: Literal["auto", "none"] = "auto"
    """Compiled operators, made by the system's C compiler: most for a bf16 base on CPUs with AMX, dropout on all with AVX-512."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    """One of auto, cpu, mps, cuda, cuda:0, cuda:1 and so on."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    revision: Text | None = None
    """Branch, tag or commit of a hub id."""


class Data(Section):
    """The examples, before they are given to clients."""

    source: Text | Annotated[tuple[Text, ...], Field(min_length=1)]
    """A file, a glob, a list of files, a folder, a database (with `query`), a hub id, a folder made by datasets' save_to_disk, or "demo"."""
    subset: Text | None = None
    """Configuration name of a hub data set."""
    split: Text | None = None
    format: Format = "auto"
    """Of the files; "auto" goes by their endings, within .gz and .zip too."""
    delimiter: Text = "auto"
    """Between the fields of a CSV or TSV file: one character, or "tab"; "auto" finds it in the first rows."""
    sheet: Text | None = None
    """Of a workbook (.xlsx) that has several."""
    query: Text | None = None
    """SELECT ... whose rows are the examples, where `source` is a database's URL; `test` and `validation` are then queries too."""
    text: Text | tuple[Text, Text] | None = None
    """Column of the text, or the two columns of a pair."""
    label: Text | None = None
    classes: Annotated[tuple[Text, ...], Field(min_length=2)] | None = None
    """Names of the classes in their order; null takes those that the data hold. Sites of a deployment cannot know each other's."""
    prompt: Text | Annotated[tuple[Text, ...], Field(min_length=2)] | None = None
    """Column that a causal language model reads without loss, before `completion`; several, such as instruction and input, are put
    under each other with an empty line between, and those that are empty in a row are left out."""
    completion: Text | None = None
    chat: bool = False
    """Write prompt and completion as a user's question and the assistant's answer, by the model's chat template."""
    messages: Text | None = None
    """Column of chats for a causal language model: lists of messages with role and content, written by the model's chat template."""
    references: Text | None = None
    """Column of the texts, or lists of texts, with which generated answers are compared; null takes `completion`."""
    template: Text | None = None
    """Text made of several columns, instead of `text` or `prompt`: "{subject} {body}"; {text} and {prompt} are those columns."""
    test: Text | None = None
    """File, split or query that is test data only."""
    validation: Text | None = None
    client: Text | None = None
    """Column that names the client of each row, or "file": one client per file."""
    site: Text | None = None
    """Name of the site that holds these data (fedlora client sets it): its one client, or the first part of its clients' names."""
    max_length: Count = 64
    """Tokens; longer texts are cut."""
    limit: Count | None = None
    """Use at most this many rows."""
    encoding: Text = "utf-8"
    missing: Literal["refuse", "drop"] = "refuse"
    """Rows without a value in a column that is needed: an error, or left out and counted."""


class Partition(Section):
    """Which client gets which rows."""

    kind: PartitionKind = "iid"
    clients: Count = 8
    alpha: Positive = 0.5
    """Concentration of the Dirichlet draw (kinds dirichlet and quantity): small is skewed."""
    share: Share = 0.5
    """Share of rows that stay in label order (kind label-sorting)."""
    classes: Count = 2
    """Classes a client holds (kind classes)."""
    column: Text | None = None
    """Column that decides (kinds column and domain)."""
    domains: Count = 1
    """Domains a client holds (kind domain)."""
    group: Text | None = None
    """Column whose equal values stay together: at one client, and on one side of its split."""
    min_size: Count = 1
    """Rows that every client gets at least."""
    validation: PartShare = 0.1
    """Share of a client's own rows."""
    test: PartShare = 0.2
    """Share of a client's own rows."""
    unseen: Natural = 0
    """Clients that never train and are evaluated as new ones."""
    permute_labels: bool = False
    """Give each client its own permutation of the labels (concept shift)."""


class Train(Section):
    """Local work of one client in one round."""

    epochs: Positive | None = None
    """Passes over the client's rows, instead of steps."""
    steps: Count | None = Field(default_factory=lambda given: None if given.get("epochs") else 10)
    """Optimizer steps; 10 where neither steps nor epochs are given."""
    batch_size: Count = 16
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Positive = 1e-3
    momentum: PartShare = 0.0
    """SGD only."""
    betas: tuple[PartShare, PartShare] = (0.9, 0.999)
    """AdamW only."""
    weight_decay: NotNegative = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of the learning rate, over the whole run."""
    warmup: Share = 0.0
    """Share of the whole run."""
    clip: Positive | None = None
    """Largest norm of a client's gradient."""
    class_weights: Literal["balanced"] | Annotated[tuple[Positive, ...], Field(min_length=2)] | None = None
    """Weight of each class in the loss, in the order of the classes; "balanced" is rows / (classes * rows of the class)."""
    accumulation: Count = 1
    """Parts a batch is computed in; the result is the same, the memory smaller."""
    dropout: bool = True
    """Use the base's own dropout rates while training."""


class Federation(Section):
    """Rounds and who takes part."""

    rounds: Count = 10
    patience: Count | None = None
    """Stop where the best round on validation is so many rounds back; null trains all rounds."""
    start: Text | None = None
    """Folder of a finished run of the same method: its server's leaves and its clients' own ones are where this run begins."""
    clients_per_round: Count | Annotated[float, Field(gt=0, le=1)] | None = None
    """A number of clients, a share of them as 0.1 to 1.0, or null for all."""
    cohort: Literal["uniform", "poisson", "fixed"] = "uniform"
    """A new uniform sample each round, each client by its own coin (a round may have none), or one sample for the whole run."""
    min_clients: Count = 1
    """Accepted uploads a round needs."""
    precision: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"
    """Of the messages; int8 has one scale per row."""
    norm_bound: Positive | None = None
    """An upload whose leaves together have a larger norm is refused."""
    guards: tuple[Text | dict[Text, dict[str, Any] | None], ...] = ()
    """What is done to uploads around the method, in order: [clip, {trimmed: {share: 0.2}}]; see the table of guards."""


class Evaluation(Section):
    """What is measured, and when. Unseen clients are evaluated wherever the partition sets some aside."""

    every: Count = 1
    """Rounds between evaluations; the start and the last round are always evaluated."""
    clients: Count | Annotated[float, Field(gt=0, le=1)] | None = None
    """Training clients that are scored: a number, a share of them as 0.1 to 1.0, or null for all. One sample for the whole run."""
    views: Annotated[tuple[Literal["personal", "global", "unseen", "cross"], ...], Field(min_length=1)] = (
        "personal",
        "global",
    )
    cross_clients: Annotated[int, Field(ge=2)] = 8
    """Clients in the matrix of the view cross."""
    batch_size: Count = 64
    analyses: tuple[Literal["effective-ranks", "asymmetry"], ...] = ()
    """Recorded with each evaluation, for cross_clients clients: effective ranks of the deltas; likeness of factors."""
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """A singular value counts in an effective rank above this share of the largest."""
    target: float | None = None
    """Score to reach: reports say after how many rounds, bytes and simulated seconds; null takes one that all compared runs reach."""
    bandwidth: tuple[Positive, Positive] = (50.0, 10.0)
    """Megabits a second of a client, down and up, for simulated seconds."""


class Generation(Section):
    """Texts that a language model writes in every evaluation, scored against references."""

    scores: tuple[Literal["bleu", "chrf", "rouge", "exact-match", "number-match", "accuracy"], ...] = ()
    """Nothing is written without one. number-match: of the number after "####", as in GSM8K, or of the last one."""
    choices: Annotated[tuple[Text, ...], Field(min_length=2)] | None = None
    """The texts that may be answers, for score accuracy: the likeliest after its prompt is the answer, and nothing is decoded."""
    per: Literal["choice", "token"] = "choice"
    """A choice's likelihood is that of all its tokens, or the mean of a token, which does not favour short ones."""
    new_tokens: Annotated[int, Field(ge=1, le=8192)] = 64
    """Most tokens of an answer."""
    temperature: NotNegative = 0.0
    """0 takes the likeliest token; above 0 a token is drawn."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens whose probabilities sum to this."""
    top_k: Natural = 0
    """Draw from so many of the likeliest tokens; 0 is no limit."""
    rows: Count | None = 64
    """Questions of a client in each split, drawn once; null for all. Rows with the same prompt are one question."""
    samples: Natural = 3
    """Questions that several clients' models answer side by side in the report, after the last round."""


class Deployment(Section):
    """Real sites (fedlora server): whom a round waits for, and how long."""

    clients: Count | None = None
    """Clients to wait for before the first round; null takes federation.min_clients."""
    deadline: Positive = 3600.0
    """Seconds a round waits for replies; later ones are refused."""
    over_selection: Annotated[float, Field(ge=1)] = 1.0
    """Clients asked for each one needed: the first to reply count, the others are late."""
    attempts: Count = 3
    """Times a round is tried before the run stops, to be resumed."""
    histograms: bool = False
    """Ask clients for their class histograms; those that do not consent send none."""
    bound: Annotated[float, Field(ge=1)] | None = 3.0
    """A site's change counts up to so many times the round's median change (the guard `bound`); null is without limit."""
    same_base: bool = True
    """Refuse a site whose base has other weights than the server's: their deltas would be summed as if they fitted."""


class Run(Section):
    """How it is run; only the seed changes the result."""

    seed: Natural = 0
    block: Literal["auto"] | Count = "auto"
    """Clients computed at once."""
    output: Text = "runs/{name}-{hash}"
    """Run folder; {name}, {hash}, {seed} and {method} are filled in."""
    tensorboard: bool = False
    """The same as trackers: [tensorboard]."""
    trackers: tuple[TrackerName, ...] = ()
    """Also write losses, scores and bytes for these, in folders of their names in the run folder; nothing is sent anywhere."""
    keep: Literal["last", "all"] = "last"
    """States on disk: those needed to resume, or those of every round."""
    threads: Count | None = None
    """Threads of torch; null leaves torch's own choice."""


# In the order of the file; "method" comes after "partition".
SECTIONS: dict[str, type[Section]] = {
    "model": Model,
    "data": Data,
    "partition": Partition,
    "train": Train,
    "federation": Federation,
    "evaluation": Evaluation,
    "generation": Generation,
    "deployment": Deployment,
    "run": Run,
}
