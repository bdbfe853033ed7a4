"""Decode steps of whole models, against the time to read weights and KV."""
