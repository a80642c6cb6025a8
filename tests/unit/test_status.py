"""What `noxctl status` reads on a host: a certificate's end, as openssl reads it, too."""

from __future__ import annotations

import calendar
import ssl
import subprocess
import time
from pathlib import Path

import pytest
from ansible_collections.nox.platform.plugins.module_utils import host_status


@pytest.mark.parametrize("days", [1, 397, 3650, 12000])  # the last one ends after 2050, and is written another way
@pytest.mark.parametrize("key", ["ec", "rsa"])
def test_when_a_certificate_ends(tmp_path: Path, days: int, key: str) -> None:
    words = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"] if key == "ec" else ["-newkey", "rsa:2048"]
    place = tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-nodes", *words, "-keyout", tmp_path / "key.pem", "-out", place]
        + ["-days", str(days), "-subj", "/CN=nox 0\x17\r", "-addext", "subjectAltName=IP:10.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    told = subprocess.run(["openssl", "x509", "-in", place, "-noout", "-enddate"], capture_output=True, text=True)
    expected = calendar.timegm(time.strptime(told.stdout.strip().partition("=")[2], "%b %d %H:%M:%S %Y GMT"))
    assert host_status.end_of(ssl.PEM_cert_to_DER_cert(place.read_text())) == expected


def test_what_is_no_certificate() -> None:
    assert host_status.end_of(b"") is None
    assert host_status.end_of(b"\x30\x1e\x17\x0d250101000000Z") is None
