"""Tiers below the pool: stores of pages."""
