"""Certificates and node keys: made for a first federation, read for every one.

A node key is an elliptic-curve key in OpenSSH's format, as `ssh-keygen -t ecdsa -b 384` and Flower make it.
"""

from __future__ import annotations

import datetime as dt
import io
import ipaddress
import tarfile
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from ..errors import ConfigError, DataError, Problem
from ..files import durable

DAYS = 825  # that browsers and Apple's libraries accept of a certificate
PRIVATE, PUBLIC = 0o600, 0o644
ALLOWED = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def check_id(id: str) -> str:
    """A site's id, which becomes a file's name. Raises ConfigError."""
    if not id or not set(id) <= ALLOWED or id.startswith(".") or len(id) > 64:
        raise ConfigError([Problem("--id", id, "1 to 64 letters, digits, '.', '_' or '-'", "for example hospital-a")])
    return id


def make(folder: Path, hosts: Sequence[str], ids: Sequence[str]) -> list[Path]:
    """Write an authority, a server certificate for `hosts`, and a key pair for each id; returns the files.

    Files that are there are kept, so that a client can be added later; keys are readable by their owner alone.
    """
    for id in ids:
        check_id(id)
    clients = folder / "clients"
    clients.mkdir(parents=True, exist_ok=True)
    ca_key, ca = _authority(folder)
    written = [folder / "ca.pem"]
    if not ((folder / "server.pem").exists() and (folder / "server.key").exists()):  # a pair, or neither
        key = ec.generate_private_key(ec.SECP384R1())
        names = [_alternative(h) for h in hosts]
        server = (
            _certificate("fedlora server", key.public_key(), ca.subject)
            .add_extension(x509.SubjectAlternativeName(names), False)
            .add_extension(x509.BasicConstraints(False, None), True)
            .sign(ca_key, hashes.SHA384())
        )
        _write(folder / "server.key", _pem(key))
        _write(folder / "server.pem", server.public_bytes(serialization.Encoding.PEM), PUBLIC)
    written += [folder / "server.pem", folder / "server.key"]
    for id in ids:
        private, public = clients / f"{id}.key", clients / f"{id}.pub"
        if not private.exists():
            key = ec.generate_private_key(ec.SECP384R1())
            ssh = key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
            )
            _write(private, ssh)
        if not public.exists():  # also where a crash came between the two
            text = private_key(private)[1].public_bytes(
                serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
            )
            _write(public, text + f" {id}\n".encode(), PUBLIC)
        written += [private, public]
    return written


def bundle(folder: Path, id: str, host: str) -> Path:
    """One file for a site (tar.gz, readable by its owner alone): the authority's certificate, the site's key, and a line on what
    this is, for whom and until when. Made anew each time, so it is of the files that are there. host: of the server."""
    until = valid_until(folder / "ca.pem")
    about = (
        f"Keys with which the site {id} takes part in the federation of {host}: for whoever runs {id} and nobody else, valid "
        f"until {until:%Y-%m-%d}.\n"
        f"fedlora client --id {id} --server {host}:8443 --ca ca.pem --key {id}.key --data YOUR.csv --state state\n"
    )
    files = {
        "README.txt": (about.encode(), PUBLIC),
        "ca.pem": ((folder / "ca.pem").read_bytes(), PUBLIC),
        f"{id}.key": ((folder / "clients" / f"{id}.key").read_bytes(), PRIVATE),
    }
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, (data, mode) in files.items():
            member = tarfile.TarInfo(f"{id}/{name}")
            member.size, member.mode = len(data), mode
            tar.addfile(member, io.BytesIO(data))
    (folder / "bundles").mkdir(exist_ok=True)
    path = folder / "bundles" / f"{id}.tar.gz"
    _write(path, packed.getvalue())
    return path


def valid_until(certificate: Path) -> dt.datetime:
    """The last moment at which a certificate (PEM) is valid, UTC."""
    return x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc


def _authority(folder: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key_file, cert_file = folder / "ca.key", folder / "ca.pem"
    if key_file.exists() and cert_file.exists():
        key = serialization.load_pem_private_key(key_file.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key, x509.load_pem_x509_certificate(cert_file.read_bytes())
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedlora authority")])
    usage = {n: n in ("key_cert_sign", "crl_sign") for n in (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign",
        "crl_sign", "encipher_only", "decipher_only")}  # fmt: skip
    cert = (
        _certificate("fedlora authority", key.public_key(), name)
        .add_extension(x509.BasicConstraints(True, 0), True)
        .add_extension(x509.KeyUsage(**usage), True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .sign(key, hashes.SHA384())
    )
    _write(key_file, _pem(key))
    _write(cert_file, cert.public_bytes(serialization.Encoding.PEM), PUBLIC)
    return key, cert


def _certificate(name: str, key: ec.EllipticCurvePublicKey, issuer: x509.Name) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=DAYS))
    )


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, data: bytes, mode: int = PRIVATE) -> None:
    """Whole or not at all."""
    try:
        durable.write(path, data, mode=mode)
    except OSError as e:
        raise DataError(f"{path}: cannot be written: {e.strerror}; give another folder, or free some space") from e


def public_keys(folder: Path) -> dict[str, bytes]:
    """Site id -> its public key as Flower sends it, from <id>.pub files. Raises ConfigError with every file that is wrong."""
    bad: list[Problem] = []
    found: dict[str, bytes] = {}
    files = sorted(folder.glob("*.pub")) if folder.is_dir() else []
    if not files:
        bad.append(
            Problem("--clients-keys", str(folder), "a folder of <id>.pub files", "make them: fedlora federation keys")
        )
    for file in files:
        try:
            key = serialization.load_ssh_public_key(file.read_bytes())
            if not isinstance(key, ec.EllipticCurvePublicKey):
                raise ValueError("not an elliptic-curve key")
            text = public_key_to_bytes(key)
        except (ValueError, OSError, UnsupportedAlgorithm) as e:
            bad.append(
                Problem("--clients-keys", file.name, f"an OpenSSH ecdsa public key ({e})", "ssh-keygen -t ecdsa -b 384")
            )
            continue
        twin = next((i for i, k in found.items() if k == text), None)
        if twin is not None:
            bad.append(
                Problem("--clients-keys", file.name, f"a key of its own, not that of {twin}", "make one per site")
            )
        found[file.stem] = text
    if bad:
        raise ConfigError(bad)
    return found


def private_key(file: Path) -> tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey]:
    """A node's key pair. Raises DataError."""
    try:
        key = serialization.load_ssh_private_key(file.read_bytes(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError("not an elliptic-curve key")
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise DataError(
            f"--key {file}: {reason}; expected an OpenSSH ecdsa key without passphrase, as fedlora federation keys makes it"
        ) from e
    return key, key.public_key()
