"""Request bodies: every field checked and every integer bounded before the engine sees it."""
