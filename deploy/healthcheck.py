"""Exit 0 when the server on this machine is ready, else 1 with the reason: the container's health check."""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request


def main() -> int:
    """Ask the server's readiness route once."""
    url = f"http://127.0.0.1:{os.environ.get('DELTASERVE_PORT', '8000')}/health/ready"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever HTTP_PROXY says
    try:
        with direct.open(url, timeout=5) as answer:
            return 0 if answer.status == 200 else 1
    except urllib.error.HTTPError as error:
        with error:
            print(error.read().decode(errors="replace"), file=sys.stderr)
    except OSError as error:
        print(f"{url}: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
