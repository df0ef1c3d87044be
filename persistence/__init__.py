"""The state of the gateway: the Redis layer, the outbox, Postgres.

Knows nothing of HTTP or LangGraph. `gateway` imports this package, never the other way.
"""
