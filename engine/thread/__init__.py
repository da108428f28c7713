"""An engine on a thread of this process, as `client.EngineClient`."""
