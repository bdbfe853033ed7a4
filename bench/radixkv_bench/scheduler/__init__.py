"""What the scheduler costs a step."""
