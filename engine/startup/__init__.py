"""From settings to a ready engine: find the model, load it, size the cache, put the parts together."""
