"""Answers read as a checkpoint's own `response_template` says, which transformers 5 describes in "Response Parsing".

patterns   regular expressions of a checkpoint, bounded
values     what stands inside a region, from text to JSON
spec       the template, checked when a server starts
reader     one completion's text, region by region
"""
