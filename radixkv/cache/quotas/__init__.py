"""Guaranteed shares of a cache: whose pages are whose, and who gives way to whom."""
