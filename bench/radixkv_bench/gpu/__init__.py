"""The checks that need an NVIDIA GPU."""
