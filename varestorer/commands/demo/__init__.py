"""`varestorer demo`: a page in the browser to drop photographs into."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from contextlib import suppress
from pathlib import Path
from threading import Event

from varestorer.commands.entry import OK, Command, say
from varestorer.commands.options import DemoOptions
from varestorer.utils.errors import UserError, reason

# read by gradio when it is imported; it tells nobody that it was started
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}


def demo(options: DemoOptions) -> int:
    """Serve the page until Ctrl-C.

    UserError: gradio is not installed, the checkpoint cannot be used, or the port is taken.
    """
    with tempfile.TemporaryDirectory(prefix="varestorer-demo-", ignore_cleanup_errors=True) as folder:
        os.environ |= QUIET | {"GRADIO_TEMP_DIR": str(Path(folder, "page"))}
        try:
            from varestorer.commands.demo.page import Page
        except ImportError as error:
            raise UserError(f'the page needs gradio 6: pip install "varestorer[demo]" ({reason(error)})') from error
        from varestorer.commands.demo.studio import Studio

        page = Page(Studio(options, Path(folder)))
        logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio looks whether its own page is there
        for number in (signal.SIGTERM, signal.SIGINT):  # background jobs ignore the second; the folder must go
            signal.signal(number, signal.default_int_handler)
        address = page.serve()
        say(f"the page is at {address}{'' if page.is_local else ', for all who reach it'}; Ctrl-C ends it")
        with suppress(KeyboardInterrupt):
            Event().wait()
        page.blocks.close(verbose=False)
    return OK


COMMAND = Command("demo", demo, DemoOptions)
