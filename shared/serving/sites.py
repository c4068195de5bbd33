"""Week 12. What other web sites may do through the browser of somebody who may use this server.

A page of any site can send requests to 127.0.0.1. Two rules of a browser keep it from the answers, and each
has its gap:

* a page reads only what comes from its own site. A site that has its name resolved to 127.0.0.1 once its page
  is loaded ("DNS rebinding": Jackson et al., 2007) makes this server part of its own site. But the browser
  still sends that name as `Host`;
* a server may allow more, by answers that repeat the page's `Origin`. This one does so for configured origins
  only.
"""

import ipaddress
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from shared.extras import needs

with needs("serve"):
    from starlette.types import Scope


class SiteRules:
    """Which `Host` and which `Origin` a request may have.

    hosts: names that are taken beside localhost and IP addresses, without a port. Names are checked only
    where there is no key (which no page can know), and either some are given or the request came in at a
    loopback address. origins: of pages that may use the API from another site, such as
    "https://chat.example.org". Raises ValueError for what is no name or no origin.
    """

    def __init__(self, hosts: Sequence[str], origins: Sequence[str], *, has_key: bool):
        for host in hosts:
            if _host_name(host) != host.lower():
                raise ValueError(
                    f"hosts: {host!r} is no host name: give one without a port, as in box.example.org"
                )
        for origin in origins:
            if not _is_origin(origin):
                raise ValueError(f"origins: {origin!r} is no origin: one looks like https://chat.example.org")
        self.origins = tuple(origins)
        self._hosts = {"localhost", *(host.lower() for host in hosts)}
        self._checks_all = bool(hosts)
        self._has_key = has_key

    def refusal(self, scope: Scope, headers: Mapping[bytes, bytes]) -> str | None:
        """Why a request is refused; None where it is not."""
        host = headers.get(b"host", b"").decode("latin-1")
        # A browser always names a host; probes that speak HTTP/1.0 may leave it out.
        if host and not self._has_key and not self._is_known(host) and self._checks(scope):
            return (
                f"a server without a key answers to localhost and IP addresses, and not to {host!r}: if that"
                " is its name, start it with --hosts NAME"
            )
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and origin not in self.origins and not _is_same_site(origin, host, headers):
            return (
                f"pages of {origin!r} may not use this server; if they should, start it with --origins ORIGIN"
            )
        return None

    def _checks(self, scope: Scope) -> bool:
        address, _ = scope.get("server") or ("", None)
        return self._checks_all or _is_loopback(address)

    def _is_known(self, host: str) -> bool:
        name = _host_name(host)
        return name is not None and (name in self._hosts or _ip_address(name) is not None)


def _is_same_site(origin: str, host: str, headers: Mapping[bytes, bytes]) -> bool:
    """Whether a request comes from a page of this server.

    A proxy may have changed the host. Then the browser's own word counts, which no page can forge.
    """
    if headers.get(b"sec-fetch-site") == b"same-origin":
        return True
    return origin.partition("://")[2].lower() == host.lower()


def _host_name(host: str) -> str | None:
    """The name or address in a `Host` header, in lower case; None where there is none."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _ip_address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _is_loopback(address: str) -> bool:
    found = _ip_address(address)
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped:
        found = found.ipv4_mapped
    return found is not None and found.is_loopback


def _is_origin(origin: str) -> bool:
    """Whether it is scheme://host or scheme://host:port, as browsers write it."""
    parts = urlsplit(origin)
    return bool(parts.scheme and parts.netloc) and origin == f"{parts.scheme}://{parts.netloc}".lower()
