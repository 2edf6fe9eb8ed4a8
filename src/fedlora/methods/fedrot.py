"""FedRot-LoRA: turn each client's factors to a common reference before they are averaged
(Zhang et al., ICML 2026, arXiv:2602.23638).

    round 1            as FedIT
    rounds 2, 4, ...   M = A_k A^T      A, B: what the client received
    rounds 3, 5, ...   M = B_k^T B
        M = U S V^T,   Q = U V^T with determinant 1 (else the last row of V^T is flipped)
        soft:  Q <- the orthogonal matrix nearest to (1 - lam) I + lam Q
        A_k <- Q^T A_k,  B_k <- B_k Q,  which leaves B_k A_k as it is
    aggregate          mean of both factors

lam = 0 is FedIT and 1 turns all the way. Turning needs no data, so the server can do it with what it sent (`where="server"`), with
the same result; it then records how far it turned, the mean of ||Q - I||: where that is near 0, the method is FedIT. Under
secure aggregation clients must do it (`where="client"`). Choice: moments start anew each round, since the factors' axes turn.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..adapters import named
from ..errors import Problem
from ..tree import Params, mean
from .average import HomLoRA
from .contract import Context, RoundInfo, ServerState, Upload, Work


@dataclass(frozen=True)
class FedRotLoRA(HomLoRA):
    """FedAvg of factors that were turned to each other. lam: how far, 0 to 1. where: who turns them."""

    name: ClassVar[str] = "fedrot"
    title: ClassVar[str] = "FedRot-LoRA"
    paper: ClassVar[str] = "arXiv:2602.23638"
    lam: float = 0.5
    where: Literal["server", "client"] = "server"

    def problems(self) -> list[Problem]:
        bad = super().problems()
        if not self.form.low_rank:
            forms = named(lambda f: f.low_rank)
            bad.append(Problem("method.adapter", self.adapter, f"{forms}: FedRot-LoRA turns the factors of a product"))
        if not 0 <= self.lam <= 1:
            bad.append(Problem("method.lam", self.lam, "a number in [0, 1]", "0.4 to 0.6 as in the paper"))
        if self.moments == "keep":
            bad.append(Problem("method.moments", "keep", "reset", "the axes of the factors turn"))
        return bad

    @property
    def averages(self) -> bool:
        return self.where == "client"

    # server -----------------------------------------------------------------------------------------------------
    def aggregate(self, context: Context, server: ServerState, uploads: Iterable[Upload]) -> ServerState:
        turns: list[float] = []

        def turned() -> Iterable[tuple[Params, float]]:
            for u in uploads:
                p, far = self.turned(u.params, server.params, server.round)
                turns.extend(far.tolist())
                yield p, self.weight(u)

        if self.where == "client":
            return super().aggregate(context, server, uploads)
        new = mean(turned())
        notes = server.notes | {"rotation": sum(turns) / len(turns)} if turns else server.notes
        return ServerState(server.round + 1, server.params | new, notes)

    def record(self, server: ServerState) -> dict[str, Any]:
        return {k: v for k, v in server.notes.items() if k == "rotation"}

    # client -----------------------------------------------------------------------------------------------------
    def begin(self, context: Context, info: RoundInfo, down: Params, kept: Params) -> Work:
        work = super().begin(context, info, down, kept)
        if self.where == "client" and info.round:
            part = self.reference(info.round)
            work["received"] = {k: v for k, v in down.items() if k.part == part and k.adapter == self.label}
        return work

    def finish(self, work: Work) -> tuple[Params, Params]:
        up, kept = super().finish(work)
        ref = work.get("received", {})
        return (self.turned(up, ref, 1 if any(k.part == "A" for k in ref) else 2)[0] if ref else up), kept

    # both -------------------------------------------------------------------------------------------------------
    def reference(self, round: int) -> str:
        """The factor that is brought near in a round (0-based)."""
        return "A" if round % 2 else "B"

    def turned(self, up: Params, received: Params, round: int) -> tuple[Params, Tensor]:
        """(leaves with turned factors, ||Q - I|| of each layer); with or without a client axis."""
        if round == 0 or self.lam == 0:
            return up, torch.zeros(0)
        out, far = dict(up), []
        for ka in [k for k in up if k.part == "A" and k.adapter == self.label]:
            kb = ka._replace(part="B")
            a, b = up[ka].double(), up[kb].double()
            m = a @ received[ka].double().mT if self.reference(round) == "A" else b.mT @ received[kb].double()
            q = rotation(m, self.lam)
            out[ka], out[kb] = (q.mT @ a).to(up[ka].dtype), (b @ q).to(up[kb].dtype)
            far.append(torch.linalg.matrix_norm(q - torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)))
        return out, torch.stack(far)


def rotation(m: Tensor, lam: float) -> Tensor:
    """The rotation nearest to m [... r r], `lam` of the way."""
    u, _, vh = torch.linalg.svd(m)
    last = torch.ones(m.shape[:-1], dtype=m.dtype, device=m.device)
    last[..., -1] = torch.linalg.det(u @ vh).sign()  # a reflection would not be near the identity however soft
    q = (u * last[..., None, :]) @ vh
    if lam < 1:
        u, _, vh = torch.linalg.svd((1 - lam) * torch.eye(m.shape[-1], dtype=m.dtype, device=m.device) + lam * q)
        q = u @ vh
    return q
