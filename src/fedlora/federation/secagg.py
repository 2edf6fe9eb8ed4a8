"""Secure aggregation: a server that learns the sum of its clients' vectors and no vector.

The protocol is SecAgg+ (Bell et al., CCS 2020, eprint 2020/704), which is Bonawitz et al. (CCS 2017) on a sparse graph:

    keys      client i has two X25519 pairs, one for encrypting and one for masks
    shares    it draws a seed b_i, and gives each neighbour a Shamir share of b_i and of its mask key, encrypted for that neighbour
    masked    y_i = x_i + PRG(b_i) + sum over neighbours j > i of PRG(s_ij) - sum over j < i of PRG(s_ij)   modulo 2^32
    unmask    of a client that sent y_i neighbours give shares of b_i, of one that vanished shares of its mask key, never both

s_ij is what both ends of the pair agree on, so masks of two clients that both sent cancel. Ciphers, key agreement and secret
sharing are those of `cryptography` and `pycryptodome`; Flower's own helpers fold a mask's seed of 256 bits to 32 bits and draw the
rounding from a global generator (flwr 1.41, ndarrays_arithmetic and quantization), so they do not serve.

Against a server that follows the protocol, and up to threshold - 1 neighbours of a client that tell it all they know. A server that
lies about who vanished needs the consistency round of Bonawitz et al., section 4.4, which is not here.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import FedloraError, TrainingError, UploadError

BITS = 32  # of the ring
Vector = np.ndarray  # uint32 [n]


def _crypto() -> Any:
    """The primitives, or a FedloraError that says what to install."""
    try:
        from Crypto.Protocol.SecretSharing import Shamir
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    except ModuleNotFoundError as e:
        raise FedloraError(f"secure aggregation needs {e.name}: pip install 'fedlora[privacy]'") from e
    return Shamir, hashes, X25519PrivateKey, X25519PublicKey, Cipher, algorithms, ChaCha20Poly1305, HKDF


# numbers in the ring -------------------------------------------------------------------------------------------------
def step(most: float, clients: int) -> float:
    """The grain of fixed-point numbers in (-most, most) of which the ring holds the sum of so many."""
    return 2.0 * most * clients / 2.0**BITS * (1 + 2.0**-20)


def fixed(x: np.ndarray, grain: float, most: float) -> Vector:
    """x [n] as ring elements. Raises UploadError for values outside (-most, most), whose sum could wrap around unseen."""
    if not np.isfinite(x).all() or float(np.abs(x).max(initial=0.0)) >= most:
        raise UploadError(f"a change of {float(np.abs(x).max()):.3g} does not fit, expected less than {most:g} (range)")
    return np.rint(x / grain).astype(np.int64).astype(np.uint32)


def real(x: Vector, grain: float) -> np.ndarray:
    """Ring elements as numbers, float64; the upper half of the ring is negative."""
    return x.view(np.int32).astype(np.float64) * grain


def mask(seed: bytes, n: int) -> Vector:
    """n ring elements from a seed of 32 bytes, by ChaCha20."""
    _, _, _, _, Cipher, algorithms, _, _ = _crypto()
    return np.frombuffer(
        Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor().update(bytes(4 * n)), np.uint32
    )


# who shares with whom ------------------------------------------------------------------------------------------------
def graph(members: int, neighbours: int | None, salt: int) -> list[list[int]]:
    """A ring of the members in a random order, each joined to the `neighbours` nearest on it; None joins all. Symmetric."""
    if neighbours is None or neighbours >= members - 1:
        return [[j for j in range(members) if j != i] for i in range(members)]
    order = list(range(members))
    random.Random(salt).shuffle(order)
    half = max(1, neighbours // 2)
    out: list[list[int]] = [[] for _ in order]
    for at, i in enumerate(order):
        out[i] = sorted({order[(at + d) % members] for d in range(-half, half + 1) if d})
    return out


@dataclass(frozen=True)
class Publics:
    """What a client tells everybody: a key to encrypt shares for it, and one to agree on masks."""

    encrypt: bytes
    agree: bytes


class Member:
    """A client's side of one round. id: its number; neighbours: numbers of those it shares with."""

    def __init__(self, id: int, neighbours: Sequence[int], threshold: int):
        _, _, Private, _, _, _, _, _ = _crypto()
        self.id, self.neighbours, self.threshold = id, list(neighbours), threshold
        self._encrypt, self._agree = Private.generate(), Private.generate()
        self._seed = secrets.token_bytes(32)
        self._held: dict[int, tuple[bytes, bytes]] = {}  # from a neighbour: a share of its seed, and of its mask key
        self._told: set[int] = set()

    def publics(self) -> Publics:
        """The keys that the server passes on."""
        return Publics(*(k.public_key().public_bytes_raw() for k in (self._encrypt, self._agree)))

    def shares(self, publics: Mapping[int, Publics]) -> dict[int, bytes]:
        """For each neighbour what only it can open: a share of the seed and one of the mask key."""
        Shamir, *_ = _crypto()
        self._publics = publics
        parts = []
        for secret in (self._seed, self._agree.private_bytes_raw()):
            split = [Shamir.split(self.threshold, len(self.neighbours), secret[a : a + 16]) for a in (0, 16)]
            parts.append([a[1] + b[1] for a, b in zip(*split, strict=True)])
        out = {}
        for j, mine, key in zip(self.neighbours, *parts, strict=True):
            box, nonce = self._box(j), secrets.token_bytes(12)
            out[j] = nonce + box.encrypt(nonce, mine + key, f"{self.id}>{j}".encode())
        return out

    def receive(self, boxes: Mapping[int, bytes]) -> None:
        """Open the neighbours' shares. Raises UploadError for one that was changed on the way."""
        for j, text in boxes.items():
            try:
                opened = self._box(j).decrypt(text[:12], text[12:], f"{j}>{self.id}".encode())
            except Exception as e:
                raise UploadError(f"the share of member {j} cannot be opened: it was changed on the way") from e
            self._held[j] = opened[:32], opened[32:]

    def masked(self, x: Vector) -> Vector:
        """x behind its own mask and those that it has in common with its neighbours."""
        y = x + mask(self._seed, len(x))
        for j in self.neighbours:
            pair = mask(_agreed(self._agree, self._publics[j].agree), len(x))
            y = y + pair if j > self.id else y - pair
        return y

    def unmask(self, sent: Iterable[int], vanished: Iterable[int]) -> dict[int, bytes]:
        """A share of every neighbour: of the seed of those that sent, of the mask key of those that vanished.

        Raises UploadError where both are asked of one: together they would open its vector.
        """
        sent, vanished = set(sent), set(vanished)
        if sent & vanished or self._told & (sent | vanished):
            raise UploadError(f"member {self.id} was asked for both secrets of a neighbour, or twice; it gives none")
        self._told |= sent | vanished
        return {j: self._held[j][j in vanished] for j in self.neighbours if j in sent | vanished}

    def _box(self, j: int) -> Any:
        *_, ChaCha20Poly1305, _ = _crypto()
        return ChaCha20Poly1305(_agreed(self._encrypt, self._publics[j].encrypt))


