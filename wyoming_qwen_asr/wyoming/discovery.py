"""Home Assistant finds the server by itself: `_wyoming._tcp.local.` over multicast DNS.

Home Assistant reads no TXT properties; it takes the address, asks `describe`, and remembers the server by the name of
the instance, which therefore stays the same across restarts and differs from every other server's.
"""

import ipaddress
import logging
import secrets
import socket
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

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
        self._info: AsyncServiceInfo | None = None

    async def register(self) -> None:
        from zeroconf import Error
        from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

        try:
            addresses = _addresses(self._host)
            if not addresses:
                _LOGGER.warning("Not announced by zeroconf: %s cannot be reached from the network", self._host)
                return
            self._zeroconf = AsyncZeroconf()
            self._info = AsyncServiceInfo(
                SERVICE, f"{self._instance}.{SERVICE}", port=self._port, parsed_addresses=addresses
            )
            await self._zeroconf.async_register_service(self._info, allow_name_change=True)
            _LOGGER.info("Announced by zeroconf as %s at %s", self._info.name, ", ".join(addresses))
        except (OSError, Error) as error:
            _LOGGER.warning("Not announced by zeroconf: %s", error or type(error).__name__)
            await self.unregister()

    async def unregister(self) -> None:
        if self._zeroconf:
            if self._info:
                await self._zeroconf.async_unregister_service(self._info)
            await self._zeroconf.async_close()
        self._zeroconf = self._info = None


def _addresses(host: str) -> list[str]:
    """Addresses at which others reach a server bound to `host`. Home Assistant drops 0.0.0.0, so a wildcard stands for
    the address that multicast leaves from. Raises OSError when there is no network."""
    if host in ("0.0.0.0", "::", ""):  # noqa: S104
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((_MDNS_GROUP, 5353))
            found = [probe.getsockname()[0]]
    else:
        found = [str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    addresses = [ipaddress.ip_address(address.partition("%")[0]) for address in dict.fromkeys(found)]
    return [str(a) for a in addresses if not (a.is_loopback or a.is_link_local or a.is_unspecified)]


def _machine_id(data_dir: Path) -> str:
    """Eight hex digits that belong to this installation, kept in the data directory."""
    path = data_dir / "instance-id"
    try:
        return path.read_text().strip()[:8] or _new_id(path)
    except FileNotFoundError:
        return _new_id(path)
    except OSError as error:
        _LOGGER.warning("No instance id: %s", error)
        return socket.gethostname()[:20]


def _new_id(path: Path) -> str:
    """A fresh one. Where it cannot be kept, the host's name is at least stable."""
    new = secrets.token_hex(4)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(new)
    except OSError as error:
        _LOGGER.warning("The data directory cannot be written, so the zeroconf name is the host's: %s", error)
        return socket.gethostname()[:20]
    return new
