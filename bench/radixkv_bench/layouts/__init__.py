"""Ways to lay KV out in memory: their bytes, copies and speed."""
