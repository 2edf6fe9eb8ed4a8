"""Generation: blocks write what plain PEFT writes, draws follow the softmax, and scores are those of the libraries' own commands."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from cli import fedlora, model_folder

import fedlora as fl
from fedlora.checkpoints.peft import default_targets
from fedlora.errors import ConfigError
from fedlora.model.decoding import Asked, Decoding, decode
from fedlora.recipe import Recipe
from fedlora.seeds import np_rng, rng
from fedlora.training import texts
from fedlora.tree import Key, Params

FAMILIES = list(tiny.causal_families())


def prompts(n: int, *path: object) -> list[list[int]]:
    """Of different lengths, so that a block has to pad."""
    g = np_rng("prompts", *path)
    return [g.integers(3, tiny.VOCABULARY, g.integers(1, 12)).tolist() for _ in range(n)]


def models(model: Any, clients: int, rank: int = 4) -> list[Params]:
    """LoRA deltas as the model takes them, large enough that clients write different texts."""
    return [
        {
            Key("lora", s.name, part): torch.randn(*shape, generator=rng(c, s.name, part)) * 0.5
            for s in model.groups["target"]
            for part, shape in (("A", (rank, s.in_)), ("B", (s.out, rank)))
        }
        for c in range(clients)
    ]


def in_peft(base: Any, deltas: Params) -> Any:
    """The base with PEFT's own adapter, filled by hand."""
    import peft

    rank = len(next(v for k, v in deltas.items() if k.part == "A"))
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=default_targets(base.config.model_type), task_type="CAUSAL_LM",
        fan_in_fan_out=base.config.model_type == "gpt2",
    )  # fmt: skip
    found = peft.get_peft_model(base, config).eval()
    inside = dict(found.base_model.model.named_modules())
    with torch.no_grad():
        for k, v in deltas.items():
            inside[f"{k.layer}.lora_{k.part}.default"].weight.copy_(v)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("clients, rows", [(1, 1), (3, 7), (3, 64)])
def test_a_block_writes_what_plain_peft_writes(family: str, clients: int, rows: int) -> None:
    """Token by token, greedy, fp32: each prompt alone and unpadded in PEFT."""
    build = tiny.causal_families()[family]
    model = tiny.adapt(tiny.seeded(build), "causal-lm")
    asked = [Asked(p, prompts(3 + 2 * c, c), [0] * (3 + 2 * c)) for c, p in enumerate(models(model, clients))]
    found = decode(model, asked, Decoding(12), 0, [], rows, 2)
    texts_seen = set()
    for a, said in zip(asked, found, strict=True):
        plain = in_peft(tiny.seeded(build), a.params)
        for prompt, line in zip(a.prompts, said, strict=True):
            ids = torch.tensor([prompt])
            with torch.inference_mode():
                y = plain.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=12,
                    do_sample=False,
                    pad_token_id=0,
                )
            want = y[0, len(prompt) :].tolist()
            assert line == (want[: want.index(2)] if 2 in want else want)  # 2 ends these models' texts
            texts_seen.add(tuple(line))
    assert len(texts_seen) > 2 * clients


def test_a_row_ends_at_the_tokenizers_end_of_sequence() -> None:
    model = tiny.adapt(tiny.seeded(tiny.causal_families()["llama"]), "causal-lm")
    asked = [Asked(models(model, 1)[0], prompts(6), [0] * 6)]
    [free] = decode(model, asked, Decoding(12), 0, [])
    end = free[0][3]
    [ended] = decode(model, asked, Decoding(12), 0, [end])
    assert ended == [line[: line.index(end)] if end in line else line for line in free] != free


@pytest.mark.parametrize("family", FAMILIES)
def test_draws_are_the_same_in_every_block(family: str) -> None:
    model = tiny.adapt(tiny.seeded(tiny.causal_families()[family]), "causal-lm")
    asked = [Asked(p, prompts(5, c), [10 * c + q for q in range(5)]) for c, p in enumerate(models(model, 3))]
    how = Decoding(8, temperature=1.0, top_p=0.95, top_k=20)
    state = torch.get_rng_state()
    together = decode(model, asked, how, 0, [], 64, 3)
    alone = [decode(model, [a], how, 0, [], 1, 1)[0] for a in asked]
    assert together == alone
    assert torch.equal(state, torch.get_rng_state())
    assert together != decode(model, asked, Decoding(8), 0, [], 64, 3)


