"""Fixtures of fake wheels and a fake index."""

from fakes.wheel_fixtures import cache, index, tables, wheels  # noqa: F401
