"""Certificates for brokers in tests, signed by an authority of the test's own; expired, or for another name."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAY = timedelta(days=1)


class Authority:
    """Its certificate is `file`, which clients name as `ssl.ca.location`. host: the address, or the name, that the
    certificates of nodes are for; expired: whether they were good until yesterday only."""

    def __init__(self, folder: Path, host: str = "127.0.0.1", *, expired: bool = False) -> None:
        self._host, self._expired = host, expired
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"authority of {folder.name}")])
        now = datetime.now(UTC)
        certificate = (
            self._builder(self._name, self._key.public_key(), now - 30 * DAY, now + 30 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "ca.pem"
        self._certificate = certificate.public_bytes(serialization.Encoding.PEM)
        self.file.write_bytes(self._certificate)

    def sign(self, path: Path) -> None:
        """Write a node's key and certificate to a PEM file, as Kafka's `ssl.keystore.location` has it."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self._host)])
        now = datetime.now(UTC)
        end = now - DAY if self._expired else now + 30 * DAY
        try:
            host: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(self._host))
        except ValueError:
            host = x509.DNSName(self._host)
        certificate = (
            self._builder(name, key.public_key(), now - 20 * DAY, end)
            .add_extension(x509.SubjectAlternativeName([host]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM) + self._certificate)

    def _builder(
        self, name: x509.Name, key: ec.EllipticCurvePublicKey, start: datetime, end: datetime
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(end)
        )
