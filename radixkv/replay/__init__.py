"""Traces of requests, replayed against a cache of any size, and the best that any policy could do."""
