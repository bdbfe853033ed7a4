"""Which replicas hold which prefix."""
