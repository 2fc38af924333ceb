"""Telling an address: signed as OpenAI signs, sent once, to where the operator allows.

The signature is that of Standard Webhooks: HMAC-SHA256 over ``id.timestamp.body``, which ``client.webhooks.unwrap`` of
the ``openai`` package checks.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import random
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import httpx

import luthier
from luthier.errors import InputError

SECRET_PREFIX = "whsec_"  # noqa: S105 - the part of a secret that is none
FIRST_DELAY_SECONDS = 5.0
LONGEST_DELAY_SECONDS = 7200.0
MAX_ATTEMPTS = 15  # over about nine hours
TIMEOUT_SECONDS = 15.0
MAX_PORT = 65535
Targets = Literal["any", "public"]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Attempt:
    """What came of one attempt: the status of the answer, or why there was none."""

    status_code: int | None = None
    error: str | None = None

    @property
    def succeeded(self) -> bool:
        """Whether the address took it."""
        return self.status_code is not None and 200 <= self.status_code < 300


def secret_text(secret: bytes) -> str:
    """Return a secret as its receiver is given it."""
    return SECRET_PREFIX + base64.b64encode(secret).decode()


def signed_headers(secrets: Sequence[bytes], id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """Return the headers of a message, with a signature for each secret that its receiver may still use."""
    signatures = (hmac.digest(secret, f"{id}.{timestamp}.".encode() + body, hashlib.sha256) for secret in secrets)
    return {
        "content-type": "application/json",
        "user-agent": f"Luthier/{luthier.__version__}",
        "webhook-id": id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(f"v1,{base64.b64encode(signature).decode()}" for signature in signatures),
    }


def delay_seconds(attempts: int) -> float:
    """Return how long to wait after so many failed attempts: twice as long each time, scattered by a fifth."""
    delay = min(LONGEST_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2.0 ** (attempts - 1))
    return delay * random.uniform(0.8, 1.2)  # noqa: S311 - scatters, protects nothing


def check_address(url: str) -> httpx.URL:
    """Return an address that can be told something.

    Raises:
        InputError: it is no http or https address, it has a user or a fragment in it, or it is one that is never told.
    """
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise InputError(f"url: {url!r} is not an address ({error}).") from error
    if parsed.scheme not in ("http", "https") or not parsed.host or (parsed.port or 1) > MAX_PORT:
        raise InputError(f"url: {url!r} is not an http or https address.")
    if parsed.userinfo or parsed.fragment:
        raise InputError("url: an address has no user, password or fragment in it.")
    try:
        never = _is_nobodys(ipaddress.ip_address(parsed.host))
    except ValueError:  # a name, which is looked at when it is resolved
        never = False
    if never:
        raise InputError(f"url: {parsed.host} is link-local or no host's address, which is never told anything.")
    return parsed


class Sender:
    """Sends messages; belongs to one event loop.

    A name is resolved once and the connection goes to exactly the address that was looked at, so that a name cannot
    mean something else a moment later. Redirects are not followed, proxies not used, answers not read.

    Args:
        targets: "any" lets messages go everywhere but to link-local addresses (where clouds keep credentials) and those
            that are no host's; "public" also keeps them out of private networks and this machine.
        timeout_seconds: How long an attempt may take in all.
    """

    def __init__(self, targets: Targets = "any", timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self._targets = targets
        self._timeout_seconds = timeout_seconds
        # Without kept connections: one to an address belongs to a single name.
        self._client = httpx.AsyncClient(
            verify=ssl.create_default_context(),
            trust_env=False,
            timeout=timeout_seconds,
            limits=httpx.Limits(max_keepalive_connections=0),
        )

    async def send(self, url: str, headers: dict[str, str], body: bytes) -> Attempt:
        """Post a message once; whatever goes wrong is the attempt's error."""
        try:
            async with asyncio.timeout(self._timeout_seconds):
                address = check_address(url)
                host = address.host
                target = address.copy_with(host=await self._resolve(host, address.port or address.scheme))
                named = headers | {"host": address.netloc.decode()}
                request = self._client.build_request(
                    "POST", target, headers=named, content=body, extensions={"sni_hostname": host}
                )
                response = await self._client.send(request, stream=True)
                await response.aclose()
        except TimeoutError:
            return Attempt(error=f"no answer within {self._timeout_seconds:g} seconds")
        except (httpx.HTTPError, InputError, OSError) as error:
            return Attempt(error=str(error) or type(error).__name__)
        return Attempt(response.status_code)

    async def close(self) -> None:
        """End all connections."""
        await self._client.aclose()

    async def _resolve(self, host: str, port: int | str) -> str:
        """Return an address of a host that may be told.

        Raises:
            InputError: none may.
            OSError: the name is not known.
        """
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(entry[4][0]) for entry in found]
        allowed = [address for address in addresses if self._may_reach(address)]
        if not allowed:
            setting = " (LUTHIER_WEBHOOK_TARGETS=public)" if self._targets == "public" else ""
            raise InputError(f"the address {addresses[0]} of {host} may not be told{setting}")
        return allowed[0]

    def _may_reach(self, text: str) -> bool:
        address = ipaddress.ip_address(text)
        return not _is_nobodys(address) and (self._targets == "any" or _embedded(address).is_global)


def _is_nobodys(address: Address) -> bool:
    """Return whether an address is link-local (where clouds keep credentials) or no single host's."""
    address = _embedded(address)
    return address.is_link_local or address.is_multicast or address.is_unspecified


def _embedded(address: Address) -> Address:
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
