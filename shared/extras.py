"""Week 0. Packages of others that only a part of the library needs.

`pip install llm-weeks` brings what trains, loads, samples and quantizes; `pip install "llm-weeks[serve]"`
also what the extra `serve` of pyproject.toml lists.
"""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Inside, the import of a package that is not installed says which extra brings it.

        with needs("serve"):
            import fastapi

    Raises ModuleNotFoundError with that message.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{error.name} is not installed: pip install "llm-weeks[{extra}]"', name=error.name
        ) from None
