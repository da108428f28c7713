"""Beside `config`: names of before, YAML, folders."""
