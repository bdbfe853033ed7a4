"""What the HTTP server costs and brings."""
