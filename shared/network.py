"""Week 0. What a library's errors say of the network, in words for people."""

import re

NETWORK_FAILURES = {
    r"ProxyError|Cannot connect to proxy|Tunnel connection failed": (
        "the proxy does not answer, or refuses (look at HTTPS_PROXY)"
    ),
    r"SSL|CERTIFICATE|certificate": (
        "TLS failed, so nothing was sent (look at the clock; behind a proxy that opens TLS, set SSL_CERT_FILE"
        " and REQUESTS_CA_BUNDLE to its certificate)"
    ),
    r"NameResolution|getaddrinfo|[Nn]ame or service not known|name resolution|No address associated": (
        "its name is not found (DNS: is there a network?)"
    ),
    r"[Tt]imed? ?out": "no answer in time",
    r"ConnectionError|ConnectError|NewConnection|Connection (refused|reset|aborted)|unreachable": (
        "no connection"
    ),
}
"""What a library's errors say, and what that means; the first that is found counts."""


def network_failure(error: BaseException | str) -> str | None:
    """What kept a program from a server, in a few words: proxy, TLS, DNS, no answer, no connection.

    error: what a library raised, or what a program wrote. None where it says none of these.
    """
    said = []
    cause = error
    while isinstance(cause, BaseException):
        said.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__ or cause.__context__ or ""
    words = " ".join(said) if said else str(error)
    for pattern, meaning in NETWORK_FAILURES.items():
        if re.search(pattern, words):
            return meaning
    return None
