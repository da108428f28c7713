"""Speed without a load of one's own: the engine alone, servers side by side, floods."""
