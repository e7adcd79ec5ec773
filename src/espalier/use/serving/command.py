"""The command `espalier serve`: checks, loads, says what is served where, and serves until it is told to stop."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from espalier.errors import UsageError
from espalier.model.adapter_settings import CONFIG, read_json
from espalier.model.load_adapter import to_stderr
from espalier.use import vllm
from espalier.use.serving.options import LOOPBACK, ServeOptions, check_options

if TYPE_CHECKING:
    from espalier.use.serving.models import Served
    from espalier.use.serving.worker import Worker

# What a running answer is given to end after SIGTERM: less than the 10 s after which `docker stop` kills.
STOP_SECONDS = 8


def run_serve(options: ServeOptions) -> int:
    """Serve until SIGTERM (returns 0) or Ctrl-C (130). Raises UsageError, AdapterError, ModelError, TemplateError.

    The address is taken before the model is loaded, so that one in use costs no waiting.
    """
    folders = check_options(options)
    with _bound(options.host, options.port) as taken:
        from espalier.model.embedded import quiet_transformers
        from espalier.use.serving.models import load_served

        with quiet_transformers():
            served = load_served(
                folders, options.model_path, options.template, options.trust_remote_code, options.use_cpu
            )
        for line in greeting(served, options, taken.getsockname()[1]):
            to_stderr(line)
        return _serve(served, options, taken)


def greeting(served: Served, options: ServeOptions, port: int) -> list[str]:
    """What is said at the start: models, address, who may come in, and what to use for load."""
    host = f"[{options.host}]" if ":" in options.host else options.host
    key = "with the API key" if options.api_key else "without a key"
    lines = [
        f"models: {', '.join(served.layouts)}",
        f"one answer at a time, {options.max_queue} requests may wait; {options.max_new_tokens} tokens at most, "
        "the likeliest ones unless a request gives a temperature",
        *_vllm_lines(served),
    ]
    if options.host not in LOOPBACK and options.api_key is None:
        lines.append(f"warning: everyone who reaches {options.host} can use this server; --api_key asks for a key")
    return [*lines, f"serving on http://{host}:{port}/v1 ({key}); Ctrl-C stops"]


def _vllm_lines(served: Served) -> list[str]:
    settings = {name: read_json(folder / CONFIG) for name, folder in served.adapters.items()}
    refused = {name: reasons for name in settings if (reasons := vllm.refusals(settings[name]))}
    taken: dict[str, Path] = {name: folder for name, folder in served.adapters.items() if name not in refused}
    lines = [
        f"for load use vLLM, which does not take {name} as it is ({', '.join(reasons)}): espalier verify "
        f"{served.adapters[name]} says how"
        for name, reasons in refused.items()
    ]
    if taken:
        rank = max(vllm.largest_rank(settings[name]) for name in taken)
        command = vllm.command(str(served.base.path), taken, rank)
        lines.append(f"for load use vLLM: {command or f'espalier merge first (rank {rank} is over its largest)'}")
        if len({str(served.layouts[name].tokenizer.chat_template) for name in taken}) > 1:
            lines.append("(vLLM has one chat template a server: these adapters have several, so serve each alone)")
    return lines


def _bound(host: str, port: int) -> socket.socket:
    """A socket with the address, not listening yet. Raises UsageError where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family, kind, protocol)
        try:
            if os.name == "posix":  # elsewhere it would let two servers share a port
                taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(address)
            taken.listen()  # until then another server could still take the port
        except OSError:
            taken.close()
            raise
    except OSError as error:
        raise UsageError(
            f"{host}:{port} cannot be served on: {error.strerror or error}",
            where="--host, --port",
            todo="Another server may have the port. --port 0 takes one that is free.",
        ) from error
    return taken


def _serve(served: Served, options: ServeOptions, taken: socket.socket) -> int:
    from espalier.use.serving.worker import Worker

    worker = Worker(options.max_queue)
    # uvicorn stops on both signals and raises them again afterwards; this one is then done with.
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        make_server(served, options, worker, to_stderr).run(sockets=[taken])
    except KeyboardInterrupt:
        to_stderr("stopped")
        return 130
    finally:
        worker.close()
        signal.signal(signal.SIGTERM, before)
    to_stderr("stopped")
    return 0


def make_server(served: Served, options: ServeOptions, worker: Worker, log: Callable[[str], None]) -> Any:
    """A uvicorn.Server whose first signal lets the running answer end, and whose second ends it."""
    import uvicorn

    from espalier.use.serving.app import build_app
    from espalier.use.serving.gate import Gate

    class Server(uvicorn.Server):
        async def serve(self, sockets: list[socket.socket] | None = None) -> None:
            self.loop = asyncio.get_running_loop()
            await super().serve(sockets)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            seconds = 0 if self.should_exit else STOP_SECONDS
            log(f"stopping; the running answer has {seconds} s" if seconds else "stopping at once")
            self.loop.call_soon_threadsafe(worker.stop, seconds)
            super().handle_exit(sig, frame)

    app = build_app(served, worker, options.max_new_tokens)
    gate = Gate(app, options.api_key, options.host in LOOPBACK, log)
    return Server(
        uvicorn.Config(
            gate,
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=STOP_SECONDS + 2,
        )
    )
