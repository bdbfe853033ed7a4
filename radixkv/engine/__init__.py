"""When things run: requests, the scheduler, batches, the sampler, the engine and its sessions."""
