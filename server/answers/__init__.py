"""What a model writes, read as it comes: thoughts, content and tool calls."""