def test_a_draw_follows_the_softmax() -> None:
    """The first tokens of 4,000 rows against the probabilities of transformers' own warpers, by a chi-square test."""
    from scipy.stats import chisquare
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    model = tiny.adapt(tiny.seeded(tiny.causal_families()["llama"]), "causal-lm")
    params, n = models(model, 1)[0], 4000
    how = Decoding(1, temperature=0.8, top_p=0.9, top_k=12)
    [said] = decode(model, [Asked(params, [[5, 6, 7]] * n, range(n))], how, 0, [49], 2000)
    plain = in_peft(tiny.seeded(tiny.causal_families()["llama"]), params)
    with torch.inference_mode():
        scores = plain(input_ids=torch.tensor([[5, 6, 7]])).logits[:, -1]
    for warp in (TemperatureLogitsWarper(0.8), TopKLogitsWarper(12), TopPLogitsWarper(0.9)):
        scores = warp(None, scores)
    p = scores[0].softmax(-1).double().numpy()
    drawn = np.bincount([line[0] if line else 2 for line in said], minlength=len(p))
    assert drawn[p == 0].sum() == 0 and (p > 0).sum() > 4
    assert chisquare(drawn[p > 0], n * p[p > 0] / p.sum()).pvalue > 0.01


# scores -----------------------------------------------------------------------------------------------------------------
def written(n: int) -> tuple[list[str], list[list[str]]]:
    """Answers and two references of each, alike in part."""
    words = [
        "the",
        "a",
        "cat",
        "dog",
        "sat",
        "ran",
        "on",
        "mat",
        ",",
        "hill",
        ".",
        "slowly",
        "12",
        "3,4",
        "Über",
        "don't",
    ]
    g = np_rng("written")
    refs = [[" ".join(g.choice(words, g.integers(5, 15))) for _ in range(2)] for _ in range(n)]
    noisy = [
        " ".join(w if g.random() > 0.25 else str(g.choice(words)) for w in r[i % 2].split()) for i, r in enumerate(refs)
    ]
    return noisy, refs


def command(*words: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, encoding="utf-8", check=True
    )
    return done.stdout


