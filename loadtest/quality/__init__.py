"""Quality beside speed: how far an approximate engine is from the exact one, on real text."""
