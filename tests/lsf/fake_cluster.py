"""A cluster of this machine's processes, for the commands in ``bin/``: what LSF, JSM and SLURM check and set.

``$FAKE_CLUSTER/cluster.json`` describes it::

    {"launch": "batch1", "hosts": [{"listed": "node1", "hostname": "node1.cluster.test", "netns": "w1"}],
     "cores": 42, "gpus": 6, "minute": 1.0, "longest": 120, "grace": 5, "parse_script": true}

Hosts are listed in the scheduler's files by one name and may call themselves by another; a host with a network
namespace gets it and a host name of its own, which needs root. A minute of a job's time lasts ``minute`` seconds.
Where the real commands take something silently and do other than what was meant, these refuse it and say so.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ.get("FAKE_CLUSTER", "."))
BIN = Path(__file__).parent / "bin"


class Refused(Exception):  # noqa: N818
    """The command refuses; its message goes to standard error."""


def cluster():
    return json.loads((FOLDER / "cluster.json").read_text())


def command(main):
    """Run one fake command."""
    try:
        sys.exit(main(sys.argv[1:]))
    except Refused as error:
        print(error, file=sys.stderr)
        sys.exit(255)


def directives(script, mark):
    """Options of the script's comment lines; after the first command, where none is read, they are refused."""
    words, commands = [], False
    for line in script.splitlines():
        if line.startswith(mark):
            if commands:
                raise Refused(f"{line!r} comes after the first command, where no directive is read")
            if "$" in line:
                raise Refused(f"{line!r}: variables are not replaced in directives")
            words.append(shlex.split(line[len(mark) :], comments=False))
        elif line.strip() and not line.startswith("#"):
            commands = True
    return words


def parsed(words, known, flags=()):
    """[-x, value, --y=value, -n2, command...] -> (options, rest). ``known``: option -> its name."""
    options, rest = {}, list(words)
    while rest and rest[0].startswith("-"):
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if word in flags:
            options[flags[word]] = True
            continue
        if name not in known and len(word) > 2 and word[:2] in known and not word.startswith("--"):
            name, value, equals = word[:2], word[2:], "="
        if name not in known:
            raise Refused(f"unknown option {word}")
        if not equals:
            if not rest:
                raise Refused(f"{word} needs a value")
            value = rest.pop(0)
        if known[name] in options:
            raise Refused(f"{word} is given twice: one of the two would not count")
        options[known[name]] = value
    return options, rest


def number(options, name, default=None):
    value = options.get(name, default)
    if value is None or not str(value).isdigit() or (int(value) < 1 and name != "gpus"):
        raise Refused(f"{name} must be a positive number, not {value!r}")
    return int(value)


def new_job(script, info):
    jobs = FOLDER / "jobs"
    jobs.mkdir(exist_ok=True)
    job = next(i for i in range(4711, 9999) if not (jobs / str(i)).exists())
    (jobs / str(job)).mkdir()
    (jobs / str(job) / "script").write_text(script)
    (jobs / str(job) / "info.json").write_text(json.dumps(info | {"cwd": os.getcwd()}))
    return str(job)


def start_runner(kind, job):
    subprocess.Popen(
        [sys.executable, __file__, kind, job],
        start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def on_host(host, arguments):
    """The command line that runs on a host: in its network namespace, under its name."""
    if not host.get("netns"):
        return arguments
    named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host["hostname"], *arguments]
    return ["ip", "netns", "exec", host["netns"], *named]


def run_tasks(tasks, end_all):
    """Start (host, environment, command) at once, pass signals on, and return the highest code.

    Args:
        tasks: of the step.
        end_all: the first that fails ends the others, by SIGTERM and, five seconds later, SIGKILL.
    """
    processes = [subprocess.Popen(on_host(host, line), env=env) for host, env, line in tasks]
    record = FOLDER / "jobs" / os.environ.get("LSB_JOBID", os.environ.get("SLURM_JOB_ID", "")) / "tasks"
    record.write_text(" ".join(str(process.pid) for process in processes))

    def forward(number, frame):
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for number_ in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        signal.signal(number_, forward)
    failed_at = None
    while any(process.poll() is None for process in processes):
        time.sleep(0.05)
        if end_all and any(process.poll() for process in processes):
            if failed_at is None:
                failed_at = time.monotonic()
                forward(signal.SIGTERM, None)
            elif time.monotonic() - failed_at > 5:
                forward(signal.SIGKILL, None)
    record.unlink(missing_ok=True)
    return max(code if code >= 0 else 128 - code for code in (process.returncode for process in processes))


def nodelist(hosts):
    """Return the nodes as SLURM writes them: node[1-2]."""
    names = [host["listed"] for host in hosts]
    stem, numbers = names[0].rstrip("0123456789"), [name[len(names[0].rstrip("0123456789")) :] for name in names]
    if len(names) == 1 or not all(name.startswith(stem) for name in names) or not all(map(str.isdigit, numbers)):
        return ",".join(names)
    first, last = int(numbers[0]), int(numbers[-1])
    assert [str(number) for number in range(first, last + 1)] == numbers, names
    return f"{stem}[{first}-{last}]"


