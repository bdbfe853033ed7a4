"""Listens to the KV events of replicas and keeps an index of what they hold."""
