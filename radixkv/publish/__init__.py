"""KV events over ZeroMQ: what an engine holds, said to whoever listens."""
