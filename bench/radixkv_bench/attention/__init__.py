"""One layer's attention over paged KV, against the machine's limits."""
