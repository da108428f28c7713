"""HTTPS: the certificate is read again when its files change, and a pair that does not fit changes nothing."""

import http.client
import os
import re
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trustme

from kvloom.server.certificate import Certificate, context_of

SCRIPT = Path(__file__).with_name("fake_process.py")


class Pair:
    """A certificate of its own authority, for 127.0.0.1."""

    def __init__(self):
        self.authority = trustme.CA()
        made = self.authority.issue_cert("127.0.0.1", "localhost")
        self.chain = b"".join(blob.bytes() for blob in made.cert_chain_pems)
        self.key = made.private_key_pem.bytes()

    def trusting(self):
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        return context


@pytest.fixture(scope="module")
def pairs():
    return Pair(), Pair()


@pytest.fixture
def files(tmp_path, pairs):
    """Paths of the certificate and of its key, with the first pair in them."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_bytes(pairs[0].chain)
    key.write_bytes(pairs[0].key)
    return cert, key


def presented(context, pair):
    """Whether a handshake with the listening context shows this pair's certificate; without sockets."""
    server_in, server_out, client_in, client_out = (ssl.MemoryBIO() for _ in range(4))
    server = context.wrap_bio(server_in, server_out, server_side=True)
    client = pair.trusting().wrap_bio(client_in, client_out, server_hostname="127.0.0.1")
    for _ in range(10):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError:
                return False
            server_in.write(client_out.read())
            client_in.write(server_out.read())
    return client.getpeercert() is not None


def test_files_are_read_once_they_rest_and_only_if_they_fit(files, pairs, caplog):
    caplog.set_level("INFO", "kvloom.server")
    now = [0.0]
    context = context_of(*map(str, files))
    certificate = Certificate(context, *map(str, files), clock=lambda: now[0])
    first, second = pairs

    def look(times):
        for _ in range(times):
            now[0] += 1.0
            certificate.look()

    look(3)
    assert presented(context, first) and not presented(context, second) and not caplog.messages
    files[0].write_bytes(second.chain)  # its key is still to come
    look(1)
    assert not caplog.messages, "it may still be written"
    look(5)
    (line,) = caplog.messages
    assert "cannot be used" in line and "the one before is kept" in line and caplog.records[0].levelname == "ERROR"
    assert presented(context, first) and not presented(context, second)
    files[1].write_bytes(second.key)
    look(2)
    assert presented(context, second) and not presented(context, first)
    files[0].unlink()
    look(5)
    assert presented(context, second) and [record.levelname for record in caplog.records] == ["ERROR", "INFO", "ERROR"]


def test_a_folder_that_is_swapped_by_its_link_is_a_change(tmp_path, pairs):
    """As secrets are mounted by Kubernetes."""
    for name, pair in zip("ab", pairs):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "cert.pem").write_bytes(pair.chain)
        (folder / "key.pem").write_bytes(pair.key)
    link = tmp_path / "link"
    link.symlink_to("a")
    names = str(link / "cert.pem"), str(link / "key.pem")
    now = [0.0]
    context = context_of(*names)
    certificate = Certificate(context, *names, clock=lambda: now[0])
    (tmp_path / "new").symlink_to("b")
    os.replace(tmp_path / "new", link)
    for now[0] in (1.0, 2.0):
        certificate.look()
    assert presented(context, pairs[1])


def test_a_server_goes_on_with_the_new_certificate(files, pairs):
    """Over real sockets; a connection that was open before is not cut."""
    flags = ["--ssl-certfile", str(files[0]), "--ssl-keyfile", str(files[1])]
    process = subprocess.Popen([sys.executable, str(SCRIPT), "0", "--port", "0", *flags], stderr=subprocess.PIPE, text=True)
    try:
        shown = ""
        while not (found := re.search(r"https://127\.0\.0\.1:(\d+)", shown)):
            line = process.stderr.readline()
            assert line, shown
            shown += line
        port = int(found[1])

        def connect(pair, name="127.0.0.1"):
            connection = http.client.HTTPSConnection(name, port, context=pair.trusting(), timeout=10)
            connection.request("GET", "/health")
            assert connection.getresponse().read() == b""
            return connection

        old = connect(pairs[0])
        with pytest.raises(ssl.SSLCertVerificationError):
            connect(pairs[1])
        files[0].write_bytes(pairs[1].chain)
        files[1].write_bytes(pairs[1].key)
        end = time.monotonic() + 30
        while True:
            try:
                connect(pairs[1]).close()
                break
            except ssl.SSLCertVerificationError:
                assert time.monotonic() < end, "the new certificate is not served"
                time.sleep(0.1)
        connect(pairs[1], "localhost").close()
        with pytest.raises(ssl.SSLCertVerificationError):
            connect(pairs[0])
        old.request("GET", "/version")
        assert old.getresponse().status == 200
        old.close()
        with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
            plain.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert not plain.recv(10).startswith(b"HTTP")
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.stderr.close()
