"""A Slurm of one node on this machine, in a folder of its own: no service manager, no accounting database.

Needs root, and the programs of slurmctld, slurmd, slurm-client and munge. Also a command:

    python -m tests.slurm.one_node FOLDER     # prints what to export, runs until interrupted
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "sinfo", "scontrol", "scancel")
GPUS = 2
"""The node's GPUs: character devices that stand for them."""

_CONFIGURATION = """\
ClusterName=onenode
SlurmctldHost=localhost
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
ReturnToService=2
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/linux
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobs.txt
MinJobAge=86400
DefMemPerCPU=500
MpiDefault=none
GresTypes=gpu
NodeName=localhost NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory_mb} Gres=gpu:h100:{gpus} State=UNKNOWN
PartitionName=cpu Nodes=localhost Default=YES MaxTime=INFINITE State=UP
PartitionName=gpu Nodes=localhost MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class OneNode:
    """A running one-node Slurm.

    Attributes:
        folder: where its files, logs and sockets are.
        environment: the variables that its clients need, beside one's own.
    """

    folder: Path
    environment: dict[str, str]

    def client(self, *command: str) -> str:
        """Run one of Slurm's clients; return what it printed."""
        done = subprocess.run(
            command, env={**os.environ, **self.environment}, capture_output=True, text=True, check=True
        )
        return done.stdout

    def completed(self) -> list[dict[str, str]]:
        """Return what Slurm recorded of each finished job, in the order they finished."""
        record = self.folder / "log" / "jobs.txt"
        lines = record.read_text().splitlines() if record.exists() else []
        return [dict(field.split("=", 1) for field in line.split() if "=" in field) for line in lines if line]


def missing_programs() -> list[str]:
    """Return the programs that are needed and not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


@contextmanager
def one_node(folder: Path) -> Iterator[OneNode]:
    """Run a one-node Slurm in `folder` for the length of a `with` block.

    Raises:
        RuntimeError: a program is missing, we are not root, or a daemon did not come up.
    """
    if missing := missing_programs():
        raise RuntimeError(f"a one-node Slurm needs {', '.join(missing)}")
    if os.geteuid() != 0:
        raise RuntimeError("a one-node Slurm starts its daemons as root")
    _prepare(folder)
    environment = {
        "SLURM_CONF": str(folder / "etc" / "slurm.conf"),
        "PATH": f"{folder}/bin{os.pathsep}{os.environ['PATH']}",
    }
    node = OneNode(folder, environment)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        run, log = folder / "run", folder / "log"
        daemons.append(
            _start(
                node,
                "munged",
                "--force",
                "--foreground",
                f"--socket={run}/munge.socket",
                f"--key-file={run}/munge.key",
                f"--log-file={log}/munge.log",
                f"--pid-file={run}/munge.pid",
                f"--seed-file={run}/munge.seed",
            )
        )
        _wait("munged's socket", daemons, lambda: (run / "munge.socket").exists())
        daemons.append(_start(node, "slurmctld", "-D"))
        daemons.append(_start(node, "slurmd", "-D", "-N", "localhost"))
        _wait("an idle node", daemons, lambda: _idle(node))
        yield node
    finally:
        _stop(node, daemons)


def _prepare(folder: Path) -> None:
    for name in ("bin", "dev", "etc", "log", "run", "spool", "state"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(GPUS):
        device = folder / "dev" / f"nvidia{index}"
        if not device.exists():
            os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    _write_srun(folder)
    key = folder / "run" / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    memory_mb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    controller_port, node_port = _free_ports(2)
    (folder / "etc" / "slurm.conf").write_text(
        _CONFIGURATION.format(
            folder=folder,
            controller_port=controller_port,
            node_port=node_port,
            cpus=os.cpu_count(),
            memory_mb=memory_mb * 9 // 10,
            gpus=GPUS,
        )
    )
    (folder / "etc" / "gres.conf").write_text(
        f"NodeName=localhost Name=gpu Type=h100 File={folder}/dev/nvidia[0-{GPUS - 1}]\n"
    )


def _write_srun(folder: Path) -> None:
    """Put an srun on the path that knows where slurm.conf is: Snakemake's job step drops SLURM_CONF."""
    script = folder / "bin" / "srun"
    script.write_text(f'#!/bin/sh\nSLURM_CONF="{folder}/etc/slurm.conf" exec {shutil.which("srun")} "$@"\n')
    script.chmod(0o755)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


def _start(node: OneNode, program: str, *arguments: str) -> subprocess.Popen[bytes]:
    with (node.folder / "log" / f"{program}.out").open("wb") as out:
        return subprocess.Popen(
            [program, *arguments],
            env={**os.environ, **node.environment},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _idle(node: OneNode) -> bool:
    try:
        return set(node.client("sinfo", "-h", "-o", "%T").split()) == {"idle"}
    except subprocess.CalledProcessError:
        return False


def _wait(
    what: str, daemons: list[subprocess.Popen[bytes]], ready: Callable[[], bool], seconds: float = 60
) -> None:
    end = time.monotonic() + seconds
    while not ready():
        for daemon in daemons:
            if daemon.poll() is not None:
                raise RuntimeError(f"{daemon.args!r} ended with {daemon.returncode} while waiting for {what}")
        if time.monotonic() > end:
            raise RuntimeError(f"no {what} within {seconds:.0f} s")
        time.sleep(0.2)


def _stop(node: OneNode, daemons: list[subprocess.Popen[bytes]]) -> None:
    """End the jobs, then each daemon by its own pid, the last started first."""
    if len(daemons) == 3:
        try:
            node.client("scancel", "--user=root")
            _wait("empty queue", [], lambda: not node.client("squeue", "-h", "-t", "R,CG").strip(), 30)
        except (subprocess.CalledProcessError, RuntimeError) as error:
            print(f"one-node Slurm: {error}", file=sys.stderr)
    for daemon in reversed(daemons):
        daemon.terminate()
        try:
            daemon.wait(15)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def _main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with one_node(Path(sys.argv[1]).resolve()) as node:
        for name, value in node.environment.items():
            print(f"export {name}='{value}'", flush=True)
        with suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    _main()
