"""The radix tree: nodes, the queue of leaves, and the checks that prove it."""
