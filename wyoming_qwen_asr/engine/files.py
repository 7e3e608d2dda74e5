"""The checkpoint on disk: a short-lived child finds it, or downloads it, and verifies it, before any model process."""

import asyncio
import logging
from collections.abc import Callable

from ..errors import AsrError, CheckpointError, ModelUnavailable, by_code
from ..events import BadEvent, Downloading, Failed, Located, from_event
from ..process import Child
from ..settings import Settings

RETRY_SECONDS = (10.0, 300.0)
"""First and longest wait before a failed download is tried again."""

_LOGGER = logging.getLogger(__name__)


class ModelFiles:
    """`locate` does the work; the rest tells how far it is."""

    def __init__(self, settings: Settings, refuse: Callable[[AsrError], None]) -> None:
        self._settings = settings
        self._refuse = refuse
        """Told when audio that waits for the files would wait for too long."""
        self._downloaded: Downloading | None = None
        self._error: AsrError | None = None
        self.located: Located | None = None

    @property
    def state(self) -> str:
        """What goes on until `located` is set."""
        return "downloading" if self._downloaded or self._error else "checking"

    @property
    def progress(self) -> float | None:
        """Fraction of the download, 0 to 1."""
        if self.located or not self._downloaded:
            return None
        return self._downloaded.done / max(self._downloaded.total, 1)

    def check(self) -> None:
        """Raises AsrError when audio would have to wait for a download. A check of local files takes a second: that
        is waited for."""
        if self.located:
            return
        if self._error:
            raise self._error
        if self.progress is not None:
            raise ModelUnavailable(f"the model is being downloaded, {self.progress:.0%}")

    async def locate(self) -> Located:
        """The checkpoint, once it is complete on disk; a download that fails is tried again for ever.
        Raises CheckpointError when that cannot help."""
        wait, longest = RETRY_SECONDS
        while True:
            try:
                self.located = await self._fetch()
            except AsrError as error:
                self._error = ModelUnavailable(str(error))
                self._refuse(self._error)
                if isinstance(error, CheckpointError):
                    raise
                _LOGGER.warning("%s; trying again in %.0f s", error, wait)
                await asyncio.sleep(wait)
                wait = min(2 * wait, longest)
            else:
                return self.located

    async def _fetch(self) -> Located:
        settings = self._settings
        child = await Child.spawn(
            "wyoming_qwen_asr.model.fetch",
            *(f"--model={settings.model}", f"--device={settings.device}", f"--data-dir={settings.data_dir}"),
            f"--log-level={settings.log_level}",
        )
        shown = -1
        try:
            async for event in child.events():
                message, _ = from_event(event)
                match message:
                    case Downloading():
                        if not self._downloaded:
                            self._refuse(ModelUnavailable("the model is being downloaded"))
                        self._downloaded, self._error = message, None
                        if (tenth := 10 * message.done // max(message.total, 1)) > shown:
                            shown = tenth
                            _LOGGER.info("Downloading the model: %d %% of %.1f GB", 10 * tenth, message.total / 1e9)
                    case Located():
                        return message
                    case Failed():
                        raise by_code(message.code)(message.message)
        except BadEvent as error:
            _LOGGER.error("Checking the model's files: %s", error)
        finally:
            await child.stop()
        raise ModelUnavailable("checking the model's files failed")
