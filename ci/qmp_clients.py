#!/usr/bin/env python3
"""Runs every command of a control socket with qemu.qmp, and once more with qmp-shell.

usage: qmp_clients.py DIRECTORY      (of the programs)

A command that there is and that has no example here is a failure, and so is an example of a
command that there is not, an answer that is not as expected, or an event that does not come.
"""

import asyncio
import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import time

from qemu.qmp import EventListener, ExecuteError, QMPClient

PATIENCE = 30
DISK = "disk"
BITMAP = "c0c2bdc4-2c5c-4bb5-8f53-40eb0b5bb5f5"
MIB = 1 << 20
SIZE = 64 * MIB


class Fails:
    """What is refused, with words that are part of the reason."""

    def __init__(self, words):
        self.words = words


def same(value):
    return lambda answer: answer == value


def is_job(status):
    return lambda jobs: [job["status"] for job in jobs] == [status]


NOTHING = same({})


def steps():
    """Commands in an order in which they make sense: name, arguments, and what comes back.

    Arguments that are a function get all answers so far.
    """
    job = {"id": "work"}
    yield "query-version", {}, lambda it: "qemu" in it
    yield "query-commands", {}, lambda it: {"name": "quit"} in it
    yield "query-status", {}, same({"running": True, "status": "running"})
    yield "query-block", {}, lambda it: it[0]["device"] == DISK
    yield "query-named-block-nodes", {"flat": True}, lambda it: len(it) == 1
    yield "query-blockstats", {"query-nodes": False}, lambda it: "rd_operations" in it[0]["stats"]
    yield "query-engine", {}, lambda it: it["image-open"] is True
    yield "query-latencies", {}, lambda it: isinstance(it, (dict, list))
    boundaries = {"id": DISK, "boundaries": [1000, 1000000]}
    yield "block-latency-histogram-set", boundaries, NOTHING
    no_limit = {key: 0 for key in ("bps", "bps_rd", "bps_wr", "iops_rd", "iops_wr")}
    yield "block_set_io_throttle", {"device": DISK, "iops": 100000, **no_limit}, NOTHING
    yield "throttle", {}, lambda it: "100000" in json.dumps(it)
    yield "block-set-write-threshold", {"node-name": DISK, "write-threshold": SIZE}, NOTHING
    yield "block_resize", {"device": DISK, "size": SIZE + MIB}, NOTHING
    yield "grow", {"by": MIB}, lambda it: str(SIZE + 2 * MIB) in json.dumps(it)
    yield "block_resize", {"device": DISK, "size": MIB}, Fails("cannot shrink")
    yield "flush", {}, NOTHING
    bitmap = {"node": DISK, "name": BITMAP}
    yield "block-dirty-bitmap-add", {"persistent": True, **bitmap}, NOTHING
    yield "block-dirty-bitmap-add", {"node": DISK, "name": "other"}, NOTHING
    yield "block-dirty-bitmap-disable", {"node": DISK, "name": "other"}, NOTHING
    yield "block-dirty-bitmap-enable", {"node": DISK, "name": "other"}, NOTHING
    merged = {"node": DISK, "target": BITMAP, "bitmaps": ["other"]}
    yield "block-dirty-bitmap-merge", merged, NOTHING
    yield "block-dirty-bitmap-remove", {"node": DISK, "name": "other"}, NOTHING
    clear = {"type": "block-dirty-bitmap-clear", "data": bitmap}
    yield "transaction", {"actions": [clear]}, NOTHING
    yield "block-dirty-bitmap-clear", bitmap, NOTHING
    yield "snapshot-create", {"description": "first"}, lambda it: "guid" in it
    yield "blockdev-snapshot-internal-sync", {"device": DISK, "name": "second"}, NOTHING
    yield "snapshot-list", {}, lambda it: len(it) == 3
    second = {"device": DISK, "name": "second"}
    yield "blockdev-snapshot-delete-internal-sync", second, lambda it: it["name"] == "second"
    first = lambda so_far: {"guid": so_far["snapshot-create"]["guid"]}
    yield "snapshot-delete", first, NOTHING
    yield "query-jobs", {}, same([])
    yield "snapshot-switch", {"guid": "{5fbaabe3-6958-40ff-92a7-860e329aab41}"}, Fails("end that process")
    yield "snapshot-create", {"description": "third"}, lambda it: "guid" in it
    yield "snapshot-create", {"description": "fourth"}, lambda it: "guid" in it
    yield "snapshot-merge", {}, NOTHING
    yield "query-jobs", {}, same([])
    yield "snapshot-list", {}, lambda it: len(it) == 1
    held = {"job-id": "work", "speed": 1, "auto-dismiss": False}
    yield "compact", held, NOTHING
    yield "job-pause", job, NOTHING
    yield "query-block-jobs", {}, lambda it: it[0]["device"] == "work"
    yield "job-resume", job, NOTHING
    yield "block-job-set-speed", {"device": "work", "speed": 1}, NOTHING
    yield "job-complete", job, Fails("cannot accept")
    yield "job-finalize", job, Fails("cannot accept")
    yield "job-cancel", job, NOTHING
    yield "query-jobs", {}, is_job("concluded")
    yield "job-dismiss", job, NOTHING
    yield "quit", {}, NOTHING