def _agreed(private: Any, public: bytes) -> bytes:
    """32 bytes that both ends of a pair derive."""
    _, hashes, _, Public, _, _, _, HKDF = _crypto()
    secret = private.exchange(Public.from_public_bytes(public))
    return HKDF(hashes.SHA256(), 32, None, b"fedlora secagg").derive(secret)


@dataclass
class Hub:
    """The server's side of one round: all that it ever holds. graph: neighbours of each member; size: of the vectors."""

    graph: list[list[int]]
    threshold: int
    size: int
    publics: dict[int, Publics] = field(default_factory=dict)
    boxes: dict[int, dict[int, bytes]] = field(default_factory=dict)  # receiver -> sender -> what it cannot open
    sent: list[int] = field(default_factory=list)
    total: Vector = field(default_factory=lambda: np.zeros(0, np.uint32))  # of masked vectors

    def introduce(self, members: Sequence[Member]) -> None:
        """Pass on everybody's public keys, and to each member the sealed shares that are for it."""
        self.publics = {m.id: m.publics() for m in members}
        for m in members:
            for j, box in m.shares({j: self.publics[j] for j in m.neighbours}).items():
                self.boxes.setdefault(j, {})[m.id] = box
        for m in members:
            m.receive(self.boxes[m.id])

    def add(self, i: int, y: Vector) -> None:
        """Add a masked vector to the sum; it is not kept."""
        self.total = y.copy() if not self.sent else self.total + y
        self.sent.append(i)

    def open(self, answers: Mapping[int, Mapping[int, bytes]]) -> Vector:
        """The sum of the vectors of those that sent. answers: member -> neighbour -> share. Raises TrainingError for too few."""
        Shamir, _, Private, *_ = _crypto()
        vanished = [i for i in range(len(self.graph)) if i not in self.sent]
        total = self.total
        for i in [*self.sent, *vanished]:
            have = [(self.graph[i].index(j) + 1, answers[j][i]) for j in self.graph[i] if i in answers.get(j, {})]
            if len(have) < self.threshold:
                if i in vanished and not any(j in self.sent for j in self.graph[i]):
                    continue  # nobody who sent has a mask in common with it
                raise TrainingError(
                    f"secure aggregation: {len(have)} of {self.threshold} shares of member {i} are there, so the sum cannot be opened; "
                    "the round is done again, or lower the threshold"
                )
            have = have[: self.threshold]
            secret = b"".join(Shamir.combine([(at, s[a : a + 16]) for at, s in have]) for a in (0, 16))
            if i in self.sent:
                total = total - mask(secret, self.size)
                continue
            key = Private.from_private_bytes(secret)
            for j in self.graph[i]:
                if j in self.sent:
                    pair = mask(_agreed(key, self.publics[j].agree), self.size)
                    # Member j has added it where i > j, and taken it away where i < j.
                    total = total - pair if i > j else total + pair
        return total