def lines(path: Path, rows: Sequence[str]) -> Path:
    path.write_text("".join(r + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("references", [1, 2])
def test_bleu_and_chrf_are_those_of_sacrebleus_command(references: int, tmp_path: Path) -> None:
    answers, refs = written(40)
    said = lines(tmp_path / "answers.txt", answers)
    files = [lines(tmp_path / f"ref{i}.txt", [r[i] for r in refs]) for i in range(references)]
    for name in ("bleu", "chrf"):
        shown = float(command("-m", "sacrebleu", *files, "-i", said, "-m", name, "-b", "-w", 10))
        found = texts.scored([name], answers, [r[:references] for r in refs])
        assert found == {name: pytest.approx(shown, abs=1e-8)} and 5 < shown < 95


def test_a_missing_second_reference_is_none_at_all() -> None:
    """An answer with one reference among those with two scores as if all the others' second ones were for others alone."""
    answers, refs = written(12)
    mixed = [r if i % 3 else r[:1] for i, r in enumerate(refs)]
    doubled = [r if len(r) == 2 else [r[0], r[0]] for r in mixed]  # the same reference twice changes nothing
    for name in ("bleu", "chrf"):
        assert texts.scored([name], answers, mixed) == texts.scored([name], answers, doubled)


def test_rouge_is_that_of_its_command(tmp_path: Path) -> None:
    """Mean F-measures; of two references the better one of each answer."""
    answers, refs = written(25)
    said, both = lines(tmp_path / "a.txt", answers * 2), [r[i] for i in range(2) for r in refs]
    command(
        "-m", "rouge_score.rouge", f"--prediction_filepattern={said}", "--noaggregate",
        f"--target_filepattern={lines(tmp_path / 'r.txt', both)}", f"--output_filename={tmp_path / 'o.csv'}",
    )  # fmt: skip
    with open(tmp_path / "o.csv", encoding="utf-8") as f:
        table = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]
    tables = [table[:25], table[25:]]
    for several in (1, 2):
        found = texts.scored(["rouge"], answers, [r[:several] for r in refs])
        for name in ("rouge1", "rouge2", "rougeL"):
            best = [max(t[i][f"{name}-F"] for t in tables[:several]) for i in range(25)]
            assert found[name] == pytest.approx(np.mean(best), abs=1e-6)  # the command rounds


@pytest.mark.parametrize("answer, reference, hit", [
    ("so it is 1,000 in all\n#### 1,000", "2 + 998 = 1000\n#### 1000", True),
    ("#### 72.0", "48 + 24 = 72\n#### 72", True),
    ("#### -3", "#### 3", False),
    ("of 5 there are 3 left", "#### 3", True),  # without the mark the last number counts
    ("3 of 5", "#### 3", False),
    ("none", "#### 3", False),
    ("#### 4 (of 7)", "#### 4", True),
    ("none", "none", False),  # no number is no answer
    ("#### $18.", "#### 18", True),
])  # fmt: skip
def test_numbers_are_read_as_gsm8k_writes_them(answer: str, reference: str, hit: bool) -> None:
    assert texts.scored(["number-match"], [answer], [[reference]]) == {"number_match": float(hit)}


def test_exact_match_takes_any_reference() -> None:
    answers, references = [" a b ", "a", "A b"], [["x", "a b"], ["a b"], ["a b"]]
    assert texts.scored(["exact-match"], answers, references) == {"exact_match": pytest.approx(1 / 3)}


# a run ------------------------------------------------------------------------------------------------------------------
def recipe(folder: Path, **more: Any) -> dict[str, Any]:
    """Three clients whose questions have two answers each, in rows of their own."""
    base = model_folder(folder / "m", causal=True)
    rows = [
        {"q": f"the {a}", "a": f"{b} is", "who": f"s{k}"}
        for k in range(3)
        for a in ("ball", "goal", "match", "team", "bread", "soup", "apple", "cook", "wave", "ship")
        for b in ("salt", "harbour")
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    data = {"source": str(folder / "rows.jsonl"), "prompt": "q", "completion": "a", "client": "who", "max_length": 16}
    return {
        "name": "small", "model": {"name": str(base), "task": "causal-lm", "device": "cpu"}, "method": {"name": "fedsa", "rank": 2},
        "data": data | more.pop("data", {}), "federation": {"rounds": 2}, "train": {"steps": 4, "batch_size": 8, "lr": 0.05},
        "partition": {"validation": 0.0, "test": 0.5}, "run": {"output": str(folder / "run")},
        "generation": {"scores": ["bleu", "chrf", "rouge", "exact-match"], "new_tokens": 4} | more.pop("generation", {}), **more,
    }  # fmt: skip


def test_a_run_scores_what_its_clients_write(tmp_path: Path) -> None:
    """Each client's scores are those of what its own exported adapter writes in plain transformers and PEFT, rows with one prompt
    being one question with both answers as references."""
    import peft
    import transformers
    from sacrebleu.metrics import BLEU

    fl.run(recipe(tmp_path))
    run = fl.load(tmp_path / "run")
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    [last] = [x for x in lines if x["kind"] == "eval" and (x["round"], x["view"]) == (2, "personal")]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    f = run.federation
    answered = []
    for k, client in enumerate(f.data.ids):
        [folder] = run.export(tmp_path / "out", [client], round="last")
        plain = peft.PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m"), folder
        )
        every: dict[str, list[str]] = {}
        for row in f.data.splits["test"][k]:
            source = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[row])
            every.setdefault(source["q"], []).append(source["a"])
        assert any(len(v) == 2 for v in every.values())
        said = []
        for q in every:
            ids = torch.tensor(
                [[2, *tokenizer(q, add_special_tokens=False)["input_ids"]]]
            )  # [CLS] stands before a text
            y = plain.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0
            )
            said.append(tokenizer.decode(y[0, ids.shape[1] :], skip_special_tokens=True).strip())
        answered.append(said)
        streams = [[v[i] if i < len(v) else None for v in every.values()] for i in range(2)]
        own = last["clients"][client]
        assert own["bleu"] == pytest.approx(BLEU().corpus_score(said, streams).score)
        assert own["exact_match"] == pytest.approx(np.mean([s in v for s, v in zip(said, every.values(), strict=True)]))
        assert {"chrf", "rouge1", "rouge2", "rougeL", "loss", "perplexity"} < own.keys()
    assert last["mean"]["rouge1"] == pytest.approx(np.mean([v["rouge1"] for v in last["clients"].values()]))


def test_answers_stand_side_by_side_in_the_report(tmp_path: Path) -> None:
    from fedlora.report import write_run

    fl.run(recipe(tmp_path, generation={"scores": ["rouge"], "samples": 2}))
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    [samples] = [x for x in lines if x["kind"] == "samples"]
    assert list(samples["answers"]) == ["s0", "s1", "s2"] and len(samples["questions"]) == 2
    page = write_run(tmp_path / "run").read_text(encoding="utf-8")
    assert "What the models write" in page and "model of s2" in page and "ROUGE-L" in page
    assert samples["questions"][0]["prompt"] in page and "harbour is" in page


