"""Zeroconf: found with a real address under a lasting name, gone afterwards, and never a reason not to serve.

The zeroconf library is the real one, confined to the loopback interface, so that the tests need no network and
announce nothing in one.
"""

import asyncio
import logging
import re
import shutil
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest
from zeroconf import IPVersion, NotRunningException, ServiceListener, Zeroconf
from zeroconf.asyncio import AsyncZeroconf

from wyoming_qwen_asr.wyoming import discovery
from wyoming_qwen_asr.wyoming.discovery import SERVICE, Discovery

LAN = "192.0.2.7"
SECONDS = 30.0
"""A deadline that only a hang reaches."""

OnLoopback = partial(AsyncZeroconf, interfaces=["127.0.0.1"])


class Browser(ServiceListener):
    """What Home Assistant sees: the names of the instances, and at which addresses they are."""

    def __init__(self, zeroconf: AsyncZeroconf) -> None:
        self._zeroconf = zeroconf
        self._names: set[str] = set()
        self._changed = asyncio.Condition()
        self._notifying: set[asyncio.Task[None]] = set()

    def add_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        self._names.add(name)
        self._notify()

    def remove_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        self._names.discard(name)
        self._notify()

    def update_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        pass

    def _notify(self) -> None:
        async def notify() -> None:
            async with self._changed:
                self._changed.notify_all()

        self._notifying.add(asyncio.create_task(notify()))

    async def names(self, count: int) -> set[str]:
        """The names, as soon as there are so many."""
        async with asyncio.timeout(SECONDS), self._changed:
            await self._changed.wait_for(lambda: len(self._names) == count)
        return {name.removesuffix(f".{SERVICE}") for name in self._names}

    async def address(self, name: str) -> tuple[list[str], int | None]:
        info = await self._zeroconf.async_get_service_info(SERVICE, f"{name}.{SERVICE}")
        assert info
        return info.parsed_addresses(IPVersion.All), info.port


@pytest.fixture
async def browser(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Browser]:
    monkeypatch.setattr("zeroconf.asyncio.AsyncZeroconf", OnLoopback)
    async with OnLoopback() as zeroconf:
        browser = Browser(zeroconf)
        await zeroconf.async_add_service_listener(SERVICE, browser)
        yield browser


Announce = Callable[..., Discovery]


@pytest.fixture
async def announced() -> AsyncIterator[Announce]:
    """A Discovery that is taken back at the end of the test."""
    made: list[Discovery] = []

    def make(name: str, host: str, port: int, data_dir: Path) -> Discovery:
        made.append(Discovery(name, host, port, data_dir))
        return made[-1]

    yield make
    await asyncio.gather(*(each.unregister() for each in made))


@pytest.fixture
def no_zeroconf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that announces something."""

    monkeypatch.setattr("zeroconf.asyncio.AsyncZeroconf", Mock(side_effect=AssertionError("it is announced")))


async def test_found_and_gone(browser: Browser, announced: Announce, tmp_path: Path) -> None:
    """Under a name that a restart keeps; another port or installation has another one."""
    servers = [announced("kitchen", LAN, port, tmp_path / home) for port, home in ((1, "a"), (2, "a"), (1, "b"))]
    await asyncio.gather(*(server.register() for server in servers))
    names = await browser.names(3)
    assert all(re.fullmatch("kitchen-[0-9a-f]{8}-[12]", name) for name in names)
    for name in names:
        assert await browser.address(name) == ([LAN], int(name[-1]))

    await asyncio.gather(*(server.unregister() for server in servers))
    assert await browser.names(0) == set()

    await announced("kitchen", LAN, 1, tmp_path / "a").register()
    assert await browser.names(1) < names


async def test_a_copy_of_an_installation(browser: Browser, announced: Announce, tmp_path: Path) -> None:
    """Two machines made from one image are two servers, each with its own address."""
    first = announced("asr", LAN, 10300, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    await first.register()
    (name,) = await browser.names(1)
    await announced("asr", "192.0.2.8", 10300, tmp_path / "b").register()
    (other,) = await browser.names(2) - {name}
    assert await browser.address(name) == ([LAN], 10300)
    assert await browser.address(other) == (["192.0.2.8"], 10300)


@pytest.mark.parametrize("wildcard", ["0.0.0.0", "::", "0"])
async def test_a_wildcard_stands_for_the_address_of_the_network(wildcard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Home Assistant ignores 0.0.0.0. An IPv6 address of one's own is announced as it is."""
    monkeypatch.setattr(discovery, "_source_address", lambda: LAN)
    assert await discovery._addresses(wildcard) == [LAN]
    assert await discovery._addresses("2001:db8::7") == ["2001:db8::7"]