def without_scheduler(environ):
    dropped = ("JSM_", "OMPI_", "SLURM_STEP", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
    kept = {name: value for name, value in environ.items() if not name.startswith(dropped)}
    kept.pop("CUDA_VISIBLE_DEVICES", None)  # the hosts' GPUs are only said to be there
    return kept


def _finish(folder, code):
    (folder / "exit.part").write_text(str(code))
    (folder / "exit.part").rename(folder / "exit")


def _kill(group, number_):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number_)


def run_lsf(job):
    """An LSF job: SIGUSR2 to all its processes at the run limit, SIGKILL after the grace."""
    here, folder = cluster(), FOLDER / "jobs" / job
    info = json.loads((folder / "info.json").read_text())
    hosts = here["hosts"][: info["nodes"]]
    rankfile = folder / "rankfile"
    lines = [here["launch"]] + [host["listed"] for host in hosts for _ in range(here["cores"])]
    rankfile.write_text("\n".join(lines) + "\n")
    environ = without_scheduler(os.environ) | {
        "LSB_JOBID": job, "LSB_JOBNAME": info["name"], "LSB_DJOB_RANKFILE": str(rankfile), "LS_SUBCWD": info["cwd"],
        "LSB_MCPU_HOSTS": f"{here['launch']} 1 " + " ".join(f"{host['listed']} {here['cores']}" for host in hosts),
    }  # fmt: skip
    if here.get("no_rank_file"):
        rankfile.unlink()
    (folder / "began").touch()
    with (Path(info["cwd"]) / info["output"].replace("%J", job)).open("a") as output:
        process = subprocess.Popen(
            ["bash", str(folder / "script")], env=environ, cwd=info["cwd"], stdout=output, stderr=output,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(info["minutes"] * here["minute"])
        except subprocess.TimeoutExpired:
            _kill(process.pid, signal.SIGUSR2)
            try:
                code = process.wait(here["grace"])
            except subprocess.TimeoutExpired:
                code = process.wait(_kill(process.pid, signal.SIGKILL))
    _kill(process.pid, signal.SIGKILL)
    _finish(folder, code if code >= 0 else 128 - code)


def run_slurm(job):
    """A SLURM job: --signal to the steps' processes before the limit, SIGTERM and SIGKILL at it; again if requeued."""
    here, folder = cluster(), FOLDER / "jobs" / job
    info = json.loads((folder / "info.json").read_text())
    names = nodelist(here["hosts"][: info["nodes"]])
    for start in range(100):
        limit = info["minutes"] * here["minute"]
        environ = without_scheduler(os.environ) | {
            "SLURM_JOB_ID": job, "SLURM_JOB_NAME": info["name"], "SLURM_SUBMIT_DIR": info["cwd"],
            "SLURM_NNODES": str(info["nodes"]), "SLURM_NTASKS": str(info["nodes"] * info["tasks"]),
            "SLURM_NTASKS_PER_NODE": str(info["tasks"]), "SLURM_NODELIST": names, "SLURM_JOB_NODELIST": names,
            "SLURM_CPUS_PER_TASK": str(info["cpus"]), "SLURM_JOB_END_TIME": str(int(time.time() + limit)),
            "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
        }  # fmt: skip
        if start:
            environ["SLURM_RESTART_COUNT"] = str(start)
        (folder / "requeue").unlink(missing_ok=True)
        began = time.monotonic()
        with (Path(info["cwd"]) / info["output"].replace("%j", job)).open("a") as output:
            process = subprocess.Popen(
                ["bash", str(folder / "script")], env=environ, cwd=info["cwd"], stdout=output, stderr=output,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        warned = False
        while process.poll() is None:
            time.sleep(0.05)
            left = limit - (time.monotonic() - began)
            if info["signal"] and not warned and left < info["signal"][1] / 60 * here["minute"]:
                warned = True
                with contextlib.suppress(OSError):
                    for pid in (folder / "tasks").read_text().split():
                        os.kill(int(pid), getattr(signal, f"SIG{info['signal'][0]}"))
            if left < 0:
                _kill(process.pid, signal.SIGTERM)
            if left < -here["grace"] or (folder / "requeue").exists():
                _kill(process.pid, signal.SIGKILL)
        _kill(process.pid, signal.SIGKILL)
        if not (folder / "requeue").exists():
            code = process.returncode
            return _finish(folder, code if code >= 0 else 128 - code)
    raise RuntimeError("requeued for ever")


def minutes_of(text, form):
    found = re.fullmatch(form, text)
    if found is None:
        raise Refused(f"{text!r} is not a time limit")
    return found


if __name__ == "__main__":
    {"lsf": run_lsf, "slurm": run_slurm}[sys.argv[1]](sys.argv[2])
