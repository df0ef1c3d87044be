"""The HTTP routes by noun. Each handler parses, calls one thing, renders."""
