"""Many replicas, one cache in effect: who holds which prefix, and where a request should go."""
