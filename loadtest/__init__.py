"""Measuring servers: the demo, and side-by-side runs against peers."""
