"""Attempts as processes: how one is started, and how those that run are found again. Blocking."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from orchestrator.control.ports import StartOrder
from orchestrator.core.errors import StartFailed
from orchestrator.drivers import process_tree as tree
from orchestrator.drivers.late_placeholders import filled
from orchestrator.drivers.process_folder import Folder, Meta, folders
from orchestrator.drivers.process_ports import ADDRESS
from orchestrator.drivers.process_shell import SHELL, wrapped_command


def spawn(
    order: StartOrder, folder: Folder, port: int, owner: str, boot_id: str
) -> tuple[subprocess.Popen[bytes], Meta]:
    """Start the attempt's processes and write down who they are. Raises StartFailed."""
    environment = _environment(order, port, owner)
    command = wrapped_command(order, port, environment)
    try:
        folder.make()
        with folder.log.path.open("ab") as log:
            child = subprocess.Popen(
                [*SHELL, str(folder.exit), *command],
                stdin=subprocess.DEVNULL,
                # A file, since a pipe's reader dies with us and its writer then dies of that.
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
    except OSError as error:
        folder.remove()
        raise StartFailed(f"'{order.model}' could not be started: {error}.") from error
    try:
        meta = Meta(
            attempt=order.attempt,
            model=order.model,
            owner=owner,
            pid=child.pid,
            started_ticks=tree.started_ticks(child.pid),
            boot_id=boot_id,
            port=port,
            created_at=time.time(),
        )
        folder.write(meta)
    except OSError as error:
        kill_at_once(child)
        folder.remove()  # nobody would find it again
        raise StartFailed(f"'{order.model}' could not be written down: {error.strerror}.") from error
    return child, meta


def kill_at_once(child: subprocess.Popen[bytes]) -> None:
    """End a process that was only just started, and all of its group."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def survey(root: Path, owner: str, boot_id: str) -> tuple[Meta, ...]:
    """Every attempt of this owner in the folders, and those that run without a meta in theirs.

    Raises OSError.
    """
    metas = [meta for folder in folders(root) if (meta := folder.read())]
    ours = {meta.attempt: meta for meta in metas if meta.owner == owner}
    for process, environment in tree.marked_processes(owner):
        attempt = environment[tree.ATTEMPT_MARK]
        is_wrapper = tree.read_command(process.pid)[:3] == SHELL
        if attempt not in ours and is_wrapper and process.pid == process.session:
            ours[attempt] = Meta(
                attempt=attempt,
                model=environment.get(tree.MODEL_MARK, ""),
                owner=owner,
                pid=process.pid,
                started_ticks=process.started_ticks,
                boot_id=boot_id,
                port=int(environment.get("PORT", "0")),
                created_at=time.time(),
            )
    return tuple(ours.values())


def _environment(order: StartOrder, port: int, owner: str) -> dict[str, str]:
    """Ours, the launch's, then what the engine decides. Our own settings and keys stay with us."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ORCHESTRATOR_")}
    if sys.prefix != sys.base_prefix:  # in a virtual environment `python` means that one's
        bin_dir = str(Path(sys.executable).parent)
        environment["PATH"] = os.pathsep.join((bin_dir, environment.get("PATH", os.defpath)))
    environment |= {k: filled(v, port, order.gpus) for k, v in order.launch.environment.items()}
    return environment | {
        "HOST": ADDRESS,
        "PORT": str(port),
        # Without a GPU in its placement a model has no bytes on one: it must not see any.
        "CUDA_VISIBLE_DEVICES": ",".join(gpu.id for gpu in order.gpus),
        tree.ATTEMPT_MARK: order.attempt,
        tree.OWNER_MARK: owner,
        tree.MODEL_MARK: order.model,
    }
