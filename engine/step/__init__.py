"""One step: rows and what they see, attention, the run, tokens drawn, text."""
