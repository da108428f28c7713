"""Exit codes of the command line, so that scripts and supervisors can tell why it ended."""

from __future__ import annotations

FAILED = 1
"""What was asked for could not be done: no such model, a port in use, a damaged file."""
USAGE_ERROR = 2
"""The caller wrote something wrong: a flag, a value, a setting in a file."""
ENGINE_DIED = 70
"""The engine ended by itself, so that a supervisor starts the process again: EX_SOFTWARE of sysexits.h."""
INTERRUPTED = 130
"""Ctrl-C before there was anything to shut down, as shells count it."""
