"""Start the page: `python -m app`, or `python app/main.py` as a Space does.

The worker is started before Gradio is imported, so that the first model loads while the page is being built.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from app.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "MALLOC_ARENA_MAX": "2"}
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Environment of the page process: clustering 4096 points takes 20 ms on one thread, but 500 ms on several."""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m app", description="Quantscope: explore LLM quantisation in the browser.")
    parser.add_argument(
        "--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), help="address to listen on (default 127.0.0.1)"
    )
    parser.add_argument(
        "--port", type=int, default=None, help="port (default: GRADIO_SERVER_PORT, else the first free one from 7860)"
    )
    parser.add_argument("--model", default=None, help="model the page opens on: a catalogue name, a Hub id or a folder")
    return parser.parse_args(argv)


def launch(argv: Sequence[str] | None = None) -> None:
    """Serve the page until interrupted."""
    chosen = arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s: %(message)s")
    from app.settings import Settings
    from core.errors import InputError

    try:
        settings = Settings.read(model=chosen.model)
    except InputError as error:
        sys.stderr.write(f"error {error.code}: {error}\n")
        raise SystemExit(2) from None
    check_address(chosen.host, chosen.port)
    os.environ.update(QUIET | ONE_THREAD)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM cleans up like Ctrl-C
    with tempfile.TemporaryDirectory(prefix="quantscope-") as private:
        os.environ["GRADIO_TEMP_DIR"] = private
        serve(settings, chosen.host, chosen.port)


def check_address(host: str, port: int | None) -> None:
    """Check before a model is loaded that the page can listen there. Exits with code 2 and one sentence if it cannot."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port or 0))
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else "ports are 0 to 65535"
        place = f"{host[:60]}, port {port}" if port else host[:60]
        sys.stderr.write(f"error E-PARAM-PORT: The page cannot listen at {place} ({reason}): give others by --host and --port.\n")
        raise SystemExit(2) from None


def serve(settings: Settings, host: str, port: int | None) -> None:
    """Start the worker, build the page, and listen."""
    from app.context import start

    ctx = start(settings)
    try:
        from app.door import install
        from app.page import build_app
        from app.view.chart import PRELOAD
        from app.view.look import stylesheet, theme

        demo = build_app(ctx)
        host = "0.0.0.0" if settings.on_space else host  # noqa: S104 - a Space is reached from outside its container
        limits = install.limits(settings, host, demo, ctx.heartbeats)
        demo.queue(api_open=False)
        demo.launch(
            server_name=host,
            server_port=port,
            share=False,
            show_error=False,
            max_file_size=settings.file_bytes,
            allowed_paths=[],
            blocked_paths=blocked_paths(),
            enable_monitoring=False,
            run_history=False,
            strict_cors=True,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            footer_links=["api"],
            quiet=True,
            prevent_thread_lock=True,
            theme=theme(),
            css=stylesheet(),
            head=PRELOAD,
            app_kwargs={"openapi_url": None, "lifespan": install.gated(limits, ctx.serving)},
        )
        install.guard(demo.server, settings)
        print(f"Quantscope is at {demo.local_url}", flush=True)  # noqa: T201 - the address is for the user
        demo.block_thread()
    finally:
        ctx.workers.close()


def blocked_paths() -> list[str]:
    """List the folders whose files may never be served; not the whole checkout, which may hold an environment."""
    private = [ROOT / name for name in ("app", "core", "kernels", "tests", "docs", ".git")]
    system = [Path("/proc"), Path("/etc"), Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))]
    return [str(place) for place in (*private, *system) if place.exists()]


if __name__ == "__main__":
    launch()
