"""The environment of a command: its settings, and the stores that they name."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gateway.app import Stores
from gateway.logs import configure_logs
from gateway.settings import Settings, load_settings

STORES = ("redis_url", "database_url")


class CommandError(Exception):
    """A command could not do its work; the message is a sentence for the user."""


def command_settings(*required: str) -> Settings:
    """The settings, after logging is set up by them. `required` names those that must be set. Raises SettingsError."""
    settings = load_settings(os.environ, required)
    configure_logs(settings.log_format, settings.log_level)
    return settings


@asynccontextmanager
async def open_stores(settings: Settings | None = None, *, of_worker: bool = False) -> AsyncIterator[Stores]:
    """The stores of the settings (None: of the environment), closed at the end. Raises SettingsError."""
    stores = Stores(settings or command_settings(*STORES), of_worker=of_worker)
    try:
        yield stores
    finally:
        await stores.close()
