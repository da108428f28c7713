"""Real clients from the package indexes against a served process: what works with them as they are."""
