"""Kernels: attention over paged KV. Installed as `radixkv.kernels`; imports nothing of radixkv."""
