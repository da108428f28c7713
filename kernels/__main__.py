"""`python -m kvloom.kernels`: readies the C++ library of this machine, so that no start waits for a compiler.

Says which it is and which back end will serve, and so if there is none and no compiler.
"""

from __future__ import annotations

import sys
import time

from kvloom.kernels import load


def _say(text: str) -> None:
    print(f"kernels: {text}", flush=True)


def main() -> int:
    """Prepare what `auto` picks; returns 0, or 2 if $KVLOOM_NATIVE names what cannot run here."""
    start = time.perf_counter()
    try:
        made = load("native", progress=lambda stage, done, total: _say(f"{stage}: {done} of {total} files"))
        _say(f"native ({made.build}) ready in {time.perf_counter() - start:.0f} s")
        _say(made.paths)
    except ValueError as error:  # of what $KVLOOM_NATIVE names
        _say(str(error))
        return 2
    except Exception as error:  # no compiler, or one that fails: the next back end serves instead
        _say(f"native not available: {error}")
    _say(f"using {load().name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