# What every client does by itself.
GREETING = {"qmp_capabilities"}
EVENTS = ["SNAPSHOT_CREATED", "SNAPSHOT_DELETED", "JOB_STATUS_CHANGE", "BLOCK_JOB_CANCELLED"]


class Daemon:
    def __init__(self, programs):
        self.folder = tempfile.TemporaryDirectory()
        at = lambda name: os.path.join(self.folder.name, name)
        self.image, self.control, self.log = at("disk"), at("control"), at("log")
        create = [f"{programs}/ploop-img", "create", "--cluster-size", "64K", self.image, "64M"]
        subprocess.run(create, check=True, stdout=subprocess.DEVNULL)
        # Something that a job has to look at.
        with open(at("raw"), "wb") as raw:
            raw.write(os.urandom(MIB))
            raw.truncate(SIZE)
        fill = [f"{programs}/ploop-img", "convert", "-n", "-O", "ploop", at("raw"), self.image]
        subprocess.run(fill, check=True, stdout=subprocess.DEVNULL)
        command = [f"{programs}/vhost-user-ploop", "--socket-path", at("socket")]
        command += ["--blk-file", self.image, "--control", self.control]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        atexit.register(self.process.kill)
        self.programs = programs
        end = time.monotonic() + PATIENCE
        while not os.path.exists(self.control):
            assert time.monotonic() < end, "nobody listens"
            time.sleep(0.01)

    def end(self):
        """It was told to end, and leaves a disk that is sound."""
        assert self.process.wait(PATIENCE) == 0, open(self.log).read()
        check = [f"{self.programs}/ploop-img", "check", self.image]
        subprocess.run(check, check=True, stdout=subprocess.DEVNULL)


def judge(command, expected, answer, error):
    if isinstance(expected, Fails):
        assert error and expected.words in error, f"{command}: {error or answer}"
    else:
        assert not error, f"{command}: {error}"
        assert expected(answer), f"{command}: {answer}"


async def once(client, command, arguments, expected):
    """Until it is as expected: a job takes its time."""
    end = time.monotonic() + PATIENCE
    while True:
        answer = error = None
        try:
            answer = await client.execute(command, arguments)
        except ExecuteError as refusal:
            error = str(refusal)
        try:
            judge(command, expected, answer, error)
            return answer
        except AssertionError:
            if not command.startswith("query-") or time.monotonic() > end:
                raise
        await asyncio.sleep(0.05)


async def with_package(programs):
    daemon = Daemon(programs)
    client = QMPClient("clients")
    listener = EventListener()
    client.register_listener(listener)
    await client.connect(daemon.control)
    there = {it["name"] for it in await client.execute("query-commands")} - GREETING
    examples = {command for command, _, _ in steps()}
    assert there == examples, f"without an example, or without a command: {there ^ examples}"
    so_far = {}
    for command, arguments, expected in steps():
        arguments = arguments(so_far) if callable(arguments) else arguments
        so_far[command] = await once(client, command, arguments, expected)
    heard = {event["event"] for event in listener.history}
    while not listener.empty():
        heard.add((await listener.get())["event"])
    missing = [name for name in EVENTS if name not in heard]
    assert not missing, f"events that have not come: {missing}"
    try:
        await client.disconnect()
    except Exception as error:  # The end of the program is the end of the connection.
        assert daemon.process.wait(PATIENCE) == 0, error
    daemon.end()
    return len(examples)


def argument(value):
    """As qmp-shell reads it: what is no JSON is a string."""
    if isinstance(value, (bool, list, dict)) or value is None:
        return json.dumps(value, separators=(",", ":"))
    return str(value)


def with_shell(programs):
    """One command after the other, as one who types."""
    daemon = Daemon(programs)
    shell = os.path.join(os.path.dirname(sys.executable), "qmp-shell")
    process = subprocess.Popen(
        [shell, daemon.control],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    signal.alarm(4 * PATIENCE)

    def ask(command, arguments):
        words = [command] + [f"{key}={argument(value)}" for key, value in arguments.items()]
        process.stdin.write(" ".join(words) + "\n")
        process.stdin.flush()
        while True:
            line = process.stdout.readline()
            assert line, f"{command}: qmp-shell has ended"
            start = line.find("{")
            if start < 0:
                continue
            answer = json.loads(line[start:])
            if "event" not in answer:
                return answer

    so_far = {}
    for command, arguments, expected in steps():
        arguments = arguments(so_far) if callable(arguments) else arguments
        end = time.monotonic() + PATIENCE
        while True:
            answer = ask(command, arguments)
            error = answer.get("error", {}).get("desc")
            try:
                judge(command, expected, answer.get("return"), error)
                break
            except AssertionError:
                if not command.startswith("query-") or time.monotonic() > end:
                    raise
            time.sleep(0.05)
        so_far[command] = answer.get("return")
    process.stdin.close()
    process.wait(PATIENCE)
    daemon.end()


def main():
    programs = sys.argv[1]
    count = asyncio.run(with_package(programs))
    print(f"qemu.qmp has run all {count} commands")
    with_shell(programs)
    print("qmp-shell has run them, too")


main()
