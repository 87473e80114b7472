"""Kill trainings at random until the time is up, and compare what comes out of them.

Usage: python -m tests.soak --minutes 20 [--seed 0] [--only balpoe,csr] [--folder FOLDER]

A trial starts a random training as a user would, and ends it at a random moment by a signal; now
and then it also damages a checkpoint, or starts two processes and kills one of them. It resumes the
training until that is finished. Weights and tables must then be those of a run that nothing
disturbed, byte for byte but for the columns of time. What went wrong stays in the folder.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from moectl.engine import checkpoint
from tests.faults.procedures import PROCEDURES, Procedure, differing, outcome, prepare

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
BY_SIGNAL = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, 130}
"""Exit codes besides 75: it may come while Python reads our files, or when all is written."""
IN_PAIRS = ("balpoe-train", "diffusion-train", "controller-grpo")
"""Procedures whose batches two processes can share."""
HANGING = 600
"""Seconds of a sitting."""


class Wrong(Exception):  # noqa: N818 - a finding about a trial
    """What a trial found."""


class Trial:
    """One training, in a folder of its own, with a file of what every sitting said.

    Args:
        procedure: what is trained.
        home: what it starts from.
        folder: of the trial; `runs` in it is the folder of all runs.
        processes: one or two.
    """

    def __init__(self, procedure: Procedure, home: Path, folder: Path, processes: int) -> None:
        self.procedure, self.home, self.folder, self.processes = procedure, home, folder, processes
        self.events: list[str] = []
        self.sittings = 0
        folder.mkdir(parents=True)

    @property
    def run(self) -> Path:
        """The run, once there is one."""
        found = sorted(self.folder.glob("runs/*/soak-*/run.json"))
        return found[-1].parent if found else self.folder / "no run yet"

    @property
    def record(self) -> dict[str, Any]:
        """What the run says about itself: launchers swallow exit codes."""
        path = self.run / "run.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"status": "none"}

    def sit(self, resume: str, number: int = 0, after: float = 0, early: bool = False) -> int:
        """Train until it ends, or until it gets a signal; return the exit code.

        Args:
            resume: `auto`, or the folder.
            number: the signal; none if 0.
            after: seconds from when the run is open to the signal.
            early: count them from the start of the process instead.
        """
        self.sittings += 1
        start = [sys.executable]
        if self.processes > 1:
            start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        words = [*self.procedure.command(self.home), "--name", "soak", "--resume", resume]
        environment = {**os.environ, "MOECTL_RUNS": str(self.folder / "runs")}
        said = self.folder / f"sitting-{self.sittings}.txt"
        with said.open("wb") as file:
            program = subprocess.Popen(
                [*start, "-m", "moectl", *words], env=environment, stdout=file, stderr=file
            )
            try:
                if number:
                    self._hit(program, number, after, early)
                code = program.wait(HANGING)
            except subprocess.TimeoutExpired:
                raise Wrong(f"{said.name}: it hangs") from None
            finally:
                program.kill()
                program.wait()
        return code

    def _hit(self, program: Any, number: int, after: float, early: bool) -> None:
        before = self._log_bytes()
        while not early and program.poll() is None and self._log_bytes() == before:
            time.sleep(0.02)
        time.sleep(after)
        name, target = signal.Signals(number).name, program.pid
        if self.processes > 1:
            tasks = Path(f"/proc/{target}/task").glob("*/children")
            ranks = [rank for task in tasks for rank in task.read_text().split()]
            name, target = f"{name} of one", int(ranks[-1]) if ranks else 0
        if target and program.poll() is None:
            os.kill(target, number)
            self.events.append(name)

    def _log_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.run.glob("log.txt"))

    def judge(self, code: int) -> None:
        """Accept how a sitting ended, or not."""
        said = self.folder / f"sitting-{self.sittings}.txt"
        if self.processes > 1:  # the launcher has codes and tracebacks of its own
            return
        if code not in {0, 75} | BY_SIGNAL:
            raise Wrong(f"{said.name}: exit code {code}")
        if code not in BY_SIGNAL and b"Traceback" in said.read_bytes():
            raise Wrong(f"{said.name}: a traceback")
        expected = {0: "finished", 75: "interrupted"}.get(code, self.record["status"])
        if self.record["status"] != expected:
            raise Wrong(f"{said.name}: exit code {code}, run.json says {self.record['status']}")

    def damage(self, chance: random.Random) -> bool:
        """Cut or flip a file of the newest checkpoint, if there is another one to fall back on."""
        written = sorted(self.run.rglob("update-*"), key=lambda path: path.stat().st_mtime_ns)
        newest = checkpoint.existing(written[-1].parent) if written else []
        if len(newest) < 2:
            return False
        path = chance.choice(sorted(newest[0].iterdir()))
        data = bytearray(path.read_bytes())
        if chance.random() < 0.5:
            del data[chance.randrange(len(data)) :]
            kind = "cut"
        else:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            kind = "flip"
        path.write_bytes(data)
        self.events.append(f"{kind} {path.name}")
        return True

    def refuse(self) -> None:
        """A damaged newest checkpoint is named and refused when the folder is."""
        code = self.sit(str(self.run))
        said = (self.folder / f"sitting-{self.sittings}.txt").read_text()
        if (code, "corrupt checkpoint" in said) != (2, True):
            raise Wrong(f"sitting-{self.sittings}.txt: a damaged checkpoint was not refused")


def disturb(trial: Trial, reference: Path, chance: random.Random) -> None:
    """Train to the end with a few interruptions, then compare with the reference."""
    # The last part is the report's.
    seconds = 0.7 * json.loads((reference / "run.json").read_text())["wall_seconds"]
    for _ in range(chance.randint(1, 4)):
        number = signal.SIGKILL if trial.processes > 1 else chance.choice(SIGNALS)
        early = chance.random() < 0.15
        after = chance.uniform(0, 4 if early else seconds)
        there = trial.run.exists() and trial.record["status"] != "finished"
        resume = str(trial.run) if there and chance.random() < 0.5 else "auto"
        trial.judge(trial.sit(resume, number, after, early))
        if trial.record["status"] == "finished":
            break
        if trial.processes == 1 and chance.random() < 0.35 and trial.damage(chance):
            trial.refuse()
            trial.judge(trial.sit("auto", signal.SIGKILL, chance.uniform(0, seconds)))
    if trial.record["status"] != "finished":
        trial.judge(trial.sit("auto"))
    if trial.record["status"] != "finished":
        raise Wrong(f"not finished but {trial.record['status']}")
    wrong = differing(results(trial.procedure, trial.run), results(trial.procedure, reference))
    if wrong:
        raise Wrong(f"not as in the undisturbed run: {', '.join(wrong)}")


def results(procedure: Procedure, folder: Path) -> dict[str, Any]:
    """Return weights and tables; older checkpoints may be gone by damage."""
    found = outcome(procedure, folder)
    return {name: value for name, value in found.items() if "checkpoints/" not in name}


class Soak:
    """Trials one after the other, and what came of them.

    Args:
        root: folder of all trials.
        seed: of what is tried when; the moments also depend on the machine.
    """

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.chance = root, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        prepare(root / "home")

    def reference(self, procedure: Procedure, processes: int) -> Path:
        """Return the undisturbed run, made when it is first asked for."""
        folder = self.root / f"undisturbed-{procedure}-{processes}"
        if not folder.exists():
            trial = Trial(procedure, self.root / "home", folder, processes)
            trial.judge(trial.sit("auto"))
            if trial.record["status"] != "finished":
                raise Wrong(f"{folder}: it fails undisturbed")
        (found,) = folder.glob("runs/*/soak-*")
        return found

    def trial(self, number: int, procedure: Procedure) -> None:
        """Make one trial and print what happened in it."""
        began = time.monotonic()
        pair = procedure.name in IN_PAIRS and self.chance.random() < 0.25
        folder = self.root / f"trial-{number}"
        trial = Trial(procedure, self.root / "home", folder, 2 if pair else 1)
        try:
            disturb(trial, self.reference(procedure, trial.processes), self.chance)
            verdict = "same"
            shutil.rmtree(folder)
        except (Wrong, AssertionError) as error:
            verdict = f"WRONG {error}; kept in {folder}"
            self.wrong.append(f"{procedure}: {error}")
        self.counts["trials"] += 1
        self.counts["sittings"] += trial.sittings
        self.counts.update(trial.events)
        size = ", 2 processes" if pair else ""
        taken = time.monotonic() - began
        say(
            f"{number:>3} {procedure}{size}: {', '.join(trial.events) or 'no signal in time'};"
            f" {trial.sittings} sittings, {taken:.0f} s: {verdict}"
        )


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="beginnings of names, with commas between them")
    parser.add_argument("--folder", type=Path, help="for the trials; a new one under /tmp if none")
    asked = parser.parse_args()
    chosen = [one for one in PROCEDURES if one.name.startswith(tuple(asked.only.split(",")))]
    if not chosen:
        parser.error(f"--only {asked.only}: none of {', '.join(map(str, PROCEDURES))}")
    root = asked.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    soak, end = Soak(root, asked.seed), time.monotonic() + 60 * asked.minutes
    say(f"trials in {root}, seed {asked.seed}: {', '.join(map(str, chosen))}")
    try:
        while time.monotonic() < end:
            soak.trial(soak.counts["trials"] + 1, soak.chance.choice(chosen))
    except KeyboardInterrupt:
        say("stopped")
    say(", ".join(f"{name} {count}" for name, count in soak.counts.items()))
    say(f"mismatches {len(soak.wrong)}")
    for line in soak.wrong:
        say(f"  {line}")
    if not soak.wrong and not asked.folder:  # a folder of the user's may hold other things
        shutil.rmtree(root)
    sys.exit(bool(soak.wrong))


if __name__ == "__main__":
    main()
