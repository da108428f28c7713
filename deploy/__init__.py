"""Many engines behind one HTTP side: Ray Serve, the router of prompts, and a simulator of both. Nothing here is imported
without `--replicas`."""
