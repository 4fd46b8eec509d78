"""A worker process runs this file first, by its path: `python bootstrap.py PARENT COMMANDS REPLIES PAGE`.

The interpreter may be one that has neither this package nor anything else installed. So this file makes
`fiberpo_megatron` importable from the folder that it stands in, without the folder's siblings: whatever lies beside
the package in the trainer's interpreter stays invisible here. The arguments are the number of the process that
started the worker and three file descriptors. Every Python 3 has to understand this file, so that an old one can be
refused.
"""

import sys

if not getattr(sys.flags, "safe_path", False) and __name__ == "__main__":
    del sys.path[0]  # the folder of this file, whose names must not stand before those of the standard library

import os
import signal

MINIMUM = (3, 10)
PR_SET_PDEATHSIG = 1


def make_package_importable() -> None:
    """Import `fiberpo_megatron` from its folder. Also done in children that `multiprocessing` spawns."""
    from importlib.util import module_from_spec, spec_from_file_location

    if "fiberpo_megatron" in sys.modules:
        return
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    spec = spec_from_file_location(
        "fiberpo_megatron", os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
    )
    assert spec is not None and spec.loader is not None
    package = module_from_spec(spec)
    sys.modules["fiberpo_megatron"] = package
    spec.loader.exec_module(package)


def die_with(parent: int) -> None:
    """Ask the kernel to end this process with its parent; it counts the thread that started it as the parent."""
    if sys.platform.startswith("linux"):
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("process {}, which started this worker, is gone".format(parent))  # noqa: UP032


if sys.version_info < MINIMUM:
    sys.exit(
        "{} is Python {}.{}; the workers of environments need Python {}.{} or newer".format(  # noqa: UP032
            sys.executable, sys.version_info[0], sys.version_info[1], MINIMUM[0], MINIMUM[1]
        )
    )
make_package_importable()

if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    from fiberpo_megatron.environments.worker_main import main

    main(*map(int, sys.argv[2:5]))
