"""Sweeps over server settings: speed and quality of every combination, and which of them nothing else beats."""

from kvloom.loadtest.sweep.command import main

__all__ = ["main"]
