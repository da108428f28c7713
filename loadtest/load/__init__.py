"""`kvloom bench serve`: a load test, from its command line to its files."""
