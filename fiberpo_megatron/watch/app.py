"""This module joins the page, what it asks for, and the guard in front of both."""

from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from fiberpo_megatron.watch import api, trajectories
from fiberpo_megatron.watch.following import FollowedRun, Follower
from fiberpo_megatron.watch.guard import LOOPBACK, Guard

STATIC = Path(__file__).parent / "static"


def application(
    folders: Mapping[str, Path], *, hosts: Collection[str] = LOOPBACK, token: str = "", follow: bool = True
) -> ASGIApp:
    """Return the application that shows some run folders.

    Args:
        folders: the run folder of each key; a key is part of addresses.
        hosts: names by which the server may be asked for (`guard.Guard`).
        token: first part of every address; an empty one asks for none.
        follow: whether a thread reads what is new while the application runs. Without it the metrics are those of now.
    """
    runs = {key: FollowedRun(folder) for key, folder in folders.items()}
    follower = Follower(runs.values())

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        follower.start()
        try:
            yield
        finally:
            follower.close()

    if not follow:
        for run in runs.values():
            run.read_all()
    app = Starlette(
        routes=[
            *api.routes(runs),
            *trajectories.routes(folders),
            Mount("/", StaticFiles(directory=STATIC, html=True), name="static"),
        ],
        lifespan=lifespan if follow else None,
    )
    app.add_middleware(GZipMiddleware, minimum_size=2000)
    return Guard(app, hosts, token)
