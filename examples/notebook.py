# %% [markdown]
# # Three methods on data of your own
#
# Three clinics have notes that they may not show each other, and each writes in its own way. This notebook makes such
# data, trains three federated methods on them, draws what happened and exports an adapter that PEFT can load.
#
# It needs `pip install 'fedlora[demo,report]'` and about two minutes on two cores.

# %%
import random

import pandas as pd

import fedlora as fl

# %% [markdown]
# ## The data
#
# One row a note: the text, what it was labelled as, and whose it is. Yours come from `pd.read_csv`, or stay a file.

# %%
random.seed(0)
SAID = {
    "urgent": ["pain in the chest", "short of breath", "pale and sweating", "fever since a week"],
    "calm": ["for a control", "a prescription", "slept well", "no complaints"],
}
WAYS = {"north": "patient says: {}", "south": "{}; seen in clinic", "coast": "on the phone: {}"}
notes = pd.DataFrame(
    [
        {"text": WAYS[clinic].format(f"{random.choice(SAID[label])}, day {day}"), "label": label, "clinic": clinic}
        for clinic in WAYS
        for day in range(60)
        for label in [random.choice(list(SAID))]
    ]
)
notes.to_csv("notes.csv", index=False)
notes.head()

# %% [markdown]
# ## A recipe
#
# It says everything that a run needs. `fl.check` looks before anything is trained: what is odd in the data, and what
# the run takes.

# %%
recipe = {
    "name": "notes",
    "model": {"name": "minilm"},
    "data": {"source": "notes.csv", "text": "text", "label": "label", "client": "clinic", "max_length": 32},
    "method": {"name": "homlora", "rank": 4},
    "train": {"steps": 4, "batch_size": 8, "lr": 5e-3},
    "federation": {"rounds": 4},
}
fl.check(recipe, measure=False)

# %% [markdown]
# ## Three methods
#
# HomLoRA shares both factors of the adapter, FedSA-LoRA keeps B at the clinic, and Local-only shares nothing.
# A sweep trains one after the other. Run the cell again after an interruption: it goes on.

# %%
summaries = fl.sweep(recipe, {"sweep.method.name": ["homlora", "fedsa", "local"]}, "runs/notebook")
summaries[0]

# %%
fl.results("runs/notebook")[["method", "view", "accuracy", "worst_decile", "bytes_up", "seconds"]]

# %% [markdown]
# ## A figure
#
# `history` is a table with a row for each round of training and for each evaluation.

# %%
import plotly.express as px

curves = pd.concat([s.history.assign(method=s["method"]["title"]) for s in summaries])
curves = curves[(curves["split"] == "validation") & (curves["view"] == "personal")]
figure = px.line(
    curves, x="round", y="accuracy", color="method", markers=True, title="Mean over clinics, on validation"
)
figure

# %% [markdown]
# ## Use a model
#
# The best round on validation is what predicts and what is exported. `exported` is a folder that
# `peft.PeftModel.from_pretrained` loads.

# %%
run = fl.load(summaries[1].folder)
run.predict(["patient says: pale and sweating"], client="north")

# %%
exported = run.export("adapters", clients=["north"])[0]
sorted(p.name for p in exported.iterdir())
