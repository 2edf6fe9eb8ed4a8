"""Planted bugs. Every one must be found by the tests named beside it: `make mutants`.

A mutant is (file, old text, new text, tests). The old text occurs exactly once; test_mutants.py keeps that true.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fedlora import kernels

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src/fedlora"


@dataclass(frozen=True)
class Mutant:
    """A bug to plant. why: what it would do to a user."""

    why: str
    file: str
    old: str
    new: str
    tests: str  # pytest arguments


CONTRACT = "tests/test_contract.py"
DEPLOY = "tests/test_deploy.py"
POLICY = "tests/test_policy.py"
GENERATION = "tests/test_generation.py"
PACKETS = "tests/test_packets.py -m 'not slow'"
MUTANTS = (
    # the command
    Mutant("personal layers are shared", "methods/sgd.py", " and not self._stays(k.layer)", "", "tests/test_law_personal.py"),
    Mutant("any method takes personal layers", "methods/sgd.py", "if self.personal_layers and not self.averages:", "if False:", "tests/test_law_personal.py"),
    Mutant("everything may be personal", "methods/sgd.py", "if self.personal_layers and all(", "if False and all(", "tests/test_law_personal.py"),
    Mutant("rows of one draw are counted", "federation/engine.py", "return cls(len(batches) // draws, rows, tokens)", "return cls(len(batches) // draws, rows // draws, tokens)", "tests/test_equal.py"),
    Mutant("a minibatch is a step, however many a step draws", "federation/engine.py", "return cls(len(batches) // draws, rows, tokens)", "return cls(len(batches), rows, tokens)", "tests/test_equal.py"),
    Mutant("runs are made equal at the largest total", "report/budgets.py", "budget = min(max(u.values())", "budget = max(max(u.values())", "tests/test_equal.py"),
    Mutant("a cut run keeps the round that the whole one chose", "report/budgets.py", "own = outcome(lines, run.metric, lower)", "own = outcome(run.lines, run.metric, lower)", "tests/test_equal.py"),
    Mutant("a cut run has sent what the whole one has", "report/budgets.py", "for x in cut.trains)", "for x in run.trains)", "tests/test_equal.py"),
    Mutant("a run whose model cannot be had ends its sweep", "cli/actions.py", "            except FedloraError as e:\n", "            except TrainingError as e:\n", "tests/test_sweeps.py -k fails"),
    Mutant("dropout in short rows has no attention", "model/dropout.py", "False, packing, least=1)", "False, packing)", "tests/test_model.py -k short_rows"),
    Mutant("the unlikeliest choice is the answer", "federation/choices.py", "scores.argmax(1)", "scores.argmin(1)", "tests/test_choices.py"),
    Mutant("a mean likelihood is a sum", "federation/choices.py", "-x.losses / x.counts for", "-x.losses for", "tests/test_choices.py"),
    Mutant("a choice has no end", "federation/choices.py", "input_ids\"], *end]", "input_ids\"]]", "tests/test_choices.py"),
    Mutant("a prompt is part of its choice's likelihood", "federation/choices.py", "before += [len(kept)] * len(choices)", "before += [0] * len(choices)", "tests/test_choices.py"),
    Mutant("int8 without padding: another gradient", "kernels/deltas.py", "int8.back(g, weight, ctx.scale)", "int8.back(g, weight, ctx.scale.abs().mean().expand_as(ctx.scale))", "tests/test_int8.py -k without_padding"),
    Mutant("int8 codes are cut, not rounded", "kernels/int8.py", "* (MOST / safe)[:, None]).round()", "* (MOST / safe)[:, None]).trunc()", "tests/test_int8.py"),
    Mutant("an int8 row that is not finite is zero", "kernels/int8.py", "most / MOST, torch.nan)", "most / MOST, 0.0)", "tests/test_int8.py"),
    Mutant("the int8 gradient forgets the channels' scales", "kernels/int8.py", "rows, c = quantise(g.reshape(-1, g.shape[-1]).float(), scale)", "rows, c = quantise(g.reshape(-1, g.shape[-1]).float())", "tests/test_int8.py"),
    Mutant("the head is quantised too", "checkpoints/pretrained.py", "not to_int8(base, head)", "not to_int8(base)", "tests/test_int8.py"),
    Mutant("a tied output layer parts from its table", "kernels/int8.py", " and owners[id(m.weight)] == 1", "", "tests/test_int8.py"),
    Mutant("int8 serves methods that differentiate twice", "recipe/build.py", "if method.second_order:\n        what = f\"fp32", "if False:\n        what = f\"fp32", "tests/test_int8.py"),
    Mutant("int8 forgets the bias", "kernels/int8.py", "scaled(_product(rows, codes.t()), a, scale, bias).view", "scaled(_product(rows, codes.t()), a, scale, None).view", "tests/test_int8.py"),
    Mutant("a chat's question ends before the prompt to answer", "data/encode.py", "return int(starts[number]), held[number]", "return int(starts[number]) - 1, held[number]", "tests/test_chats.py"),
    Mutant("the first answer of a chat is the reference", "data/encode.py", "return int(starts[number]), held[number]", "return int(starts[number]), held[0]", "tests/test_chats.py"),
    Mutant("an empty input leaves its empty line", "data/columns.py", "p for p in parts if p.strip()", "p for p in parts", "tests/test_chats.py"),
    Mutant("a question is asked without the chat template", "serving/predict.py", 'if data.get("messages") or data.get("chat"):', 'if data.get("messages"):', "tests/test_chats.py"),
    Mutant("check shows the prompt as scored", "data/shown.py", '(batch["labels"][0] != -100)', '(batch["labels"][0] == -100)', "tests/test_chats.py"),
    Mutant("a gated model is said to be out of reach", "hub.py", "isinstance(x, errors.GatedRepoError) for x in chain", "False for x in chain", "tests/test_hub.py -k reason"),
    Mutant("a gated data set says nothing of logging in", "data/sources.py", "            return own\n", "            return e\n", "tests/test_hub.py -k data.source"),
    Mutant("a resolver that hangs holds a command up", "hub.py", "    asking.join(SECONDS)", "    asking.join(5)\n    assert not asking.is_alive()", "tests/test_hub.py -k resolved"),
    Mutant("an interrupted sweep is gone on with as one run", "cli/actions.py", "raise Interrupted(sweep or fed.store.root)", "raise Interrupted(fed.store.root)", "tests/test_sweeps.py"),
    Mutant("epochs that are set stand beside the recipe's steps", "recipe/overrides.py", "if path in given and other not in given:", "if False:", "tests/test_hints.py -k epochs"),
    # privacy
    Mutant("a client moves the sum by more than the clip norm", "federation/private.py", "return d if size <= norm else", "return d if size <= 2 * norm else", "tests/test_privacy.py -k moves_the_sum"),
    Mutant("the denominator is the number of uploads", "federation/private.py", "(total[k] + noise[k]) / self.expected", "(total[k] + noise[k]) / 3", "tests/test_privacy.py -k fixed_denominator"),
    Mutant("noise is smaller than stated", "federation/private.py", "        return z * self.norm\n", "        return 0.5 * z * self.norm\n", "tests/test_privacy.py -k 'canaries or stated_scale'"),
    Mutant("noise is the same in every round", "federation/private.py", 'seeded(self.place.seed, "dp", server.round)', 'seeded(self.place.seed, "dp")', "tests/test_privacy.py -k noise_of_its_own"),
    Mutant("the count of adaptive clipping is free", "federation/private.py", "z = (z**-2 - (2 * self.count_noise) ** -2) ** -0.5", "z = z", "tests/test_privacy.py -k paid_for"),
    Mutant("an exchanged client costs as one that is added", "federation/accountant.py", "dp.GaussianDpEvent(self.noise / 2 if self.exchanges else self.noise)", "dp.GaussianDpEvent(self.noise)", "tests/test_privacy.py -k fixed_cohort"),
    Mutant("a resumed run forgets what it spent", "federation/run.py", "                self._ledger.opened(done)", "                pass", "tests/test_privacy.py -k ledger_is_gone"),
    Mutant("a round is trained before it is charged", "federation/run.py", "            self._ledger.charge(server.round)", "            pass", "tests/test_privacy.py -k 'budget or recomputed'"),
    Mutant("a round that was released is free the second time", "federation/ledger.py", "if again and (not self.fresh or", "if again and (True or", "tests/test_privacy.py -k done_again"),
    Mutant("a round that was cut off is charged again in a simulation", "federation/ledger.py", "if again and (not self.fresh or", "if False and (not self.fresh or", "tests/test_privacy_killed.py -m 'not slow'"),
    Mutant("a round done again in a simulation has other noise", "federation/private.py", "draw = secret() if self.place.fresh else", "draw = secret() if True else", "tests/test_privacy_killed.py -m 'not slow'"),
    Mutant("records of a private run name its clients", "federation/run.py", "        if self.private is not None:\n", "        if False:\n", "tests/test_privacy.py -k tell_nothing"),
    Mutant("an attack is judged on the rows its threshold was chosen on", "serving/attacks/membership.py", "hits[c] += [np.sum(s[i][h[i] != side] >= cut)", "hits[c] += [np.sum(s[i][h[i] == side] >= cut)", "tests/test_attacks.py -k few_rows"),
    Mutant("members and others are exchanged", "serving/attacks/membership.py", "np.mean((below + upto) / 2)", "np.mean(len(others) - (below + upto) / 2)", "tests/test_attacks.py -k statistics"),
    Mutant("masks of a pair do not cancel", "federation/secagg.py", "y = y + pair if j > self.id else y - pair", "y = y + pair", "tests/test_secagg.py -k sum_is"),
    Mutant("the mask of a client that vanished stays", "federation/secagg.py", "total = total - pair if i > j else total + pair", "pass", "tests/test_secagg.py -k sum_is"),
    Mutant("clients have no mask of their own", "federation/secagg.py", "        y = x + mask(self._seed, len(x))\n", "        y = x.copy()\n", "tests/test_secagg.py -k sum_is"),
    Mutant("the server keeps masked vectors", "federation/secagg.py", "        self.sent.append(i)\n", "        self.sent.append(i)\n        self.boxes.setdefault(-1, {})[i] = y\n", "tests/test_secagg.py -k memory"),
    Mutant("a member gives both secrets", "federation/secagg.py", "if sent & vanished or self._told & (sent | vanished):", "if False:", "tests/test_secagg.py -k both_secrets"),
    Mutant("numbers wrap around unseen", "federation/secagg.py", ">= most:", ">= 1e9 * most:", "tests/test_secagg.py -k fixed_point"),
    Mutant("a Poisson cohort is never empty", "federation/setting.py", "np_rng(seed, \"cohort\", round).random(clients) < q).tolist()", "np_rng(seed, \"cohort\", round).random(clients) < q).tolist() or [0]", "tests/test_privacy.py -k 'coin or without_clients'"),
    Mutant("bytes of a resumed run begin at zero", "federation/run.py", "                watch.resumed(sum(", "                watch.resumed(0 * sum(", "tests/test_progress.py"),
    Mutant("steps are counted over all blocks of a round", "federation/engine.py", "        tick(t + 1, max(steps))", "        tick(t + 1, sum(steps))", "tests/test_progress.py"),
    # where a page comes from
    Mutant("a page shows a database's password", "federation/provenance.py", "        value = hidden(value)\n", "        pass\n", "tests/test_provenance.py -k command"),
    Mutant("a page names folders of the machine", "federation/provenance.py", 'elif value.startswith(("/", "~"))', 'elif value.startswith("~")', "tests/test_provenance.py -k command"),
    Mutant("changes that are not committed are not said", "federation/provenance.py", '", with changes that are not committed" if changed else ""', '""', "tests/test_provenance.py -k gits_own"),
    # the live page
    Mutant("any name for this machine may read the live page", "report/live.py", "if self.server.hosts and host not in self.server.hosts:", "if False:", "tests/test_live.py -k alone"),
    Mutant("the live page never changes", "report/live.py", 'found.append(f"{s.st_mtime_ns}.{s.st_size}")', 'found.append("+")', "tests/test_live.py -k follows"),
    Mutant("the live page is lost while a file is written", "report/live.py", "text = self._made[1] or _waiting(str(e))", "text = _waiting(str(e))", "tests/test_live.py -k keeps"),
    # the server's log
    Mutant("a log's line holds what others sent as it came", "cli/journal.py", "printable(x, 10**6) for x in", "x for x in", "tests/test_operators.py -k control"),
    Mutant("a log that is moved away is written to no more", "cli/journal.py", '            with file.open("a", encoding="utf-8") as f:', '            with file.open("r+", encoding="utf-8") as f:', "tests/test_operators.py -k moved"),
    Mutant("refused uploads count as accepted", "cli/metrics.py", "max(len(line.clients) - len(line.refused), 0)", "len(line.clients)", "tests/test_operators.py -k metrics"),
    Mutant("a site's bundle holds no certificate of its authority", "flower/keys.py", '((folder / "ca.pem").read_bytes(), PUBLIC)', '((folder / "server.pem").read_bytes(), PUBLIC)', "tests/test_site_commands.py -k keys"),
    # Python
    Mutant("True is taken for a number", "arguments.py", "isinstance(value, kind) and not isinstance(value, (bool, np.bool_))", "isinstance(value, kind)", "tests/test_python.py -k wrong"),
    Mutant("an unknown argument is Python's own error", "arguments.py", "if n not in known", "if False", "tests/test_python.py -k 'wrong or ones_own'"),
    Mutant("labels beyond the classes reach torch", "training/tasks/classification.py", "if len(labels) and not 0 <= labels.min() <= labels.max() < self.classes:", "if False:", "tests/test_python.py -k wrong"),
    Mutant("a run of other objects is opened", "api.py", "if about.hash != federation.recipe_hash:", "if False:", "tests/test_python.py -k objects"),
    Mutant("results are of validation's view", "report/frames.py", '"worst_decile": v["worst_decile"].get(own)', '"worst_decile": v["mean"].get(own)', "tests/test_python.py -k results"),
    Mutant("names in a notebook's table are markup", "federation/outcome.py", 'caption = html.escape(f"{self[', 'caption = str(f"{self[', "tests/test_python.py -k notebook"),
    # engine: blocks, resume, ownership
    Mutant("a client out of batches goes on training", "federation/engine.py", "work = where(alive[-1], new, work)", "work = new", f"{CONTRACT} -k block_equals"),
    Mutant("dropout depends on the block", "model/dropout.py", "return mix(seeds + signed(call * GOLDEN))", "return mix(torch.arange(len(seeds)) + signed(call * GOLDEN))", f"{CONTRACT} -k block_equals"),
    Mutant("padding rows count", "training/batching.py", 'out["weight"] = (torch.arange(b)[None] < rows[:, None]).float()', 'out["weight"] = torch.ones(len(rows), b)', f"{CONTRACT} -k block_equals"),
    Mutant("a dropped round's client state is taken up", "federation/store.py", "owned = (self._owned or {}) | self.pending", "owned = dict(self.pending)", "tests/test_damage.py -k 'leaves_of_the_newest'"),
    Mutant("the order of leaves follows the file", "tree.py", "for k in sorted(ps[0]):", "for k in ps[0]:", "tests/test_tree.py"),
    Mutant("kept leaves are uploaded too", "methods/sgd.py", "return select(p, self.shared), select(p, lambda k: not self.shared(k)) | moments", "return p, select(p, lambda k: not self.shared(k)) | moments", f"{CONTRACT} -k only_declared"),
    Mutant("a personal leaf of one client reaches the next", "federation/engine.py", "stored = [self._kept(c, info.round) for c in clients]", "stored = [self._kept(clients[0], info.round) for c in clients]", f"{CONTRACT} -k 'block_equals and fedsa'"),
    Mutant("the server returns the first upload", "tree.py", "                acc[k].add_(v, alpha=w)", "                pass", "tests/test_law_fedsa.py tests/test_tree.py"),
    Mutant("weights are not normalised", "tree.py", "return {k: v.div_(total) for k, v in acc.items()}", "return acc", "tests/test_tree.py"),
    Mutant("everybody is scored where a sample was asked for", "federation/views.py", "sample = f.evaluation.scored(f.training, f.seed) if f.training else []", "sample = list(range(f.training))", "tests/test_scored_clients.py -k sample"),
    Mutant("methods are scored on clients of their own", "federation/setting.py", 'np_rng(seed, "scored clients")', 'np_rng(seed, "scored clients", training, n % 3, id(self))', "tests/test_scored_clients.py -k sample"),
    Mutant("a client without training rows waits for ever", "federation/setting.py", 'np.flatnonzero(self.data.splits["train"].sizes[: self.training] == 0)', "np.zeros(0, int)", "tests/test_scored_clients.py -k without"),
    Mutant("clients of one side count in a difference", "report/statistics.py", "apart += len(one[seed].keys() ^ two[seed].keys())", "apart += 0", "tests/test_scored_clients.py -k left_out"),
    Mutant("bodies of many connections fill the memory", "flower/door.py", "            if self.held > self.most:", "            if mine > self.most:", "tests/test_door.py -k common"),
    Mutant("a body that was cut counts for ever", "flower/door.py", "            self.held -= mine", "            self.held -= 0", "tests/test_door.py -k common"),
    Mutant("cohorts follow the round's number alone", "federation/setting.py", 'draw = np_rng(seed, "cohort", 0 if self.cohort == "fixed" else round)', 'draw = np_rng("cohort", 0)', "tests/test_federation.py"),
    # rows grouped by length
    Mutant("a group is cut below its longest row", "training/batching.py", "return [fitted(_rows(batch, i, j), wide[i], tokenwise)", "return [fitted(_rows(batch, i, j), wide[j - 1], tokenwise)", "tests/test_tasks.py"),
    Mutant("no gradients where a caller serves", "training/loss.py", "with torch.enable_grad(), self.model.training(piece):", "with self.model.training(piece):", "tests/test_tasks.py"),
    Mutant("patterns are expressions unchecked", "adapters/base.py", "            _expression(pattern)\n", "            pass\n", "tests/test_law_compose.py -k refused"),
    Mutant("the optimizer's factors stay on the host", "training/optimizers.py", "factor = factor.to(like[0].device, like[0].dtype, non_blocking=True)", "factor = factor.to(like[0].dtype)", "tests/test_device.py"),
    Mutant("HetLoRA's rank cut stays on the host", "methods/hetlora.py", "self.head_of(r).to(v.device)[:, None])", "self.head_of(r).cpu()[:, None])", "tests/test_device.py"),
    Mutant("a method's own problems hide those of its family", "methods/hetlora.py", "bad = super().problems()", "bad: list[Problem] = []", "tests/test_law_compose.py -k at_once"),
    Mutant("groups are averaged, not summed", "training/loss.py", "value = value + part.detach()", "value = part.detach()", "tests/test_tasks.py"),
    Mutant("the answer without a model looks at the test rows", "data/federated.py", "right = test[both, train[both].argmax(1)]", "right = test[both, test[both].argmax(1)]", "tests/test_partition.py"),
    Mutant("second derivatives of the last group alone", "training/loss.py", "sums = found if sums is None else list(torch._foreach_add(sums, found))", "sums = found", "tests/test_tasks.py"),
    Mutant("the mixed product is with the wrong leaves", "training/loss.py", "g = grad(value.sum(), [leaves[k] for k in v], create_graph=True)", "g = grad(value.sum(), [leaves[k] for k in list(leaves)[: len(v)]], create_graph=True)", "tests/test_tasks.py"),
    Mutant("lengths from the host are of rows in another order", "training/batching.py", 'lengths = batch["tokens"] if', 'lengths = batch["tokens"].flip(1) if', "tests/test_padding.py -k host"),
    Mutant("labels stay behind when rows are sorted", "training/batching.py", "[:, None], there] if v.ndim > 1 else v", '[:, None], there] if v.ndim > 1 and n != "labels" else v', "tests/test_tasks.py"),
    # generation
    Mutant("a client's prompts are written on by its neighbour's model", "model/decoding.py", "prompts = [a.prompts[q] for a, questions in zip(asked, filled, strict=True) for q in questions]", "prompts = [a.prompts[q] for q in range(n) for a, questions in zip(asked, filled, strict=True) for q in [questions[q]]]", f"{GENERATION} -k block_writes"),
    Mutant("padding before a prompt is read", "model/decoding.py", "[0] * (width - len(p)) + [1] * len(p)", "[1] * width", f"{GENERATION} -k block_writes"),
    Mutant("a text goes on behind its end", "model/decoding.py", "if t in stop), len(line))", "if t < 0), len(line))", f"{GENERATION} -k 'block_writes or row_ends'"),
    Mutant("a draw depends on the padding", "model/decoding.py", "ids.shape[1] - self.start)", "ids.shape[1])", f"{GENERATION} -k same_in_every_block"),
    Mutant("draws of all rows are one", "model/decoding.py", "starts(self.seeds, ids", "starts(self.seeds * 0, ids", f"{GENERATION} -k softmax"),
    Mutant("a question is asked once for each reference", "federation/generation.py", "_, references = found.setdefault(prompt, (row, {}))", "_, references = found.setdefault((*prompt, *([-row] if row else [])), (row, {}))", f"{GENERATION} -k scores_what_its_clients"),
    Mutant("numbers after the mark are passed over", "training/texts.py", "found[0] if mark else found[-1]", "found[-1]", f"{GENERATION} -k gsm8k"),
    Mutant("only the first reference counts", "training/texts.py", "most = max(map(len, references))", "most = 1", f"{GENERATION} -k sacrebleus"),
    # a start
    Mutant("an adapter's scale is forgotten", "checkpoints/start.py", 'f["B"] * _scale(config, layer)', 'f["B"]', "tests/test_start.py -k first_global"),
    Mutant("a method's own scale is counted twice", "methods/sgd.py", "return found / scale(k.layer) if", "return found if", "tests/test_start.py -k first_global"),
    Mutant("clients of a finished run begin anew", "federation/run.py", "if own is not None or self.earlier is None:", "if True:", "tests/test_start.py -k goes_on_from_a_finished"),
    Mutant("a run goes on from the start of another", "federation/run.py", "return replace(first, params=own, notes=notes)", "return first", "tests/test_start.py -k goes_on_from_a_finished"),
    Mutant("all-linear takes the output over the vocabulary", "model/targets.py", "if modules[n] is not last]", "if last or True]", "tests/test_targets.py -k all_linear"),
    Mutant("a local copy is taken unchecked", "checkpoints/pretrained.py", "    _verified(weights, sha256, about.st_mtime_ns, about.st_size)\n", "", "tests/test_targets.py -k short_name"),
    Mutant("test rows decide when to stop", "federation/run.py", 'split == "validation" and round - best >= self.patience', "round - best >= 2 * (self.patience or 1)", "tests/test_trainers.py -k patience"),
    Mutant("weighted losses are divided by rows", "training/tasks/classification.py", "return super().row_counts(labels) if weights is None else weights.float()[labels]", "return super().row_counts(labels)", "tests/test_trainers.py -k weights"),
    Mutant("a smaller layer has another part of VeRA's pair", "adapters/vera.py", '("B", b[: s.out])', '("B", b[-s.out :])', "tests/test_trainers.py -k vera"),
    # compiled operators
    Mutant("a run's numbers are chosen anew where it is resumed", "recipe/core.py", '        plain["model"]["dtype"] = self.numbers.dtype\n', "", "tests/test_dtype.py"),
    Mutant("bf16 is taken on any processor", "recipe/device.py", "if able.get(name)", "if able is not None", "tests/test_dtype.py"),
    Mutant("slow numbers are not said", "recipe/device.py", 'if dtype == "bf16" and not fast', 'if dtype == "bf16" and fast', "tests/test_dtype.py"),
    Mutant("hidden keys get a gradient", "kernels/amx.c", "seen, x[j]);\n    x[j] = _mm512_mul_ps(", "0xffff, x[j]);\n    x[j] = _mm512_mul_ps(", "tests/test_kernels.py"),
    Mutant("of heads that share a key the first alone counts", "kernels/amx.c", "dV[i] += O[i];", "dV[i] += 0;", "tests/test_kernels.py"),
    Mutant("hidden keys are seen", "kernels/vector.c", "x[j] = !mask || mask[j] ? x[j] * scale : -INFINITY;", "x[j] = x[j] * scale;", "tests/test_kernels.py"),
    Mutant("of heads that share a key the last alone counts", "kernels/vector.c", "product(dV, S, 1, side, G, m, (int)D, n, h % z.per_key != 0);", "product(dV, S, 1, side, G, m, (int)D, n, 0);", "tests/test_kernels.py"),
    Mutant("packed rows are taken for the first, by vectors", "kernels/vector.c", "return p.row * s.row + p.start * s.token;", "return p.row * s.row;", "tests/test_kernels.py"),
    Mutant("what attention drops gets a gradient, by vectors", "kernels/vector.c", "    if (stays) e *= *(const V *)(stays + j);\n", "", "tests/test_kernels.py"),
    Mutant("a last row of a product is lost", "kernels/vector.c", "    for (; i < m; i++)\n", "    for (; i + 1 < m; i++)\n", "tests/test_kernels.py"),
    Mutant("bf16 is cut off, not rounded", "kernels/bf16.h", "(bf16)((u + 0x7fff + (u >> 16 & 1)) >> 16)", "(bf16)(u >> 16)", "tests/test_kernels.py"),
    Mutant("all clients' tokens meet the first one's deltas", "kernels/vector.c", "turned(A, a + (int64_t)c * z.rank * z.in, z.rank, z.in);", "turned(A, a, z.rank, z.in);", "tests/test_kernels.py -k meet_its_own"),
    Mutant("what flat deltas give to lower layers is lost", "kernels/vector.c", "        if (dx) add_product(", "        if (0) add_product(", "tests/test_kernels.py -k meet_its_own"),
    Mutant("a client begins where the one before it begins", "kernels/packing.py", "F.pad(used.cumsum(0), (1, 0))", "F.pad(used.cumsum(0), (1, 0)).roll(1)", "tests/test_kernels.py -k grouped"),
    Mutant("the last layer reads each row's second token", "kernels/packing.py", "index = torch.where(few.inside >= 0, self.outside[places], -1)", "index = torch.where(few.inside >= 0, self.outside[places] + 1, -1)", "tests/test_kernels.py -k grouped"),
    Mutant("clients are as wide as the widest", "model/adapted.py", "return all(form.low_rank for each in mine.values() for form, _ in each) and all(", "return not mine and all(", "tests/test_kernels.py -k twentieth"),
    Mutant("a word's own share has no gradient", "kernels/words.py", "                shares.scatter_add_(1, own, shares.new_full((1, 1), -1.0).expand(len(own), 1))\n", "", "tests/test_kernels.py -k words"),
    Mutant("losses of words go to the wrong rows", "model/adapted.py", "index_add(0, at // words.shape[1], each)", "index_add(0, at % len(words), each)", "tests/test_kernels.py -k vocabulary"),
    Mutant("packed tokens turn as if all were of one row", "kernels/hooks.py", "x[packing.row if len(x) > 1 else 0, packing.token]", "x[0, packing.token * 0 + 1]", "tests/test_kernels.py -k last_bits"),
    Mutant("a causal token sees what follows it", "kernels/vector.c", "seen(x, seeing ? seeing + i * s[4].token : 0, z.causal && i + 1 < m ? i + 1 : m, side, z.scale);\n          of[i]", "seen(x, seeing ? seeing + i * s[4].token : 0, m, side, z.scale);\n          of[i]", "tests/test_kernels.py -k themselves"),
    Mutant("the gradient of a frozen layer is of its transpose", "kernels/linear.py", "return product(g, weight.mT, None)", "return product(g, weight, None)", "tests/test_kernels.py -k frozen"),
    Mutant("a second derivative is lost", "kernels/activations.py", "        (x,) = ctx.saved_tensors\n        if torch.is_grad_enabled():", "        (x,) = ctx.saved_tensors\n        if False:", "tests/test_kernels.py"),
    Mutant("a trained layer is taken for a frozen one", "kernels/linear.py", "fits(input, weight, bias) and frozen and", "fits(input, weight, bias) and", "tests/test_kernels.py"),
    Mutant("packed rows are taken for the first", "kernels/amx.c", "return p.row * s.row + p.start * s.token;", "return p.row * s.row;", "tests/test_kernels.py"),
    Mutant("a delta is added by the layer and by its hook", "kernels/fused.py", "            self.now.delta = None\n            if delta.ends", "            if delta.ends", "tests/test_kernels.py"),
    Mutant("what a delta gives to lower layers is lost", "kernels/linear.py", "else dx.baddbmm_(dh, a)).view(x.shape)", "else dx).view(x.shape)", "tests/test_kernels.py"),
    Mutant("what attention drops gets a gradient", "kernels/amx.c", "d[j] = _mm512_mul_ps(_mm512_loadu_ps(dP + 16 * j), stays);", "d[j] = _mm512_loadu_ps(dP + 16 * j);", "tests/test_kernels.py"),
    Mutant("packed tokens drop what others drop", "kernels/dropout.py", "drop.starts[packing.row] + (packing.token + 1) * GOLDEN", "drop.starts[packing.row] + GOLDEN", "tests/test_kernels.py"),
    Mutant("compiled masks repeat along a line", "kernels/dropout.c", "firsts[line] + (uint64_t)(from / 4) * (step * GOLDEN)", "firsts[line]", "tests/test_kernels.py"),
    Mutant("a client's tokens are taken for a row's", "kernels/attention.py", "sizes = packing.longest <= MOST", "sizes = query.shape[2] <= MOST", "tests/test_kernels.py"),
    Mutant("rows of a packed group are lost", "training/batching.py", "rows = {n: v[:, i::parts] if", "rows = {n: v[:, i : i + parts] if", "tests/test_kernels.py"),
    # pages
    Mutant("each page of a sweep carries the plotting library", "cli/actions.py", "_execute(r, folder, quiet, json, sweep)", "_execute(r, folder, quiet, json)", "tests/test_cli.py -k ends_in_a_comparison"),
    Mutant("a page names the library from another folder", "report/__init__.py", "os.path.relpath(library, out.parent)", "os.path.relpath(library, beside)", "tests/test_report.py -k beside"),
    # model and optimizers
    Mutant("a changed table stays in the base after a run", "federation/run.py", "end.callback(self.model.bind, {})", "end.callback(dict)", "tests/test_full.py -k one_client_at_a_time"),
    Mutant("running statistics of a user's layer move", "model/modes.py", " and not isinstance(m, _NormBase)]", "]", "tests/test_modes.py -k tree"),
    Mutant("a layer of the user's own changes the base", "model/modes.py", "self._switched = [m for m in self._switched if id(m) not in owners]", "return", "tests/test_modes.py"),
    Mutant("a base that changes in evaluation is taken", "model/modes.py", "while changed := self._changed(step):", "if changed := self._changed(step):", "tests/test_modes.py"),
    Mutant("what drops stays in evaluation mode", "model/modes.py", 'object.__setattr__(m, "training", on)', "pass", "tests/test_modes.py -k tree"),
    Mutant("the adapter forgets its scale", "adapters/factors.py", "self.alpha / r**0.5 if self.rs else self.alpha / r", "self.alpha / r", "tests/test_model.py -k peft"),
    Mutant("decay is coupled", "training/optimizers.py", "shrink = 1 - rate * self.weight_decay", "shrink = 1 - rate * self.weight_decay * 0.5", "tests/test_model.py -k optimizers"),
    Mutant("bias correction is gone", "training/optimizers.py", "size, root = rate / (1 - b1**t), (1 - b2**t).sqrt()", "size, root = rate / (1 - b1**t), (1 - b2**t) ** 0", "tests/test_model.py"),
    Mutant("rows are padded beyond the table of positions", "training/batching.py", "return wide if wide <= model.longest else length", "return wide", "tests/test_tasks.py -k half"),
    # the channel and its guards
    Mutant("a reply to the strategy is checked against itself", "flower/strategy.py", "declared(down, self._client(node)))", "wire.expect(params_of(arrays)))", "tests/test_flower.py -k strategy_refuses"),
    Mutant("the rest of a compressed message is forgotten", "federation/guards/feedback.py", "return up | {k: v + _like(k, state[k], v) for", "return up | {k: v for", "tests/test_guards.py -k loses_nothing"),
    Mutant("rounding is not part of the rest", "federation/channel.py", "arrived = self.opened(message, down)", "arrived = self.opened(wire.pack(self.encoded(p, down, info, client)), down) if self.precision == 'fp32' else p", "tests/test_guards.py -k loses_nothing"),
    Mutant("int4 rounds down", "federation/guards/feedback.py", "exact.round() if draw is None", "exact.floor() if draw is None", "tests/test_guards.py -k nearest"),
    Mutant("random entries are the same in every round", "federation/guards/feedback.py", "self.seed, info.round, client.id", "self.seed, client.id", "tests/test_guards.py -k another_draw"),
    Mutant("stochastic rounding goes down", "federation/guards/feedback.py", "(exact + torch.rand(exact.shape, generator=draw)).floor()", "(exact + 0 * torch.rand(exact.shape, generator=draw)).floor()", "tests/test_guards.py -k in_the_mean"),
    Mutant("a compressed leaf writes where it likes", "federation/guards/feedback.py", "int(at[-1]) < like.numel()", "int(at[-1]) < 2**31", "tests/test_guards.py -k is_none"),
    Mutant("a client may skip the compression", "federation/guards/feedback.py", "if whole := sorted(map(str, values(out, down))):", "if whole := []:", "tests/test_guards.py -k as_large_as"),
    Mutant("clipping forgets what was received", "federation/guards/clip.py", "d = change(up, down)", "d = change(up, {k: v * 0 for k, v in down.items()})", "tests/test_guards.py -k clip"),
    Mutant("one side alone is trimmed", "federation/guards/trimmed.py", "[b : len(seen) - b]", "[b:]", "tests/test_guards.py -k trimmed"),
    Mutant("the trimmed share is rounded in floating point", "federation/guards/trimmed.py", "int(Fraction(str(self.share)) * len(seen))", "round(self.share * len(seen))", "tests/test_guards.py -k trimmed"),
    Mutant("guards of the server forget", "federation/run.py", "self.store.save_server(server.round, server.leaves,", "self.store.save_server(server.round, server.params,", "tests/test_guards.py -k servers_guards"),
    Mutant("check announces a message without its precision", "federation/facts.py", 'sent["up"] += channel.up(', 'sent["up"] += type(channel)().up(', "tests/test_guards.py -k announces"),
    Mutant("a message of another precision is taken", "federation/channel.py", "p = wire.unpack(message, self.precision)", "p = wire.unpack(message)", "tests/test_guards.py -k is_none"),
    Mutant("check knows the first stage alone", "federation/facts.py", "            out.append((t, new))\n", "            pass\n", "tests/test_guards.py -k all_rounds"),
    Mutant("the server's second moment is of the first one", "federation/guards/fedopt.py", "self.second(before[\"v\"], d.square())", "self.second(before[\"v\"], m.square())", "tests/test_law_fedopt.py"),
    Mutant("Yogi goes the other way", "federation/guards/fedopt.py", "square * (v - square).sign()", "square * (square - v).sign()", "tests/test_law_fedopt.py"),
    Mutant("v starts at nothing", "federation/guards/fedopt.py", "torch.full_like(d, self.tau**2)", "torch.zeros_like(d)", "tests/test_law_fedopt.py"),
    Mutant("momentum moves a frozen half", "federation/guards/fedopt.py", "if not torch.equal(mean, x):", "if True:", "tests/test_law_fedopt.py"),
    # exact aggregation
    Mutant("a frozen half trains", "methods/halves.py", "not self.live(k, info.round))", "False)", "tests/test_law_halves.py"),
    Mutant("RoLoRA starts with the half that cannot move", "methods/rolora.py", '(self.first == "B")', '(self.first == "A")', "tests/test_law_halves.py"),
    Mutant("FedSVD refactors A alone", "methods/fedsvd.py", "params[kb], params[k] = refactored(params[kb], a)", "_, params[k] = refactored(params[kb], a)", "tests/test_law_halves.py"),
    Mutant("FedSVD forgets that A was not orthonormal", "methods/fedsvd.py", "factor(b @ upper.mT,", "factor(b,", "tests/test_law_halves.py"),
    Mutant("a residual is transposed", "methods/fedex.py", "params = grown(params, k.layer, b * self.form.scale_at(k.layer), a)", "params = grown(params, k.layer, a.mT * self.form.scale_at(k.layer), b.mT)", "tests/test_law_onbase.py"),
    Mutant("the residual is half in scale", "methods/fedex.py", "b * self.form.scale_at(k.layer), a)", "b, a)", "tests/test_law_onbase.py"),
    Mutant("an average is of one client", "methods/fedex.py", "new = mean(zip([u.params for u in seen], weights, strict=True))", "new = dict(seen[0].params)", "tests/test_law_onbase.py"),
    Mutant("a stack forgets the weights of clients", "methods/ranks.py", "append(v * p**0.5)", "append(v)", "tests/test_law_onbase.py"),
    Mutant("FLoRA's clients draw one A", "methods/flora.py", "mix(numbers + signed(number(*path)))", "mix(0 * numbers + signed(number(*path)))", "tests/test_law_onbase.py"),
    Mutant("what the base had is forgotten", "methods/onbase.py", "return p | {whole: p[whole] + b @ a}", "return p | {whole: b @ a}", "tests/test_law_onbase.py"),
    Mutant("FRLoRA steps along A alone", "methods/frlora.py", "b, a = torch.cat([s * b0, b], 1), torch.cat([da, a])", "b, a = torch.cat([0 * b0, b], 1), torch.cat([da, a])", "tests/test_law_onbase.py"),
    Mutant("check knows the first message of a growing server alone", "federation/facts.py", "growing = [(0, server)], f.method.grows", "growing = [(0, server)], False", "tests/test_guards.py -k all_rounds"),
    Mutant("clients of another rank are checked against the first", "federation/channel.py", 'int(v) if k.part == "rank" else 0', "0", "tests/test_guards.py -k 'deployment_equals and flora-mixed-krum'"),
    Mutant("LoRA-FAIR's correction is of the wrong sign", "methods/lorafair.py", "m - b @ g, left=False)", "b @ g - m, left=False)", "tests/test_law_factors.py"),
    Mutant("LoRA-FAIR weighs clients alike", "methods/lorafair.py", "* (p / p.sum())[:, None, None]", "/ len(p)", "tests/test_law_factors.py"),
    Mutant("a reflection passes for a rotation", "methods/fedrot.py", "torch.linalg.det(u @ vh).sign()", "1.0", "tests/test_law_factors.py"),
    Mutant("one factor is turned alone", "methods/fedrot.py", "(q.mT @ a).to(up[ka].dtype), (b @ q)", "(q.mT @ a).to(up[ka].dtype), b", "tests/test_law_factors.py"),
    Mutant("the reference does not alternate", "methods/fedrot.py", 'return "A" if round % 2 else "B"', 'return "A"', "tests/test_law_factors.py"),
    Mutant("a spectrum is one component short", "methods/florist.py", "int(short.sum()) + 1", "max(int(short.sum()), 1)", "tests/test_law_factors.py"),
    Mutant("a new component of a weak client is trained beyond its rank", "methods/florist.py", " & (rows < ranks.to(v.device)[:, None])", "", "tests/test_law_factors.py"),
    Mutant("Fed-SB's factors are not orthonormal", "adapters/lora_xs.py", "b, a = b / b.norm(dim=0), a / a.norm(dim=1, keepdim=True)", "pass", "tests/test_law_factors.py"),
    Mutant("a weak client counts as zero beyond its rank", "methods/flexlora.py", "b = b / held[found.component].to(b)", "pass", "tests/test_law_ranks.py"),
    Mutant("a component that nobody holds is forgotten", "methods/flexlora.py", "else (held == 0))", "else (held < 0))", "tests/test_law_ranks.py"),
    Mutant("differences leave out what the server had", "methods/flexlora.py", "((1 - held) if", "((0 * held) if", "tests/test_law_ranks.py"),
    Mutant("RBLA's weights are of all clients", "methods/ranks.py", "[:, :r] += torch", "[:, :] += torch", "tests/test_law_ranks.py"),
    Mutant("the spectrum is of singular values", "methods/ranks.py", "energy[: len(s)] += s.square()", "energy[: len(s)] += s", "tests/test_law_ranks.py"),
    Mutant("Ditto's pull has no gradient", "methods/ditto.py", "own[k] = own[k] + self.lam * (v[k] - received)", "own[k] = own[k] + 0 * (v[k] - received)", "tests/test_law_drift.py"),
    Mutant("Ditto serves the shared model", "methods/ditto.py", "super().ready(own or p, fixed)", "super().ready({k: v for k, v in p.items() if not k.adapter.startswith(OWN)} or own, fixed)", "tests/test_law_drift.py"),
    Mutant("SCAFFOLD's correction has the other sign", "methods/scaffold.py", 'g[k] - work["own"][_of(OWN, k)] + work["c"]', 'g[k] + work["own"][_of(OWN, k)] - work["c"]', "tests/test_law_drift.py"),
    Mutant("SCAFFOLD's control counts one step", "methods/scaffold.py", "rate = {RATE: work[\"rate\"][RATE] + lr", "rate = {RATE: 0 * work[\"rate\"][RATE] + lr", "tests/test_law_drift.py"),
    Mutant("a cohort's controls stand for everybody's", "methods/scaffold.py", "(server.params[k] * sum(before.values()) + new[k] * cohort) / everybody", "server.params[k] + new[k]", "tests/test_law_drift.py"),
    Mutant("the rest of the world holds oneself", "methods/fedalt.py", " if n != own]", "]", "tests/test_law_fedalt.py"),
    Mutant("a round's uploads are all that the server remembers", "methods/fedalt.py", "server.params | new | last", "select(server.params, lambda k: k.adapter == 'head') | new | last", "tests/test_law_fedalt.py"),
    Mutant("the router is one for all tokens", "adapters/routed.py", "weight = torch.softmax(torch.bmm(each, p[\"gate\"].mT), -1)", "weight = torch.softmax(torch.bmm(each, p[\"gate\"].mT), -1).mean(1, keepdim=True)", "tests/test_law_fedalt.py"),
    Mutant("FedRep's body trains beside the head", "methods/fedrep.py", "(k.adapter == \"head\") == (done < self.head_steps)", "done >= self.head_steps or k.adapter == \"head\"", "tests/test_law_drift.py"),
    Mutant("the second phase goes on with the first one's count", "methods/fedrep.py", "if done in (0, self.head_steps):", "if done == 0:", "tests/test_law_drift.py"),
    # summary and report
    Mutant("a hand-over's scores are a round's", "federation/summary.py", "if isinstance(x, EvalLine) and x.stage is None]", "if isinstance(x, EvalLine)]", "tests/test_federation.py -k hand_over"),
    Mutant("the untrained model is one of the last rounds", "federation/summary.py", "metric in x.mean and x.round]", "metric in x.mean]", "tests/test_federation.py -k hand_over"),
    Mutant("the mean is of the first ten", "federation/summary.py", "for x in tested[-10:]]", "for x in tested[:10]]", "tests/test_federation.py -k last_ten"),
    # edges: heads, global models, stages, refusals, who takes part
    Mutant("a pooled method keeps its head from those it serves", "methods/sgd.py", '(self.head == "shared" or self.pooled)', 'self.head == "shared"', "tests/test_law_edges.py -k 'served and centralized'"),
    Mutant("the global model is the first client's", "serving/export.py", "whole(fed, engine, of.server) if c is None else", "served(fed, engine, of.server, [0], 'global')[0] if c is None else", "tests/test_law_edges.py -k not_cut"),
    Mutant("the whole of a server is cut", "methods/ranks.py", "return server.params | {Key(self.label, at, \"rank\"): torch.tensor(self.rank) for at", 'return self.broadcast(context, server, Client(\'c0\', 1)) | {Key(self.label, at, "rank"): torch.tensor(self.rank) for at', "tests/test_law_edges.py -k not_cut"),
    Mutant("a global model is mixed with nothing", "methods/feddpa.py", 'return select(self.keep(context, client), lambda k: k.adapter.split("~")[0] != LOCAL)', "return self.keep(context, client)", "tests/test_law_edges.py -k unseen_model"),
    Mutant("a stage goes on counting the steps before it", "methods/slora.py", 'if self.now(down).label != "sparse" and any(', "if False and any(", "tests/test_law_edges.py -k own_steps"),
    Mutant("every stage takes the last one's draws", "methods/slora.py", "return self.now(down).draws", "return self.draws", "tests/test_law_edges.py -k takes_the_rows"),
    Mutant("a new rank is rounded", "methods/hetlora.py", "return (self.gamma * r.double() + 1e-9).floor()", "return (self.gamma * r.double()).round()", "tests/test_law_edges.py -k floor"),
    Mutant("a new rank falls by floating point", "methods/hetlora.py", "r.double() + 1e-9).floor()", "r.double()).floor()", "tests/test_law_edges.py -k floor"),
    Mutant("kept leaves may be anything", "federation/engine.py", "                wire.finite(r.kept)", "                pass", "tests/test_law_edges.py -k no_numbers"),
    Mutant("clipping spares the lower step", "methods/pf2lora.py", "        g_y = clip(g_y, self.clip)\n", "", "tests/test_law_edges.py -k lower_step"),
    Mutant("a share of one is one client", "units.py", "0 < c <= 1 else int(c)", "0 < c < 1 else int(c)", "tests/test_law_edges.py -k share_too"),
    Mutant("the last clients are the unseen ones", "data/federated.py", "rows, ids = _unseen_last(rows, ids, unseen, seed)", "pass", "tests/test_law_edges.py -k classes_of_their_own"),
    Mutant("all models are in memory at once", "federation/views.py", "else engine.block\n    out:", "else len(asked)\n    out:", "tests/test_law_edges.py -k holds_a_block"),
    # HetLoRA
    Mutant("the loss before the hand-over is only there by chance", "federation/run.py", 'if self._due(server.round) else {"before": server, "handover": new}', 'if True else {}', "tests/test_law_slora.py"),
    Mutant("stage 1 forgets the densities of layers", "methods/slora.py", "density_pattern=self.density_pattern, ", "", "tests/test_law_slora.py"),
    Mutant("the clients of a run are repetitions", "report/statistics.py", "gaps.append(float(np.mean([one[seed][c] - two[seed][c] for c in clients])))", "gaps += [one[seed][c] - two[seed][c] for c in clients]", "tests/test_law_statistics.py"),
    Mutant("p is of one pair, however many are shown", "report/statistics.py", "min(1.0, (len(p) - i) * p[at])", "p[at]", "tests/test_law_statistics.py"),
    Mutant("a bootstrap keeps the seeds", "report/statistics.py", "picked = draw.integers(len(runs), size=(len(runs), DRAWS))", "picked = np.arange(len(runs))[:, None].repeat(DRAWS, 1)", "tests/test_law_statistics.py"),
    Mutant("a normal interval of few seeds", "report/statistics.py", "stats.t.ppf((1 + LEVEL) / 2, n - 1)", "stats.norm.ppf((1 + LEVEL) / 2)", "tests/test_law_statistics.py"),
    Mutant("a global score stands under personal", "report/tables.py", "return views.pop() if len(views) == 1 else", "return 'personal' if True else", "tests/test_report.py"),
    Mutant("the worst tenth is of personal models or not at all", "report/tables.py", '_view(s, view, "worst_decile")', '_view(s, "personal", "worst_decile")', "tests/test_report.py"),
    Mutant("aggregation weights by examples", "methods/hetlora.py", "return lambda k: sizes.get(whole._replace(layer=k.layer), sizes[whole])", "return lambda k: float(u.client.examples)", "tests/test_law_hetlora.py"),
    Mutant("norms per site weigh by the whole model", "methods/hetlora.py", "return lambda k: sizes.get(whole._replace(layer=k.layer), sizes[whole])", "return lambda k: sizes[whole]", "tests/test_law_hetlora.py"),
    Mutant("tails per site are of the whole model", "methods/hetlora.py", 'whole = self.norms == "model" and self.decide == "client"', 'whole = self.decide == "client"', "tests/test_law_hetlora.py"),
    Mutant("one site without products voids all weights", "methods/ranks.py", "v / total[k] if total[k] > 0 else plain[k] / n", "v / total[k] if min(total.values()) > 0 else plain[k] / n", "tests/test_law_hetlora.py"),
    Mutant("clients prune in every round", "methods/hetlora.py", "out[k] = torch.where(shrunk.to(r.device), torch.minimum(g, r), r)", "out[k] = torch.minimum(g, r)", "tests/test_law_hetlora.py"),
    Mutant("a memory budget forgets gradient and moments", "methods/ranks.py", "copies = 2 + self.optimizer.moments if memory else 1", "copies = 1", "tests/test_law_hetlora.py"),
    Mutant("a byte budget counts leaves that stay", "methods/ranks.py", "if memory or self.shared(", "if True or self.shared(", "tests/test_law_hetlora.py"),
    Mutant("the Gram norm is of the factors", "evaluation/analyses.py", "return ((b.mT @ b) * (a @ a.mT).mT).sum((-2, -1)).clamp_min(0).sqrt()", "return ((b.mT @ b).diagonal().sum() * (a @ a.mT).diagonal().sum()).sqrt()", "tests/test_law_hetlora.py"),
    # PF2LoRA
    Mutant("the hypergradient is first-order", "methods/pf2lora.py", 'if self.hypergradient != "first_order":', 'if False:', "tests/test_law_pf2lora.py"),
    Mutant("the upper gradient is taken at the old y", "methods/pf2lora.py", "value, h = loss.gradient(lambda q: f(q | y_new), x, xi)", "value, h = loss.gradient(lambda q: f(q | y), x, xi)", "tests/test_law_pf2lora.py"),
    Mutant("four draws are one", "methods/pf2lora.py", "pi, xi, xi_, zeta = draws if len(draws) == 4 else draws * 4", "pi, xi, xi_, zeta = (draws[0],) * 4", "tests/test_law_pf2lora.py"),
    Mutant("the mixed derivative has the wrong sign", "methods/pf2lora.py", "h = {k: g - per_client(a, g).to(g) * jv[k] for k, g in h.items()}", "h = {k: g + per_client(a, g).to(g) * jv[k] for k, g in h.items()}", "tests/test_law_pf2lora.py"),
    Mutant("PF2LoRA on ranks forgets the pruning's penalty", "methods/pf2lora.py", "self.descend(work, self.penalised(work, h), lr)", "self.descend(work, h, lr)", "tests/test_law_compose.py"),
    Mutant("a rank pattern keeps the scale of the common rank", "adapters/factors.py", "r = self.rank_at(layer)\n        return", "r = self.rank\n        return", "tests/test_law_compose.py"),
    # FedSA and its kin
    Mutant("FedSA shares B", "methods/average.py", "return k.part in self.form.first", "return k.part in self.form.second", f"tests/test_law_fedsa.py {CONTRACT} -k 'fedsa'"),
    Mutant("FFA trains A", "methods/average.py", "return k.part in self.form.second\n\n    def shares(self, k: Key) -> bool:\n        return True", "return True\n\n    def shares(self, k: Key) -> bool:\n        return True", f"{CONTRACT} -k ffa"),
    # baselines
    Mutant("FlexLoRA averages factors", "methods/ranks.py", "Stacked(torch.cat(b, 1) / total, torch.cat(rows[layer], 0),", "Stacked(sum(b) / total, sum(rows[layer]),", "tests/test_law_baselines.py -k flexlora"),
    Mutant("FlexLoRA weighs a product twice", "methods/ranks.py", "append(v * p**0.5)", "append(v * p)", "tests/test_law_baselines.py -k flexlora"),
    Mutant("Per-FedAvg takes the Hessian at the moved point", "methods/perfedavg.py", "loss.hessian_vector(f, x, g, draws[2])", "loss.hessian_vector(f, moved, g, draws[2])", "tests/test_law_baselines.py -k per_fedavg"),
    Mutant("Per-FedAvg's gradient is at the start", "methods/perfedavg.py", "value, g = loss.gradient(f, moved, draws[1])", "value, g = loss.gradient(f, x, draws[1])", "tests/test_law_baselines.py -k per_fedavg"),
    Mutant("FedDPA's local adapter trains on the global one", "methods/feddpa.py", "loss.gradient(lambda q: f(q | head), mine, draws[0])", "loss.gradient(lambda q: f(q | common), mine, draws[0])", "tests/test_law_baselines.py -k feddpa"),
    Mutant("FedDPA mixes both factors", "methods/feddpa.py", 'p = {k: v * share[k.adapter] if k.part == "B" else v for k, v in p.items()}', "p = {k: v * share.get(k.adapter, 1) for k, v in p.items()}", "tests/test_law_baselines.py -k feddpa"),
    Mutant("FedProx pulls to the start of the run", "methods/fedprox.py", "norm(p[k] - v) ** 2", "norm(p[k]) ** 2", "tests/test_law_baselines.py -k fedprox"),
    Mutant("fine-tuning follows the decayed schedule", "federation/views.py", "down_each, kept, work, Schedule(), serve=True)", "down_each, kept, work, f.schedule, serve=True)", "tests/test_law_baselines.py -k tuning"),
    # SLoRA and its baselines
    Mutant("every party draws its own mask", "adapters/sparse.py", 'torch.randperm(size, generator=rng("mask", *path))[:n]', "torch.randperm(size)[:n]", "tests/test_law_slora.py"),
    Mutant("all layers have one mask", "adapters/sparse.py", "s.out * s.in_, *seed, s.name)", "s.out * s.in_, *seed)", "tests/test_law_slora.py -k sides"),
    Mutant("the hand-over forgets the scale", "methods/slora.py", "factor(dw / scale, form.rank_at(s.name), self.split)", "factor(dw, form.rank_at(s.name), self.split)", "tests/test_law_slora.py -k 'reset or keep'"),
    Mutant("the frozen product is added, not taken away", "methods/slora.py", "a.clone(), -scale * b", "a.clone(), scale * b", "tests/test_law_slora.py -k keep"),
    Mutant("a plateau is a rise", "methods/slora.py", "return min(losses[-self.patience :]) > best * (1 - self.tolerance)", "return min(losses[-self.patience :]) > best", "tests/test_law_slora.py -k plateau"),
    Mutant("Houlsby is Pfeiffer", "adapters/bottleneck.py", 'cls(rank, ("outputs",) if name == "houlsby" else ("ffn_output",))', 'cls(rank, ("ffn_output",))', "tests/test_law_slora.py -k bottlenecks"),
    # export
    Mutant("Conv1D is merged like Linear", "checkpoints/merge.py", 'change.weight.mT if type(module).__name__ == "Conv1D" else change.weight', "change.weight", "tests/test_export.py -k conv1d"),
    Mutant("a tied output moves with its table", "checkpoints/merge.py", "        for m in homes:\n            m.weight = weight\n", "        module.weight.data.copy_(weight)\n", "tests/test_export.py -k conv1d"),
    Mutant("DoRA's norm is differentiated", "adapters/dora.py", "    with torch.no_grad():\n        w = weight.to(b.dtype)", "    with torch.enable_grad():\n        w = weight.to(b.dtype)", "tests/test_model.py -k 'equals_peft and dora'"),
    Mutant("DoRA scales the bias too", "adapters/dora.py", "plain = out if base is None else out - base", "plain = out", "tests/test_model.py -k dora_is"),
    Mutant("FedSA shares DoRA's magnitude", "adapters/dora.py", 'frozenset({"B", "m"})', 'frozenset({"B"})', f"{CONTRACT} -k ffa-dora"),
    # delta forms
    Mutant("(IA)^3 scales the other side", "adapters/ia3.py", 'if s.group == "ffn_output"', 'if s.group != "ffn_output"', "tests/test_forms.py -k 'ia3_is_pefts and sgd-bert'"),
    Mutant("(IA)^3 is merged without its bias", "adapters/ia3.py", "None if bias is None else scale * bias", "None", "tests/test_forms.py -k 'ia3_is_pefts and adamw-gpt2'"),
    Mutant("(IA)^3 is merged on the other side", "adapters/ia3.py", 'Change(w * p["l_in"].to(w))', 'Change((w.mT * p["l_in"][: len(w)].mean().to(w)).mT)', "tests/test_forms.py -k 'ia3_is_pefts and adamw-bert'"),
    Mutant("(IA)^3's vectors leave as changes from one", "adapters/ia3.py", '1 + (p["l_in"]', '(p["l_in"]', "tests/test_export.py -k 'peft and ia3'"),
    Mutant("PiSSA trains without its start", "adapters/pissa.py", 'of("A0") + v, v]', "v, v]", "tests/test_forms.py -k 'pissa_is_pefts and sgd-bert'"),
    Mutant("PiSSA's start forgets the scale", "adapters/pissa.py", "half = self.scale_at(s.name) ** -0.5", "half = 1.0", "tests/test_forms.py -k pissa_starts"),
    Mutant("layers of other ranks leave without their scales", "adapters/lora.py", '"alpha_pattern": odd', '"alpha_pattern": {}', "tests/test_forms.py -k leave"),
    Mutant("an export follows the order of hashes", "checkpoints/peft.py", "said[field] = sorted(n for n in set(said[field])", "said[field] = list(n for n in set(said[field])", "tests/test_card.py -k equal_bytes"),
    Mutant("a parameter of several names is several", "model/tables.py", "isinstance(m, nn.Embedding) and m.weight is module.weight]", "m is module]", "tests/test_full.py -k 'torchs and t5'"),
    Mutant("a table that shifts its rows gets a plain one's delta", "model/tables.py", "type(module).forward is not nn.Embedding.forward or ", "", "tests/test_full.py -k 'torchs and bart'"),
    Mutant("a table read by its weight is left as it is", "model/adapted.py", "        self._tables.replace(read)\n", "", "tests/test_full.py -k 'torchs and deberta-v2'"),
    # memory
    Mutant("halves of a block are trained twice", "federation/engine.py", "self._trained(info, down[s], kept[s], work[s])]", "self._trained(info, down[:s.stop], kept[:s.stop], work[:s.stop])]", "tests/test_memory.py"),
    Mutant("a lowered block is forgotten", "federation/run.py", 'facts | {"block": block}', "facts", "tests/test_memory.py"),
    Mutant("after the run memory stays with the process", "federation/memory.py", "        libc.malloc_trim(0)\n", "", "tests/test_memory.py"),
    Mutant("a run reports the peak of an earlier one", "federation/run.py", "        forget_peak()\n", "", "tests/test_memory.py"),
    Mutant("whole models are trained in blocks", "federation/memory.py", 'if 2 * numbers["trainable"] > numbers["base"]:', "if False:", "tests/test_memory.py"),
    Mutant("a block fills all of the free memory", "federation/memory.py", "SHARE = 0.5", "SHARE = 1.0", "tests/test_memory.py"),
    Mutant("freed memory is given back at once", "federation/memory.py", "    libc.mallopt(MMAP_MAX, 0)\n    libc.mallopt(TRIM_THRESHOLD, -1)\n", "", "tests/test_memory.py"),
    # sites
    Mutant("uploads are summed as they arrive", "deploy/remote.py", "[arrived[c.id] for c in chosen],", "list(arrived.values()),", f"{DEPLOY} -k 'equals_simulation and homlora'"),
    Mutant("losses are averaged as they arrive", "deploy/remote.py", "{u.client.id: log.losses[u.client.id] for u in used}", "dict(log.losses)", f"{DEPLOY} -k equals_simulation"),
    Mutant("any upload may have a lower rank", "federation/channel.py", 'prunes = any(k.part == "rank" for k in spec)', "prunes = True", f"{DEPLOY} -k bad_upload"),
    Mutant("stated ranks are believed", "federation/wire.py", "        if r != want:", "        if False:", f"{DEPLOY} -k prunes"),
    Mutant("a refused client goes on from what was refused", "deploy/remote.py", 'accepted = server.notes.get("accepted", {}) | dict.fromkeys(arrived, info.round)', 'accepted = server.notes.get("accepted", {}) | dict.fromkeys(clients, info.round)', f"{DEPLOY} -k bad_upload"),
    Mutant("a site takes its newest leaves, accepted or not", "deploy/site.py", "return fed.store.load_round(id, round)", "return fed.store.load_client(id, 10**6)", f"{DEPLOY} -k 'killed or lost or bad_upload'"),
    Mutant("a site forgets what it may need again", "federation/personal.py", "if n < last][:-1]", "if n < last]", "tests/test_store.py -k go_back"),
    Mutant("a reply of an earlier round counts", "deploy/packets.py", "kind=kind, run=run, round=round, protocol=PROTOCOL)", "kind=kind, run=run, protocol=PROTOCOL)", f"{DEPLOY} -k 'sent_again or bad_upload'"),
    Mutant("histograms are sent unasked", "deploy/site.py", "if asked and self.histograms and", "if self.histograms and", f"{DEPLOY} -k histograms"),
    Mutant("histograms are sent without consent", "deploy/site.py", "if asked and self.histograms and", "if asked and", f"{DEPLOY} -k histograms"),
    Mutant("a site may speak for another", "deploy/attendance.py", 'if name is not None and id != name and not id.startswith(f"{name}/"):', "if False:", f"{DEPLOY} -k speaks"),
    Mutant("the norm is not bounded", "federation/channel.py", "wire.validate(p, spec, self.norm_bound,", "wire.validate(p, spec, None,", f"{DEPLOY} -k bad_upload"),
    Mutant("all that answered in time counts, however many were asked", "deploy/remote.py", "if len(arrived) >= self.needed and self.terms.over_selection > 1:", "if False:", f"{DEPLOY} -k over_selection"),
    Mutant("int8 has one scale for a whole leaf", "federation/wire.py", "scale = v.abs().amax(-1, keepdim=True) / 127", "scale = v.abs().amax().expand(*v.shape[:-1], 1) / 127", "tests/test_wire.py"),
    # a site's policy
    Mutant("an error is told in its own words", "deploy/refusal.py", '"text": REASONS[code]}', '"text": str(e)}', f"{POLICY} -k 'fit_are_told or whatever_fails'"),
    Mutant("a field is told whatever it is called", "deploy/refusal.py", "field if field in known_fields() else None", "field", f"{POLICY} -k own_names"),
    Mutant("full updates leave by another method's name", "deploy/limits.py", 'yield from _one_of("method.adapter", form, allow.adapters)', "pass", f"{POLICY} -k within_the_policy"),
    Mutant("an upload may rest on any number of rows", "deploy/limits.py", "max(least.steps, math.ceil(least.rows / t.batch_size))", "least.steps", f"{POLICY} -k within_the_policy"),
    Mutant("scores leave unasked", "deploy/gate.py", "if not send.scores:", "if False:", f"{POLICY} -k adapter_leaves"),
    Mutant("losses leave unasked", "deploy/gate.py", 'if send.scores and "loss" in facts["metrics"]', 'if "loss" in facts["metrics"]', f"{POLICY} -k adapter_leaves"),
    Mutant("nobody is asked", "deploy/gate.py", "if name not in self.accept:", "if False:", f"{POLICY} -k 'consent or asked_for_once'"),
    Mutant("a site that is started again counts from nothing", "deploy/audit.py", 'for x in self.lines() if x.get("event") == "asked"', 'for x in self.lines() if x.get("event") == "never"', f"{POLICY} -k counted"),
    Mutant("rows are read before the policy", "deploy/site.py", "            self.gate.admit(packet)\n", "            self.federation(order.run, order.recipe)\n            self.gate.admit(packet)\n", f"{POLICY} -k before"),
    Mutant("a template formats its values", "data/template.py", "if form or conversion:", "if False:", f"{POLICY} -k plain_names"),
    Mutant("a model may ask to run its own code", "checkpoints/pretrained.py", "trust_remote_code=False,\n                local_files_only", "local_files_only", f"{POLICY} -k remote_code"),
    Mutant("deltas of another base are summed", "deploy/attendance.py", "if self.base is not None and said.base != self.base():", "if False:", f"{POLICY} -k servers_base"),
    Mutant("the server names the columns", "deploy/policy.py", "out |= {k: getattr(d, k) for k in used}", "out |= {k: given[k] for k in used}", f"{POLICY} -k which_columns"),
    Mutant("escape sequences reach a terminal", "errors.py", "c if c.isprintable() else", "c if c else", f"{POLICY} -k 'own_names or escape'"),
    Mutant("an upload is not looked at before it leaves", "deploy/gate.py", "if not (head if k.adapter == HEAD", "if not (True if k.adapter", f"{POLICY} -k other_leaves"),
    Mutant("an order has no end", "deploy/gate.py", "if time.monotonic() > self._end:", "if False:", f"{POLICY} -k its_time"),
    # what the other side may say
    Mutant("true is one, and 7.0 is seven", "deploy/schema.py", "strict=True, frozen=True", "strict=False, frozen=True", f"{PACKETS} -k 'trained_reply and yes'"),
    Mutant("a site whose policy tells no loss is refused", "deploy/schema.py", "loss: Finite = math.nan", "loss: Finite", f"{PACKETS} -k 'withheld'"),
    Mutant("a client has as many rows as it likes", "deploy/schema.py", "Count = Annotated[int, Field(ge=0, le=MOST_ROWS)]", "Count = Annotated[int, Field(ge=0)]", f"{PACKETS} -k 'trained_reply and wide'"),
    Mutant("a loss of any size is taken", "deploy/schema.py", "if not math.isfinite(value) or abs(value) > LARGEST:", "if False:", f"{PACKETS} -k 'trained_reply and (NaN or infinite)'"),
    Mutant("a recipe is read however deep it is", "deploy/schema.py", "        if level > DEEPEST:\n", "        if False:\n", f"{PACKETS} -k looked_into"),
    Mutant("round 0.0 is round 0", "deploy/schema.py", "if type(got) is not type(want) or got != want:", "if got != want:", f"{PACKETS} -k no_upload"),
    Mutant("scores count rows that nobody has", "deploy/claims.py", "if type(n) is not int or not 0 <= n <= rows:", "if type(n) is not int or n < 0:", f"{PACKETS} -k scores_that_cannot"),
    Mutant("a score may leave its metric's range", "deploy/claims.py", "not low - SLACK <= value <= high + SLACK", "value != value", f"{PACKETS} -k scores_that_cannot"),
    Mutant("one site without a metric takes it from all", "deploy/claims.py", 'if s["n"] and set(s) != usual}', "if False}", f"{PACKETS} -k without_a_metric"),
    Mutant("one upload of 1e30 decides a run", "deploy/claims.py", "if not n <= FAR * usual", "if False", f"{PACKETS} -k 'no_upload or 3e38'"),
    Mutant("an aggregate that is not finite is committed", "deploy/claims.py", "        if why is None:\n            return new", "        if True:\n            return new", f"{PACKETS} -k largest_uploads"),
    Mutant("the smallest upload is blamed", "deploy/claims.py", "largest = max(kept,", "largest = min(kept,", f"{PACKETS} -k 'largest_uploads or norm_bound'"),
    Mutant("a simulation commits what is not finite", "federation/run.py", "if why := finite_state(new.leaves):", "if why := finite_state({}):", f"{PACKETS} -k never_committed"),
    Mutant("an error nobody thought of ends a site", "deploy/site.py", "except Exception as e:  # any error", "except FedloraError as e:  # any error", f"{PACKETS} -k no_leaves"),
    Mutant("a site that did not join is never asked again", "deploy/attendance.py", "(n not in self.failed or self.failed[n].again <= now)", "n not in self.failed", f"{PACKETS} -k asked_again"),
    Mutant("leaves are made before they are counted", "federation/wire.py", "if len(described) > most + 1:", "if False:", f"{PACKETS} -k no_upload"),
    Mutant("a rank may be zero", "federation/wire.py", "v.ndim == len(shape) and 1 <= rank(k, v) <= shape[axis]:", "v.ndim == len(shape) and rank(k, v) <= shape[axis]:", "tests/test_wire.py -k below_one"),
    Mutant("a stated norm may be negative", "federation/wire.py", "            if v < 0:\n", "            if False:\n", "tests/test_wire.py -k can_be_norms"),
    Mutant("the norm of a model is what is stated, whatever its sites'", "federation/wire.py", "if layers and whole is not None and abs(whole - each) > 1e-2 * max(whole, each):", "if False:", "tests/test_wire.py -k can_be_norms"),
    Mutant("a site's words are read as markup", "cli/progress.py", "said = escape(f\"round {line.round}: refused the upload of {client}: {why}\")", "said = f\"round {line.round}: refused the upload of {client}: {why}\"", "tests/test_site_commands.py -k markup"),
    Mutant("half a head is waited for", "flower/door.py", "self._wait = self.loop.call_later(GREETING, self._late) if head else None", "self._wait = None", "tests/test_door.py -k half_a_head"),
    Mutant("half a body is waited for", "flower/door.py", "asyncio.timeout(min(STALLED, max(end - time.monotonic(), 0.0)))", "asyncio.timeout(None)", "tests/test_door.py -k half_a_body"),
    Mutant("a body may drip for ever", "flower/door.py", "asyncio.timeout(min(STALLED, max(end - time.monotonic(), 0.0)))", "asyncio.timeout(STALLED)", "tests/test_door.py -k drips"),
    Mutant("one address takes all connections", "flower/door.py", "crowded = self.inside[who] >= self.each", "crowded = False", "tests/test_door.py -k one_address"),
    Mutant("a connection that is closed still counts", "flower/door.py", "            self.inside[who] -= 1\n", "", "tests/test_door.py -k one_address"),
    Mutant("the server's own socket is never answered", "flower/door.py", "        if not self.limited:\n", "        if False:\n", "tests/test_door.py -k own_door"),
    Mutant("the network reaches the control API", "flower/superlink.py", 'if not scope["path"].startswith(prefixes):', "if False:", "tests/test_flower.py -k strangers"),
    Mutant("nodes need no key", "flower/superlink.py", "self.open_to_all = keys is None", "self.open_to_all = True", "tests/test_flower.py -k strangers"),
    # robust guards
    Mutant("distances are of factors", "federation/guards/geometry.py", "if other == k or other not in p:", "if True:", "tests/test_law_robust.py -k 'dense_products or hides'"),
    Mutant("smaller ranks are compared with the server's whole", "federation/guards/geometry.py", "cut_rank(k, server[k], rank(k, v))", "cut_rank(k, server[k], rank(k, server[k]))", "tests/test_law_robust.py -k dense_products"),
    Mutant("an upload is its own neighbour", "federation/guards/krum.py", ".values[:, 1 : n - wrong - 1]", ".values[:, : n - wrong - 2]", "tests/test_law_robust.py -k papers_rule"),
    Mutant("Krum counts the attackers' distances", "federation/guards/krum.py", ".values[:, 1 : n - wrong - 1]", ".values[:, 1:]", "tests/test_law_robust.py -k papers_rule"),
    Mutant("an even median is the upper one", "federation/guards/median.py", "low, high = (len(seen) - 1) // 2, len(seen) // 2", "low, high = len(seen) // 2, len(seen) // 2", "tests/test_law_robust.py -k numpys"),
    Mutant("Weiszfeld weighs by distance", "federation/guards/geomedian.py", "w = 1 / far.clamp(min=least)", "w = far.clamp(min=least)", "tests/test_law_robust.py -k scipys"),
    Mutant("factors are averaged as they come", "federation/guards/geomedian.py", "for k, v in aligned(u.params, server.params).items()", "for k, v in u.params.items()", "tests/test_law_robust.py -k rotations_change"),
    Mutant("the bound is the mean's", "federation/guards/bound.py", "middle = float(sizes.quantile(0.5))", "middle = float(sizes.mean())", "tests/test_law_robust.py -k so_many_medians"),
    Mutant("a product is scaled like a factor", "federation/guards/bound.py", "low, high = (t, high) if moved(at(t), server) <= most else (low, t)", "low = high = most / moved(up, server)", "tests/test_law_robust.py -k so_many_medians"),
    Mutant("a stated norm is scaled", "federation/guards/bound.py", 'states = any(k.part == "norm" for k in u.params)', "states = False", "tests/test_law_robust.py -k states_its_norm"),
    # exports stand by themselves
    Mutant("a regression is exported as a probability", "training/tasks/regression.py", '"problem_type": "regression"', '"problem_type": None', "tests/test_card.py -k 'lines_load and regression'"),
    Mutant("an export names heads that it lacks", "checkpoints/peft.py", 'if field != "modules_to_save" or n in there)', "if True)", "tests/test_card.py -k equal_bytes"),
    Mutant("a card tells another round's scores", "serving/card.py", 'wanted = (view, "test", of.round, None)', 'wanted = (view, "test", of.best, None)', "tests/test_card.py -k very_model"),
    Mutant("a card tells everybody's scores of a client's model", "serving/card.py", "line.mean if client is None else line.clients.get(client, {})", "line.mean", "tests/test_card.py -k very_model"),
    Mutant("a card forgets the names of classes", "serving/card.py", 'extra |= {"id2label"', 'extra | {"id2label"', "tests/test_card.py -k 'lines_load and classification'"),
    # which round is served
    Mutant("the best round's personal leaves are pruned", "federation/personal.py", "if old == self.held.get(id):", "if False:", "tests/test_rounds.py -k beside_them"),
    Mutant("every round is held to be the best", "federation/store.py", "        if hold:\n", "        if True:\n", "tests/test_rounds.py -k beside_them"),
    Mutant("the best round is lost with the process", "federation/store.py", 'if newest.get("held"):', "if False:", "tests/test_rounds.py -k crash"),
    Mutant("a hand-over takes the place of its round", "federation/run.py", "hold = any(x.round == best for x in new)", "hold = server.round == best", "tests/test_rounds.py -k hand_over"),
    # heads, requests, cut rows
    Mutant("a head keeps its own order of classes", "checkpoints/heads.py", "p.copy_(p[order].clone())", "pass", "tests/test_pretrained.py -k follows"),
    Mutant("a head is moved the wrong way", "checkpoints/heads.py", "order = [place.get(_folded(n), -1) for n in names]", "order = [[_folded(m) for m in names].index(_folded(n)) if _folded(n) in [_folded(m) for m in names] else -1 for n in own]", "tests/test_pretrained.py -k follows"),
    Mutant("a head of other classes is kept", "checkpoints/pretrained.py", "if not name_outputs(base, output, names, trained, name):", "name_outputs(base, output, names, trained, name)\n        if False:", "tests/test_pretrained.py -k other_classes_is_drawn_anew"),
    Mutant("outputs without names are the data's", "checkpoints/heads.py", 'own = [n.removeprefix("LABEL_") for n in own]', "own = list(names)", "tests/test_pretrained.py -k other_classes_is_drawn_anew"),
    Mutant("a tokenizer may be larger than the table", "checkpoints/pretrained.py", "if rows is None or len(tokenizer) <= rows:", "if True:", "tests/test_pretrained.py -k larger"),
    Mutant("requests are asked without their template", "serving/predict.py", "    elif data.get(\"template\"):\n        if len(columns)", "    elif False:\n        if len(columns)", "tests/test_predict.py -k template_of_use"),
    Mutant("a prompt ends like a text", "training/tasks/causal_lm.py", "ids = [*before, *s.tokenizer(text, add_special_tokens=False, verbose=False)[\"input_ids\"]]", "ids = list(s.tokenizer(text)[\"input_ids\"])", "tests/test_predict.py -k tokens_of_training"),
    Mutant("a long prompt keeps its beginning", "training/tasks/causal_lm.py", "[*p[:before], *p[len(p) - room + before :]]", "p[:room]", "tests/test_predict.py -k tokens_of_training"),
    Mutant("a file's rows are answered by their first column", "serving/requests.py", "else strings(table, columns[0], \"predict\")", "else strings(table, table.column_names[0], \"predict\")", "tests/test_predict.py -k alike"),
    Mutant("probabilities are in another order than names", "training/task.py", "dict(zip(serving.names, p.tolist(), strict=True))", "dict(zip(serving.names, p.roll(1).tolist(), strict=True))", "tests/test_predict.py -k alike"),
    Mutant("a client's name is looked at after the model", "cli/answers.py", "    if client is not None and known:", "    if client is not None and not known:", "tests/test_predict.py -k before_a_model"),
    Mutant("rows are cut in silence", "data/load.py", "if how in LOST and (cut := sum(e.truncated for e in encoded)):", "if False:", "tests/test_tokenize.py -k are_cut"),
    Mutant("rows that the cache holds are whole", "data/load.py", 'return Encoded(**{**found, "truncated": int(found["truncated"][0])})', 'return Encoded(**{**found, "truncated": 0})', "tests/test_tokenize.py -k are_cut"),
    # whole runs, and pairs of them
    Mutant("pairs are of any partitions of one size", "report/tables.py", '"rows" if "rows" in r.partition else "histogram", "sizes")])', '"sizes")])', "tests/test_report.py -k other_partitions"),
    # check and its doctor
    Mutant("doctor knows AMX alone", "cli/doctor.py", "why = kernels.missing()", "why = kernels.unavailable()", "tests/test_ls.py -k operators"),
    Mutant("the tried block is one client", "federation/probe.py", "some = in_order(cohort)[:block]", "some = in_order(cohort)[:1]", "tests/test_check.py -k measured"),
    Mutant("a block that cannot fit is tried", "federation/probe.py", "if guess.training > MARGIN * free:", "if False:", "tests/test_check.py -k surely"),
    Mutant("a bin loses its last client", "cli/checks.py", "counts[(n - low) // width] += 1", "counts[(n - low) // width] = 1", "tests/test_check.py -k bins"),
    Mutant("a sweep's total is its last run's", "cli/checks.py", 'size(sum(c.run.bytes["down"] + c.run.bytes["up"] for c in found))', 'size(found[-1].run.bytes["down"] + found[-1].run.bytes["up"])', "tests/test_check.py -k sweep"),
    Mutant("the first of equal rows is the duplicate", "data/doctor.py", "again = np.setdiff1d(train, train[first])", "again = train[first]", "tests/test_doctor.py -k 'duplicates or clean'"),
    Mutant("a leak is a row on two sides", "data/doctor.py", "np.isin(key[seen.sides[side]], key[train])", "np.isin(seen.sides[side], train)", "tests/test_doctor.py -k duplicates"),
    Mutant("spellings of a missing value are classes", "data/doctor.py", 'return "" if plain in MISSING else plain', "return plain", "tests/test_doctor.py -k spelling"),
    Mutant("a cut row is as long as what is left", "data/doctor.py", "full = np.flatnonzero(n >= limit)", "full = np.flatnonzero(n > limit)", "tests/test_doctor.py -k lengths"),
    Mutant("a group is torn by the split", "data/federated.py", "split(rows, scaled, shares, seed) if together is None else", "split(rows, scaled, shares, seed) if True else", "tests/test_together.py -k torn"),
    Mutant("small clients stay small", "data/together.py", "owner = _filled(owner, np.bincount(number), clients, min_size, seed)", "pass", "tests/test_together.py -k small"),
    Mutant("a test file may share groups", "data/federated.py", "        together.apart(origin)\n", "", "tests/test_together.py -k test_file"),
    Mutant("a class is lost to the other side with its groups", "data/together.py", "side[number[np.flatnonzero(mine == label)[0]]] = names.index(\"train\")", "pass", "tests/test_together.py -k rare"),
    Mutant("a copied recipe names a schema that is elsewhere", "recipe/shipped.py", 'f.write(f"{MARK}{SCHEMA.as_uri()}\\n{body}")', "f.write(text)", "tests/test_recipes_shipped.py -k copy"),
    Mutant("places are counted from 0", "data/doctor.py", "row - int(self.starts[t]))", "row - int(self.starts[t]) - 1)", "tests/test_doctor.py -k empty"),
    Mutant("a date is a label", "data/guess.py", 'and c.kind != "date"]', "]", "tests/test_init.py -k 'found and classes'"),
    Mutant("what a person names is guessed anyway", "recipe/start.py", "    g = replace(g, **given)\n", "", "tests/test_init.py -k given_win"),
    Mutant("a first recipe replaces a file", "recipe/shipped.py", 'target.open("x"', 'target.open("w"', "tests/test_init.py -k then_takes"),
    Mutant("a partition is told by its sizes", "federation/summary.py", "rows.update(split.encode() + part.tobytes())", "rows.update(split.encode() + str(len(part)).encode())", "tests/test_report.py -k which_rows"),
    Mutant("a schedule begins again in every round", "federation/engine.py", "(info.round + (step + 0.5) / steps) / max(info.rounds, 1)", "(step + 0.5) / steps", "tests/test_law_run.py -k loops"),
    Mutant("kept moments are thrown away", "methods/sgd.py", 'if self.moments == "keep" else {}', 'if self.moments == "keep!" else {}', "tests/test_law_run.py -k loops"),
    Mutant("moments are kept unasked", "methods/sgd.py", 'moments = work["moments"] if self.moments == "keep" else {}', 'moments = work["moments"]', "tests/test_law_run.py -k loops"),
    Mutant("a block is clipped by its largest client", "training/optimizers.py", "factor = (most / (total + 1e-6)).clamp(max=1.0)", "factor = (most / (total.max().expand(len(total)) + 1e-6)).clamp(max=1.0)", "tests/test_law_run.py -k loops"),
    Mutant("the lower step ignores the schedule", "methods/pf2lora.py", "a = lr * self.lr_personal", "a = torch.full_like(lr, self.lr_personal)", "tests/test_law_run.py -k schedule"),
    Mutant("every round has the same minibatches", "data/batches.py", 'generator = np_rng("batches", *path)', 'generator = np_rng("batches", path[0], *path[2:])', "tests/test_law_run.py -k every_round"),
    Mutant("every round has the same dropout masks", "data/batches.py", 'np_rng("dropout", i, *path).integers', 'np_rng("dropout", i, path[0], *path[2:]).integers', "tests/test_law_run.py -k every_round"),
    Mutant("cross scores are of the client's own model", "federation/views.py", "row = scores(f, [p] * n, chosen", "row = scores(f, params, chosen", "tests/test_federation.py -k cross"),
    Mutant("the cross matrix lies on its side", "federation/views.py", "return CrossLine(server.round, \"test\", metric, [f.data.ids[k] for k in chosen], matrix)", "return CrossLine(server.round, \"test\", metric, [f.data.ids[k] for k in chosen], [list(c) for c in zip(*matrix)])", "tests/test_federation.py -k cross"),
    # data
    Mutant("a stale token cache", "data/load.py", "for texts in (first, second or ()):", "for texts in ():", "tests/test_tokenize.py -k cache"),
    Mutant("splits ignore labels", "data/split.py", "labels[rows.rows], clients))", "clients))", "tests/test_partition.py -k splits_of"),
    Mutant("a short client stays short", "data/partition.py", "filled[given] = np.repeat(np.arange(clients), short)", "pass", "tests/test_partition.py -k short"),
    # store and wire
    Mutant("no checksum", "federation/states.py", "whole = _digest(wire.encode(params, header)).hex() == digest", "whole = True", "tests/test_store.py -k damaged"),
    # the run folder and the cache: damage is named, nothing is lost, nothing foreign is run
    Mutant("a claim is more than one step", "federation/claim.py", "if not _left_by_a_crash(p, recipe)]", 'if p.name != ".lock"]', "tests/test_damage.py -k 'killed_at_any_event and fedsa or cut_short'"),
    Mutant("leaves that are gone are begun anew", "federation/store.py", "        return self.load_round(id, round)", "        return self.load_round(id, round) if self.has_round(id, round) else None", "tests/test_damage.py -k newest_round"),
    Mutant("a client's older state passes for its newest", "federation/personal.py", 'if header.get("round") != round:', "if False:", "tests/test_damage.py -k old_state"),
    Mutant("leaves of the newest round are not looked at", "federation/store.py", 'if round == header["round"] - 1:', "if False:", "tests/test_damage.py -k newest_round"),
    Mutant("a changed digit of the records passes", "files/sealed.py", "if known is not None and found.hex != known:", "if False:", "tests/test_damage.py -k 'mended and fedsa'"),
    Mutant("a changed line of timings passes", "files/sealed.py", "if found is None or digest(text[: found.start()], 4) != found[1].decode():", "if found is None:", "tests/test_damage.py -k 'timings or lines'"),
    Mutant("a changed JSON file passes", "files/sealed.py", "if found is None or digest(data[: found.start()]) != found[1].decode():", "if found is None:", "tests/test_damage.py -k 'mended and fedsa'"),
    Mutant("a run without states begins anew", "federation/store.py", "            self._nothing_is_lost()\n", "", "tests/test_damage.py -k gone_are_not"),
    Mutant("other data are taken silently", "federation/claim.py", "if k in known and known[k] != inputs[k]]", "if False]", "tests/test_damage.py -k refused"),
    Mutant("a fingerprint sees the beginning alone", "federation/inputs.py", "blocks.sum(-1)", "blocks[:, 0]", "tests/test_damage.py -k fingerprints"),
    Mutant("a fingerprint passes over the words", "federation/inputs.py", "(words.labels, words.offsets, words.seen) if words else ()", "()", "tests/test_damage.py -k labels_of_words"),
    Mutant("records are read without a look at their digest", "federation/records.py", "    sealed.verify_metrics(folder / \"metrics.jsonl\")\n", "", "tests/test_report.py -k digest"),
    Mutant("an evaluation without some clients is chosen", "federation/summary.py", "evals = [x for x in evals if x.missing == fewest]", "pass", "tests/test_damage.py -k misses"),
    Mutant("others read personal leaves", "files/durable.py", "path.mkdir(mode=FOLDER, exist_ok=True)", "path.mkdir(exist_ok=True)", "tests/test_damage.py -k nobody_else"),
    Mutant("what others may write is loaded", "files/cache.py", "if not _ours(facts) or stat.S_IMODE(facts.st_mode) & 0o022:", "if False:", "tests/test_cache.py -k others"),
    Mutant("a cut file of the cache is used", "files/cache.py", "payload if end >= 0 and data[end:] == _seal(payload) else None", "payload", "tests/test_cache.py -k written"),
    Mutant("a library is loaded unseen", "kernels/library.py", "if place is not None and user_cache.read(place / file) is not None:", "if place is not None and (place / file).exists():", "tests/test_kernels.py -k compiled_once"),
    Mutant("a moved run looks where it was started alone", "recipe/places.py", "[folder.absolute() / place[\"relative\"]] if \"relative\" in place else []", "[]", "tests/test_places.py -k moved"),
    Mutant("sites are told the server's folders", "deploy/coordinator.py", "if elsewhere(raw[\"model\"][\"name\"]):", "if False:", "tests/test_places.py -k told"),
    Mutant("oneDNN's refusal ends the run", "federation/engine.py", '"could not create a primitive", ', "", "tests/test_memory.py -k onednn"),
    Mutant("metrics are not cut back", "federation/store.py", "f.truncate(length)", "pass", "tests/test_store.py -k 'dropped or committed'"),
    Mutant("states are pruned too early", "federation/personal.py", "if n < round][:-OLDER]:", "if n < round][:-1]:", "tests/test_store.py tests/test_damage.py -k 'pruned or newest'"),
    Mutant("framing is free", "federation/wire.py", "return Traffic(payload - head, head, total - payload)", "return Traffic(payload - head, head, 0)", "tests/test_wire.py"),
    Mutant("NaN is let in", "federation/wire.py", "    if not math.isfinite(n):\n        for k, v", "    if n == math.inf:\n        for k, v", "tests/test_wire.py"),
    # evaluation
    Mutant("the round is chosen on test", "federation/summary.py", 'for split in ("validation", "test"):\n        for view', 'for split in ("test", "validation"):\n        for view', "tests/test_federation.py -k chosen"),
    Mutant("predictions come back in another order", "evaluation/predictions.py", "back = np.argsort(order)", "back = order", "tests/test_federation.py"),
    Mutant("the worst tenth is the best", "training/metrics.py", "ordered = np.sort(v)[::-1] if m in lower else np.sort(v)", "ordered = np.sort(v)[::-1]", "tests/test_metrics.py"),
    Mutant("the score on validation is that on test", "federation/summary.py", 'at(main, "validation", chosen).get', 'at(main, "test", chosen).get', "tests/test_summary.py"),
    Mutant("evaluation takes no time", "federation/summary.py", "t.train_seconds + t.eval_seconds + t.server_seconds", "t.train_seconds + t.server_seconds", "tests/test_summary.py"),
    Mutant("the last minibatch of a pass is rounded away", "data/batches.py", "round(self.epochs * -(-rows // self.batch_size) / draws)", "int(self.epochs * -(-rows // self.batch_size) / draws)", "tests/test_summary.py"),
    Mutant("a seed that failed is left out of the cost", "report/tables.py", "whole = got if found and len(got) == len(found) else []", "whole = got", "tests/test_report.py -k never_reached"),
    Mutant("a race shows another view", "report/races.py", '[x for x in r.evals(view, "test") if', '[x for x in r.evals(r.main, "test") if', "tests/test_report.py -k race_is"),
    Mutant("an export loses the base's revision", "checkpoints/peft.py", 'held.peft_config["default"].revision = revision', 'held.peft_config["default"].revision = None', "tests/test_card.py -k revision"),
    Mutant("the card's lines load another revision", "serving/card.py", '        extra["revision"] = revision\n', '        pass\n', "tests/test_card.py -k revision"),
    Mutant("the card of the global model has personal scores", "serving/card.py", 'view = "global" if client is None else "personal"', 'view = "personal"', "tests/test_card.py -k very_model"),
    Mutant("rows of unseen clients count as trained on", "serving/card.py", "train[: fed.training].sum()", "train.sum()", "tests/test_card.py -k trained_on"),
    Mutant("tables that have parted are tied again", "checkpoints/merge.py", "config.tie_word_embeddings = False", "pass", "tests/test_export.py -k tied_tables"),
    # data
    Mutant("a client sees everybody's labels unpermuted", "data/batches.py", 'batch["labels"] = torch.from_numpy(data.label_maps[owners, batch["labels"].numpy()])', "pass", "tests/test_federation.py"),
    Mutant("prompts carry loss", "data/examples.py", "scored = inside & (at >= np.maximum(skip, 1)[:, None])", "scored = inside & (at >= 1)", "tests/test_federation.py"),
    Mutant("sizes of splits are cut off", "data/split.py", "np.rint(sizes * share)", "np.floor(sizes * share)", "tests/test_partition.py -k rounded"),
    Mutant("the first holder gets every single row", "data/split.py", "np.cumsum(have) - have, start))", "np.cumsum(have) - have, start * 0))", "tests/test_partition.py -k alike"),
    Mutant("a long prompt loses its end", "data/encode.py", "*p[len(p) - keep :], *c[:rest]", "*p[:keep], *c[:rest]", "tests/test_tokenize.py -k beginning"),
    Mutant("the first token's characters are predicted", "data/encode.py", "stop[a + len(piece)] - stop[first]", "stop[a + len(piece)] - stop[a]", "tests/test_tokenize.py -k first_token"),
    # tasks
    Mutant("padding is another token than the model's", "model/adapted.py", 'masked_fill(inputs["attention_mask"] == 0, self.pad)', 'masked_fill(inputs["attention_mask"] == 0, 0)', "tests/test_padding.py -k alone"),
    Mutant("a row of weight 0 is cut below its end", "training/batching.py", "    if bool((lengths > 0).all()):\n", "    if True:\n", "tests/test_padding.py -k 'weight_0 or bart'"),
    Mutant("a vector of labels is cut like tokens", "training/batching.py", "if v.ndim > 2 and n in tokenwise else v", "if v.ndim > 2 else v", "tests/test_padding.py -k vector"),
    Mutant("the last piece of a word carries its tag", "data/encode.py", "first[1:] = of[1:] != of[:-1]", "first[:-1] = of[1:] != of[:-1]", "tests/test_new_tasks.py -k first_piece"),
    Mutant("a byte-level tokenizer glues words", "data/encode.py", "add_prefix_space=True, trim_offsets", "add_prefix_space=False, trim_offsets", "tests/test_new_tasks.py -k 'left_as or first_piece'"),
    Mutant("words that were cut count as right", "training/tasks/token_classification.py", "said = np.full(len(p.words.labels), outside, np.int64)", "said = p.words.labels.copy()", "tests/test_new_tasks.py -k seqevals"),
    Mutant("an entity goes on although its type is another", "training/tasks/token_classification.py", "(was_inside & other)", "(was_inside & first)", "tests/test_new_tasks.py -k seqevals"),
    Mutant("precision and recall change places", "training/tasks/token_classification.py", "count(a >= 0), count(b >= 0)", "count(b >= 0), count(a >= 0)", "tests/test_new_tasks.py -k seqevals"),
    Mutant("a token classifier is exported as one of texts", "training/tasks/token_classification.py", 'peft_type: ClassVar[str] = "TOKEN_CLS"', 'peft_type: ClassVar[str] = "SEQ_CLS"', "tests/test_new_tasks.py -k exports"),
    Mutant("the loss of labels is their sum", "training/tasks/multi_label.py", 'reduction="none").mean(-1)', 'reduction="none").sum(-1)', "tests/test_new_tasks.py -k formula"),
    Mutant("the threshold is one half", "training/tasks/multi_label.py", "full(output).sigmoid() > self.threshold", "full(output).sigmoid() > 0.5", "tests/test_new_tasks.py -k labels_are"),
    Mutant("a multi-label model does not say so", "training/tasks/multi_label.py", '"problem_type": "multi_label_classification"', '"problem_type": None', "tests/test_new_tasks.py -k exports"),
    Mutant("hits of one client count for the next", "training/tasks/classification.py", "count(true[right], whose[right])", "count(true[right], whose[: right.sum()])", "tests/test_new_tasks.py -k classes_are"),
    Mutant("an empty text has nothing to be read", "data/examples.py", "seen = at < np.maximum(length, 1)[:, None]", "seen = at < length[:, None]", "tests/test_padding.py -k without_tokens"),
    # files as people have them
    Mutant("the first delimiter that is seen is taken", "data/separated.py", "    if len(even) != 1:", "    if not found:", "tests/test_files.py -k 'cannot_be_told'"),
    Mutant("a delimiter in a text is one of fields", "data/separated.py", "even = [d for d in found if len(set(counts[d])) == 1]", "even = found[:1]", "tests/test_files.py -k delimiter_is_found"),
    Mutant("line breaks within a text end rows", "data/separated.py", 'row[np.searchsorted(starts, a, side="right") : np.searchsorted(starts, b, side="left")] = False', "pass", "tests/test_files.py -k 'knows_its_line or name_the_line'"),
    Mutant("lines are those of the rows that are left", "data/lines.py", "file, line = table.column(FILE)[row].as_py(), table.column(LINE)[row].as_py()", "file, line = table.column(FILE)[row].as_py(), row + 2", "tests/test_files.py -k survive"),
    Mutant("the first sheet of several is taken", "data/workbook.py", "if sheet is None and len(names) != 1:", "if sheet is None and not names:", "tests/test_files.py -k several_sheets"),
    Mutant("an error of a sheet is a text", "data/workbook.py", 'None if c.data_type == "e" else c.value', "c.value", "tests/test_files.py -k workbooks_that"),
    Mutant("a null row of JSONL ends the process", "data/json_rows.py", 'all(first == b"{" for _, first in begins)', "begins", "tests/test_files.py -k lists_that_are_none"),
    Mutant("a readme becomes an example", "data/sources.py", 'found = tables or found if format == "auto" else found', "pass", "tests/test_files.py -k readme"),
    Mutant("the first file of several in a zip is taken", "data/archives.py", "if len(files) != 1:", "if not files:", "tests/test_files.py -k damaged"),
    Mutant("a password is kept in the run folder", "data/addresses.py", "    if _password(source):", "    if False:", "tests/test_database.py -m 'not slow' -k password"),
    Mutant("SQLite makes the file that is missing", "data/database.py", '    if not path.is_file():\n        raise missing(path)\n    return url.set(database=f"{path.absolute().as_uri()}", query={**url.query, "mode": "ro", "uri": "true"})', "    return url", "tests/test_database.py -m 'not slow'"),
    Mutant("a query writes", "data/database.py", '"mode": "ro", "uri": "true"', '"uri": "true"', "tests/test_database.py -m 'not slow' -k give_nothing"),
    Mutant("a colon in a query is a parameter", "data/database.py", "connection.execution_options(no_parameters=True, **read_only).exec_driver_sql(query)", "connection.execute(sa.text(query))", "tests/test_database.py -m 'not slow' -k rows_of"),
    Mutant("rows are left out in silence", "data/missing.py", "    if lost:\n", "    if False:\n", "tests/test_missing.py"),
    Mutant("an empty cell is a text", "data/missing.py", "    if blank and (", "    if False and (", "tests/test_missing.py"),
    Mutant("the limit counts rows that are left out", "data/load.py", "    if data.get(\"missing\") == \"drop\":\n", "    tables = {o: limited(t, data.get(\"limit\"), seed) for o, t in tables.items()}\n    if data.get(\"missing\") == \"drop\":\n", "tests/test_missing.py -k counted"),
    Mutant("a server asks the site's database", "deploy/site.py", "{**raw[\"data\"], **usual, **self.columns}", "{**raw[\"data\"], **self.columns}", "tests/test_site_commands.py -k own_matter"),
    Mutant("a policy hears the order's query", "deploy/policy.py", "{k: getattr(d, k) for k in SHAPE}", "{k: given.get(k) for k in SHAPE}", "tests/test_site_commands.py -k own_matter"),
    Mutant("what the user says is learned", "data/chats.py", "spans.append((min(len(before), len(through)), len(through)))", "spans.append((0, len(through)))", "tests/test_chats.py -k 'mask and bytes'"),
    Mutant("the end of an answer is not learned", "data/chats.py", "tokenize=False).rstrip()", "tokenize=False).rstrip().removesuffix('<|im_end|>')", "tests/test_chats.py -k 'mask and bytes'"),
    Mutant("turns out of order are a chat", "data/chats.py", "        if m[\"role\"] != due:", "        if False:", "tests/test_chats.py -k are_none"),
    Mutant("a chat without an answer is one", "data/chats.py", "if not any(m[\"role\"] == \"assistant\" for m in out):", "if False:", "tests/test_chats.py -k are_none"),
    Mutant("a template that writes turns anew is believed", "data/chats.py", "if not (text.startswith(through) and", "if False and not (text.startswith(through) and", "tests/test_chats.py -k that_fail"),
    Mutant("chats without answers are left out in silence", "data/load.py", "if lost := every - sum(len(e.source) for e in encoded):", "if lost := 0:", "tests/test_chats.py -k cut_away"),
    Mutant("chats are asked without their template", "serving/predict.py", "    if data.get(\"messages\") or data.get(\"chat\"):\n", "    if False:\n", "tests/test_chats.py -k asked"),
    Mutant("a web address becomes a path", "data/addresses.py", "    if kind in WEB:\n", "    if False:\n", "tests/test_files.py -k addresses"),
    # tables of comparisons
    Mutant("a client that is worse counts as better", "report/tables.py", "sum(g > 0 for g in gaps), sum(g == 0", "sum(g < 0 for g in gaps), sum(g == 0", "tests/test_report.py -k first_setting"),
    Mutant("LaTeX reads a name's underscore", "report/formats.py", '"&%$#_{}"', '"&%$#{}"', "tests/test_report.py -k latex"),
    Mutant("a table says other rows than were scored", "report/tables.py", 'return sum(s["n"] for s in line.clients.values())', 'return len(line.clients) + 1', "tests/test_report.py -k latex"),
    # sweeps with a search
    Mutant("the worst trial is taken", "recipe/search.py", "(-s if lower else s, -i)", "(s if lower else -s, -i)", "tests/test_search.py -k by_hand"),
    Mutant("the last of equal trials is taken", "recipe/search.py", "(-s if lower else s, -i)", "(-s if lower else s, i)", "tests/test_search.py -k by_hand"),
    Mutant("a method with more candidates gets more trials", "recipe/search.py", "_drawn(s.trials, trials, seed)", "s.trials", "tests/test_search.py -k same_number"),
    Mutant("trials have a seed of the runs", "recipe/search.py", "default=int(_field(p.base, \"run\", \"seed\", 0))) + 1", "default=0)", "tests/test_search.py -k same_number"),
    Mutant("trials are as long as runs", "recipe/search.py", '*([("federation.rounds", rounds)] if rounds else [])', "", "tests/test_search.py -k same_number"),
    Mutant("what was chosen is not run", "recipe/search.py", "[*s.pairs, *pick, *seed], [*s.pairs, *seed]", "[*s.pairs, *seed], [*s.pairs, *seed]", "tests/test_search.py -k have_what"),
    Mutant("a name that was given is lost", "recipe/sweep.py", 'not any(path == "name" for path, _ in [*pairs, *self.fixed])', "True", "tests/test_search.py -k given_stays"),
    Mutant("expand passes over a search", "recipe/sweep.py", "    if p.search is not None:\n", "    if False:\n", "tests/test_search.py -k at_once"),
    # recipes, the hub, the example by hand
    Mutant("a copied recipe overwrites a file", "recipe/shipped.py", 'target.open("x", encoding="utf-8")', 'target.open("w", encoding="utf-8")', "tests/test_recipes_shipped.py -k overwrites"),
    Mutant("without a network the hub is asked again and again", "data/sources.py", "datasets.config.HF_HUB_OFFLINE = offline or not (Path(name).is_dir() or reachable())", "pass", "tests/test_sources.py -k asked_once"),
    Mutant("the hub stays switched off after one failure", "data/sources.py", "        datasets.config.HF_HUB_OFFLINE = offline\n", "        pass\n", "tests/test_sources.py -k asked_once"),
    Mutant("data sets that are scripts cannot be read", "data/sources.py", "split=split, revision=PARQUET, trust_remote_code=False", "split=split, trust_remote_code=False", "tests/test_sources.py -k parquet_copy"),
    Mutant("clients of all sizes count alike", "methods/sgd.py", 'return float(u.client.examples) if self.weights == "examples" else 1.0', "return 1.0", "tests/test_examples.py"),
)  # fmt: skip


def found(m: Mutant, python: str) -> bool:
    """Whether the tests notice the bug, in a copy of the tree."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("src", "tests", "examples", "docs"):
            shutil.copytree(ROOT / name, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md"):
            shutil.copy(ROOT / name, folder)
        path = Path(folder) / "src/fedlora" / m.file
        path.write_text(path.read_text(encoding="utf-8").replace(m.old, m.new), encoding="utf-8")
        import shlex

        command = [
            python,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            *shlex.split(m.tests),
        ]
        environment = {
            **os.environ,
            "PYTHONPATH": f"{folder}/src",
            "OMP_NUM_THREADS": "1",
            "FEDLORA_SHARED": str((ROOT / "../shared").resolve()),
        }
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1):  # no tests ran: the list is wrong
            raise RuntimeError(
                f"{m.why}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-500:]}"
            )
        return done.returncode == 1


def main() -> int:
    parser = argparse.ArgumentParser(description="Plant every bug of the list; each must be found.")
    parser.add_argument("-j", type=int, default=2, help="how many at once")
    parser.add_argument("-k", default="", help="only those whose description or file holds this text")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if options.k in m.why or options.k in m.file]
    for part, why in (("kernels/amx.c", kernels.unavailable()), ("kernels/", kernels.missing())):
        if why and (left := [m for m in chosen if m.file.startswith(part)]):
            chosen = [m for m in chosen if m not in left]
            print(f"{len(left)} of {part} are left out: {why}")
    alive = 0
    with ThreadPoolExecutor(options.j) as pool:
        for m, dead in zip(chosen, pool.map(lambda m: found(m, sys.executable), chosen), strict=True):
            alive += not dead
            print(f"{'found' if dead else 'LIVES'}  {m.file}: {m.why}", flush=True)
    print(f"{len(chosen) - alive} of {len(chosen)} found")
    return alive > 0


if __name__ == "__main__":
    sys.exit(main())
