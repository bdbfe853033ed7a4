"""Which families of transformers the engine serves: each is tried with a small random model."""
