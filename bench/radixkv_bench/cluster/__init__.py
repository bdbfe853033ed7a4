"""Sessions over several replicas, of which one is killed and one is added."""
