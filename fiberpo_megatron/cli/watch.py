"""Show runs on a local web page, from their folders alone: `fiberpo watch`."""

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    about = "show runs on a web page that follows them"
    parser = commands.add_parser(
        "watch", help=about, description=f"{about}, from their folders alone. See docs/watch.md"
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN_FOLDER")
    parser.add_argument("--port", type=int, metavar="P", help="port of the page; default 8420, or a free one")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="H",
        help="address to listen on; any but 127.0.0.1 puts a random token into the page's address",
    )
    parser.add_argument(
        "--token", action="store_true", help="ask for a token on 127.0.0.1 too, where other users could read the page"
    )


def run(options: argparse.Namespace) -> int:
    """Serve until somebody stops it; return 0."""
    try:
        from fiberpo_megatron.watch.server import serve
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise ValueError(f"`fiberpo watch` needs {error.name}: run `pip install 'fiberpo-megatron[watch]'`") from error
    serve(options.folders, options.host, options.port, ask_token=options.token)
    return 0