def test_the_address_of_the_network() -> None:
    """The real one is an address of this machine."""
    own = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    try:
        found = discovery._source_address()
    except OSError:
        pytest.skip("this machine has no network")
    assert found in own


async def test_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, no_zeroconf: None
) -> None:
    unreachable = OSError(101, "Network is unreachable")
    monkeypatch.setattr(discovery, "_source_address", Mock(side_effect=unreachable))
    await only_warns(Discovery("asr", "0.0.0.0", 10300, tmp_path), caplog, "Network is unreachable")


@pytest.mark.parametrize(
    ("error", "said"),
    [(OSError(19, "No such device"), "No such device"), (NotRunningException(), "NotRunningException")],
)
async def test_without_multicast(
    error: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("zeroconf.asyncio.AsyncZeroconf", Mock(side_effect=error))
    await only_warns(Discovery("asr", LAN, 10300, tmp_path), caplog, said)


async def test_a_network_that_goes_away(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Stopping the server then works all the same."""
    server = Discovery("asr", LAN, 10300, tmp_path)
    await server.register()
    close = AsyncZeroconf.async_close

    async def closed_in_vain(zeroconf: AsyncZeroconf) -> None:
        await close(zeroconf)
        raise OSError(101, "Network is unreachable")

    with monkeypatch.context() as patch:
        patch.setattr(AsyncZeroconf, "async_close", closed_in_vain)
        await server.unregister()
    assert "Network is unreachable" in caplog.text


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "fe80::1%1", "169.254.1.1"])
async def test_what_nobody_can_reach_is_not_announced(
    host: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, no_zeroconf: None
) -> None:
    await only_warns(Discovery("asr", host, 10300, tmp_path), caplog, f"{host} cannot be reached from the network")


async def test_a_bad_name_only_warns(browser: Browser, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What zeroconf itself objects to; settings let none of these through."""
    await only_warns(Discovery("x" * 64, LAN, 10300, tmp_path), caplog, "Too long")


async def only_warns(server: Discovery, caplog: pytest.LogCaptureFixture, said: str) -> None:
    with caplog.at_level(logging.INFO):
        await asyncio.wait_for(server.register(), SECONDS)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("Not announced by zeroconf: ")
    assert said in record.getMessage()
    await server.unregister()


@pytest.mark.parametrize("kept", [b"", b"\xff\xfe", b"a.b/c", b"0123456", b"01234567\nand more", b"../../../"])
def test_a_spoilt_id_is_replaced(kept: bytes, tmp_path: Path) -> None:
    (tmp_path / "instance-id").write_bytes(kept)
    new = discovery._machine_id(tmp_path)
    assert re.fullmatch("[0-9a-f]{8}", new)
    assert discovery._machine_id(tmp_path) == new


async def test_a_data_directory_that_cannot_be_written(
    browser: Browser,
    announced: Announce,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The host's name is stable too, and even with the longest names everything fits."""
    monkeypatch.setattr("socket.gethostname", lambda: "host-" * 12)
    (tmp_path / "file").touch()
    server = announced("n" * 40, LAN, 65535, tmp_path / "file")
    assert "cannot be used" in caplog.text
    await server.register()
    assert await browser.names(1) == {"n" * 40 + "-host-host-host-h-65535"}
