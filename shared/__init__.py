"""The code that the twelve weeks build: each module's docstring opens with the week that promotes it."""

__version__ = "0.1.0"
