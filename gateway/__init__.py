"""The application: HTTP, agents, LangGraph, the browser widget. `app.py` builds it, `cli.py` starts it."""
