"""A fuzzer of the engine, in one process: `python -m kvloom.loadtest.fuzz`, or `make fuzz`."""
