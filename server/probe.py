"""Whether the server in this container is healthy: `python -m kvloom.server.probe`, for images, which have no curl.

Asks /health at the address that the environment gives (KVLOOM_PORT, KVLOOM_SSL_CERTFILE). Exit code 0 if it answers 200, else 1
with one line.
"""

from __future__ import annotations

import http.client
import os
import ssl
import sys

SECONDS = 4


def main() -> int:
    """Returns the exit code."""
    given = os.environ.get("KVLOOM_PORT", "")
    port = int(given) if given.isdigit() else 8000  # Kubernetes may have set it for a Service of that name
    host = os.environ.get("KVLOOM_HOST") or "127.0.0.1"
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    connection: http.client.HTTPConnection
    if os.environ.get("KVLOOM_SSL_CERTFILE"):
        unchecked = ssl._create_unverified_context()  # the certificate names the outside's address, not this one
        connection = http.client.HTTPSConnection(address, port, timeout=SECONDS, context=unchecked)
    else:
        connection = http.client.HTTPConnection(address, port, timeout=SECONDS)
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        print(f"no answer from {address} port {port}: {error}", file=sys.stderr)
        return 1
    finally:
        connection.close()
    if status != 200:
        print(f"/health answers {status}", file=sys.stderr)
    return int(status != 200)


if __name__ == "__main__":
    sys.exit(main())
