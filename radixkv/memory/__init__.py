"""The bytes: where keys and values lie, and how many of them a model needs."""
