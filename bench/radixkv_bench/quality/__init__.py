"""The quality that quantised KV costs."""
