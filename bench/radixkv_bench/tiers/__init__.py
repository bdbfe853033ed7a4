"""What tiers below the pool bring, and what they cost."""
