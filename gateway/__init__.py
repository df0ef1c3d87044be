"""The application: HTTP, agents, LangGraph, the browser widget. `app.py` builds it, `cli.py` starts it."""

__version__ = "0.2.0"
