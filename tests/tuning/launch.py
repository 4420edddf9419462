"""Runs a script in several gloo processes, as torchrun would."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def launch(script: str, folder: Path, *, size: int = 2, seconds: float = 400) -> list[str]:
    """Standard output of every process; fails if one of them does.

    ``script`` is Python source; it finds its folder in ``sys.argv[1]``.
    """
    file = folder / "script.py"
    file.write_text(script)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    common = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": paths,
    }
    running = [
        subprocess.Popen(
            [sys.executable, str(file), str(folder)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        done = [process.communicate(timeout=seconds) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, error) in zip(running, done, strict=True):
        assert process.returncode == 0, error[-3000:]
    return [out for out, _ in done]
