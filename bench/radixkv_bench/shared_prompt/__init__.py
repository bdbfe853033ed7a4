"""Prompts that share prefixes: radixkv with and without its cache, and Hugging Face's generate."""