def test_a_column_of_lists_holds_the_references(tmp_path: Path) -> None:
    given = recipe(tmp_path, data={"references": "refs"})
    path = Path(given["data"]["source"])
    rows = [json.loads(x) | {"refs": ["one", "two words", "three"]} for x in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    fl.run(given)
    references = fl.load(tmp_path / "run").federation.data.references
    assert references and set(references.values()) == {("one", "two words", "three")}
    path.write_text(
        "".join(json.dumps(r | {"refs": []} if i == 3 else r) + "\n" for i, r in enumerate(rows)), encoding="utf-8"
    )
    with pytest.raises(ConfigError, match=r"data.references: column 'refs' has an empty list in .*rows.jsonl, line 4"):
        fl.run(given, output=tmp_path / "other")


@pytest.mark.parametrize("sets, said", [
    (["model.task=classification", "data.label=who", "data.text=q", "data.prompt=null", "data.completion=null"],
     "none for classification; set model.task to causal-lm"),
    (["data.prompt=null", "data.completion=null", "data.text=a"], "none for texts without prompts"),
    (["generation.top_p=0.5"], "generation.top_p: got 0.5, expected 1.0 at temperature 0"),
    (["generation.scores=[bleu, bleu]"], "each score once"),
    (["generation.scores=[blue]"], "bleu"),
    (["data.completion=null", "data.references=a", "data.text=a", "data.prompt=null"], "a column beside data.references"),
])  # fmt: skip
def test_what_cannot_be_generated_is_refused(sets: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as e:
        Recipe.from_dict(recipe(tmp_path), sets=sets)
    assert said in str(e.value)


def test_a_score_without_its_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"the package rouge-score and sacrebleu; pip install 'fedlora\[generation\]'"
    ):
        fl.run(recipe(tmp_path))


def test_recipes_without_generation_keep_their_hash(tmp_path: Path) -> None:
    given = recipe(tmp_path)
    plain = Recipe.from_dict({k: v for k, v in given.items() if k != "generation"})
    assert plain.hash == Recipe.from_dict(given | {"generation": {}}).hash != Recipe.from_dict(given).hash


# a finished run ---------------------------------------------------------------------------------------------------------
def test_a_finished_run_is_scored_on_other_rows(tmp_path: Path) -> None:
    """The files that it writes give the same BLEU by sacrebleu's own command, with two references of each answer."""
    fl.run(recipe(tmp_path, generation={"scores": []}))
    other = tmp_path / "other.jsonl"
    rows = [json.loads(x) for x in (tmp_path / "rows.jsonl").read_text().splitlines()]
    other.write_text("".join(json.dumps(r) + "\n" for r in rows if r["who"] != "s2"), encoding="utf-8")
    done = fedlora(
        "evaluate", tmp_path / "run", "--data", other, "-c", "s0", "-c", "s1", "--set", "generation.scores=[bleu, chrf]",
        "--set", "generation.new_tokens=4", "-o", tmp_path / "said", "--json",
    )  # fmt: skip
    found = {x["model"]: x for x in map(json.loads, done.stdout.splitlines())}
    assert list(found) == ["s0", "s1"] and found["s0"]["n"] == 20  # each client's own rows
    for model, own in found.items():
        files = [tmp_path / "said" / f"{model}.{n}.txt" for n in ("references", "answers")]
        shown = command("-m", "sacrebleu", files[0], "--num-refs", 2, "-i", files[1], "-m", "chrf", "-b", "-w", 8)
        assert own["chrf"] == pytest.approx(float(shown), abs=1e-6)
    assert len((tmp_path / "said/answers.jsonl").read_text().splitlines()) == 20  # ten questions of each


def test_the_scores_of_a_run_come_again(tmp_path: Path) -> None:
    """On its own rows, whatever the models are grouped with; and in a table of 80 columns."""
    fl.run(recipe(tmp_path))
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    run = fl.load(tmp_path / "run")
    [last] = [x for x in lines if x["kind"] == "eval" and (x["round"], x["view"]) == (2, "personal")]
    assert run.evaluate(clients=["s2", "s0"], round="last") == {
        c: pytest.approx(last["clients"][c], abs=1e-6) for c in ("s2", "s0")
    }
    shown = fedlora("evaluate", tmp_path / "run", "--all-clients").stdout
    assert "mean" in shown and "rougeL" in shown and max(map(len, shown.splitlines())) <= 80
    with pytest.raises(ConfigError, match="the run is over"):
        run.evaluate(sets=["train.lr=1"])


def test_a_classifier_is_scored_with_the_classes_of_its_run(tmp_path: Path) -> None:
    """Other rows hold two of three classes, in another order."""
    from cli import rows, write_csv, write_recipe

    from fedlora.errors import DataError

    fl.run(write_recipe(tmp_path), sets=["federation.rounds=1"])
    run = fl.load(tmp_path / "run")
    other = [r for r in rows(60, 5) if r[1] != "food"]
    write_csv(tmp_path / "other.csv", other[::-1])
    said = run.predict([t for t, *_ in other])
    right = np.mean([p.answer == label for p, (_, label, _) in zip(said, other, strict=True)])
    assert run.evaluate(tmp_path / "other.csv")["global"]["accuracy"] == pytest.approx(right)
    write_csv(tmp_path / "odd.csv", [*other, ("a goal", "chess", "site-0")])
    with pytest.raises(DataError, match="chess"):
        run.evaluate(tmp_path / "odd.csv")
