"""Structured output: what an answer must look like, compiled to a grammar, and kept to token by token.

options    what a request asks for: data that crosses processes
"""
