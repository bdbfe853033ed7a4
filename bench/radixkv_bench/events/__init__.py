"""What KV events cost, whether they tell the truth, and how fast the index of replicas answers."""
