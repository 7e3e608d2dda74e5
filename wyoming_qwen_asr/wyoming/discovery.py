"""Home Assistant finds the server by itself: `_wyoming._tcp.local.` over multicast DNS.

Home Assistant reads no TXT properties; it takes the address, asks `describe`, and remembers the server by the name of
the instance, which therefore stays the same across restarts and differs from every other server's.
"""

import asyncio
import ipaddress
import logging
import re
import secrets
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zeroconf.asyncio import AsyncZeroconf

SERVICE = "_wyoming._tcp.local."

_MDNS_GROUP = "224.0.0.251"

_LOGGER = logging.getLogger(__name__)


class Discovery:
    """One advertisement; `register` and `unregister`. Without a network both only warn."""

    def __init__(self, name: str, host: str, port: int, data_dir: Path) -> None:
        self._instance = f"{name}-{_machine_id(data_dir)}-{port}"
        self._host = host
        self._port = port
        self._zeroconf: AsyncZeroconf | None = None
        self._announcing: asyncio.Future[Any] | None = None

    async def register(self) -> None:
        from zeroconf import Error
        from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

        try:
            addresses = await _addresses(self._host)
            if not addresses:
                _LOGGER.warning("Not announced by zeroconf: %s cannot be reached from the network", self._host)
                return
            self._zeroconf = AsyncZeroconf()
            info = AsyncServiceInfo(
                SERVICE,
                f"{self._instance}.{SERVICE}",
                port=self._port,
                parsed_addresses=addresses,
                server=f"{secrets.token_hex(8)}.local.",  # else two of the same name would share their addresses
            )
            announcing = await self._zeroconf.async_register_service(info, allow_name_change=True)
            self._announcing = asyncio.ensure_future(announcing)
            _LOGGER.info("Announced by zeroconf as %s at %s", info.name, ", ".join(addresses))
        except (OSError, Error) as error:
            _LOGGER.warning("Not announced by zeroconf: %s", str(error) or type(error).__name__)
            await self.unregister()

    async def unregister(self) -> None:
        """Say goodbye, so that nobody finds what is gone. Safe to call again."""
        zeroconf, self._zeroconf = self._zeroconf, None
        if self._announcing:
            self._announcing.cancel()
        if zeroconf:
            try:
                await zeroconf.async_close()
            except OSError as error:
                _LOGGER.warning("Zeroconf: %s", error)


async def _addresses(host: str) -> list[str]:
    """Addresses at which others reach a server bound to `host`. Home Assistant drops 0.0.0.0, so a wildcard stands for
    the address that multicast leaves from. Raises OSError when there is no network."""
    resolved = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    found = {ipaddress.ip_address(str(address[0]).partition("%")[0]): None for *_, address in resolved}
    if any(address.is_unspecified for address in found):
        found = {ipaddress.ip_address(_source_address()): None}
    return [str(a) for a in found if not (a.is_loopback or a.is_link_local or a.is_unspecified)]


def _source_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((_MDNS_GROUP, 5353))
        return str(probe.getsockname()[0])


def _machine_id(data_dir: Path) -> str:
    """Eight hex digits that belong to this installation, kept in the data directory. Where they cannot be kept, the
    host's name is at least stable."""
    path = data_dir / "instance-id"
    try:
        kept = path.read_bytes().strip() if path.exists() else b""
        if not re.fullmatch(rb"[0-9a-f]{8}", kept):
            kept = secrets.token_hex(4).encode()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(kept)
    except OSError as error:
        _LOGGER.warning("The data directory cannot be used, so the zeroconf name is the host's: %s", error)
        return socket.gethostname()[:16]
    return kept.decode()
