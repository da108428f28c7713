"""The load client: requests, when they are sent, and what came of them; servers that are started or looked at."""
