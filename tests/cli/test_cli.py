"""The manners of the command line: where results and logs go, exit codes, signals, pipes, names of files, start-up, parameter files."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import SimpleITK as sitk
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from regtool.cli.app import app, main
from regtool.config.registration import Oneshot
from regtool.config.resolve import dump, load
from regtool.config.schema import Parameters, Preprocess, Run
from regtool.errors import ParameterError
from regtool.methods import names, parameters_of, read_parameters
from tests.conftest import blobs, contained, heeds_interrupts

QUICK = (
    "-m", "voxelmorph", "--refine", "none", "--set", "oneshot.iterations=2", "--threads", "1", "--no-qc", "--model", "none", "--align", "none",
)  # fmt: skip
REPORT = {
    "status", "method", "model", "fixed", "moving", "outputs", "similarity", "jacobian", "stages", "seconds", "peak_memory_mb", "device", "seed",
    "versions", "command", "warnings",
}  # fmt: skip
SLOW = ("torch", "SimpleITK", "numpy", "matplotlib", "scipy", "h5py", "pandas")
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    def lines(self, label: str) -> list[str]:
        """The lines of stderr that start with `label:`."""
        return [line for line in self.err.splitlines() if line.startswith(f"{label}:")]


def call(capfd: pytest.CaptureFixture[str], *arguments: object) -> Answer:
    """`regtool ARGUMENTS` in this process; nothing of it outlasts the call."""
    capfd.readouterr()
    with contained(), pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    found = capfd.readouterr()
    return Answer(ended.value.code, found.out, found.err)  # type: ignore[arg-type]


def picture(path: Path, ndim: int = 2, shift: float = 0.0) -> Path:
    """A soft ball in the format of the suffix."""
    shape = ((24, 20), (14, 12, 10))[ndim - 2]
    image = sitk.GetImageFromArray(100 * blobs(shape, tuple((n - 1) / 2 + shift for n in shape), 4.0))
    image.SetOrigin([10.0] * ndim)
    sitk.WriteImage(image, str(path))
    return path


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything in a folder, hidden files too, files with size and time. (Torch makes itself a folder for compiled code.)"""
    found = [p for p in sorted(folder.rglob("*")) if not p.name.startswith("torchinductor")]
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) if p.is_file() else (0, 0) for p in found}


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """`regtool ARGUMENTS` in a process of its own."""
    return subprocess.run([sys.executable, "-m", "regtool", *map(str, arguments)], encoding="utf-8", timeout=60, **options)


def verbs(group: typer.Typer, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every verb, sub-verb and group of them."""
    yield path
    for command in group.registered_commands:
        name = command.name or command.callback.__name__.replace("_", "-")  # type: ignore[union-attr]
        yield (*path, name)
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        assert inner.name is not None
        yield from verbs(inner.typer_instance, (*path, inner.name))


VERBS = list(verbs(app))


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Two images in the working directory."""
    monkeypatch.chdir(tmp_path)
    return picture(Path("fixed.nii.gz")), picture(Path("moving.nii.gz"), shift=0.7)


@pytest.fixture(scope="module")
def parameter_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parameters") / "vm.toml"
    path.write_text("[oneshot]\niterations = 7\n")
    return path


# --- start-up ---------------------------------------------------------------------------------------------------------------------------------


def test_the_verbs_are_found() -> None:
    assert {("register",), ("warp",), ("methods",), ("models", "list"), ("parameters", "check"), ("transform", "invert"), ("doctor",)} <= set(VERBS)


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help(verb: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    for flag in ("--help", "-h"):
        answer = call(capfd, *verb, flag)
        assert answer.code == 0
        assert answer.err == ""
        assert "Usage: regtool" in answer.out


def test_help_and_lists_import_nothing_slow(parameter_file: Path) -> None:
    quick = [*([*verb, "--help"] for verb in VERBS), ["methods"], ["models", "list"], ["parameters", "check", str(parameter_file)]]
    code = f"""
import contextlib, io, sys
from regtool.cli.app import main
for arguments in {quick!r}:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main(arguments)
    found = [name for name in {SLOW!r} if name in sys.modules]
    assert not found, (arguments, found)
"""
    done = subprocess.run([sys.executable, "-c", code], encoding="utf-8", capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


ENTRY = """
import atexit, gc, os, sys
atexit.register(print, "taken apart")
from regtool.cli import app
def main():
    print(os.environ["GOMP_SPINCOUNT"], gc.get_threshold()[0] > 700)
    print("e" * 300_000, file=sys.stderr)
    sys.exit(4)
app.main = main
from regtool.__main__ import run
run()
"""


@pytest.mark.parametrize("own", [None, "7"])
def test_the_process_ends_at_once_with_all_that_was_printed(own: str | None) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"} | ({} if own is None else {"GOMP_SPINCOUNT": own})
    done = subprocess.run([sys.executable, "-c", ENTRY], encoding="utf-8", capture_output=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout) == (4, f"{own or 1000} True\n")
    assert done.stderr == "e" * 300_000 + "\n"


def computing(*words: object) -> float:
    """Seconds of the processor that `python WORDS` takes: how busy the machine is does not matter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *map(str, words)], capture_output=True, check=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.fixture(scope="module")
def framework_seconds() -> float:
    """What no command can do without, where 0.3 s are allowed about 0.1 s: how slow the machine is does not matter either."""
    return min(computing("-c", "import typer, rich.console, pydantic") for _ in range(3))


@pytest.mark.parametrize("verb", [("--help",), ("register", "--help"), ("methods",), ("models", "list"), ("parameters", "check")], ids=" ".join)
def test_help_and_lists_answer_at_once(verb: tuple[str, ...], parameter_file: Path, framework_seconds: float) -> None:
    words = ("-m", "regtool", *verb, *([parameter_file] if verb[0] == "parameters" else []))
    found: list[float] = []
    while not found or (min(found) > 4 * framework_seconds and len(found) < 4):
        found.append(computing(*words))
    assert min(found) <= 4 * framework_seconds, (found, framework_seconds)


@pytest.mark.parametrize("flag", ["--version", "--help"])
def test_as_a_module_and_as_a_script(flag: str) -> None:
    module = run(flag, capture_output=True)
    assert module.returncode == 0
    assert module.stderr == ""
    assert module.stdout.strip()
    script = Path(sys.executable).with_name("regtool")
    if script.exists():
        assert subprocess.run([script, flag], encoding="utf-8", capture_output=True, timeout=60).stdout == module.stdout


def test_without_arguments_there_is_help(capfd: pytest.CaptureFixture[str]) -> None:
    for verb in ((), ("models",), ("parameters",), ("transform",)):
        answer = call(capfd, *verb)
        assert answer.code == 2
        assert "Usage: regtool" in answer.out


# --- stdout and stderr ------------------------------------------------------------------------------------------------------------------------


def test_table_on_stdout_and_progress_on_stderr(pair: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    answer = call(capfd, "register", *pair, *QUICK, "--model", "none")
    assert answer.code == 0
    folder = tmp_path / "moving_to_fixed"
    assert (folder / "report.json").is_file()
    rows = dict(line.split("  ", 1) for line in answer.out.splitlines())
    assert rows["written to"].strip() == str(folder)
    assert "step 2 of 2" in answer.err
    assert "step" not in answer.out
    assert not set("\r\x1b") & set(answer.out + answer.err)


def test_no_bars_and_no_colours_without_a_terminal(pair: tuple[Path, Path]) -> None:
    done = run("register", *pair, *QUICK, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert not set("\r\x1b") & set(done.stdout + done.stderr)
    assert all(line.startswith("learning on this pair: step") for line in done.stderr.splitlines())
    report = json.loads(Path("moving_to_fixed/report.json").read_text())
    assert report["command"].startswith("regtool register fixed.nii.gz moving.nii.gz -m voxelmorph --refine none --set oneshot.iterations=2")


def test_json_is_the_report(pair: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    answer = call(capfd, "register", *pair, *QUICK, "--json", "-o", "out")
    report = strict(answer.out)
    assert set(report) >= REPORT
    assert report["status"] == "ok"
    assert report["model"]["name"]
    assert {"path", "sha256", "size", "spacing"} <= set(report["fixed"])
    assert {"warped", "displacement", "transform"} <= set(report["outputs"])
    assert {"name", "reason", "before", "after"} == set(report["similarity"])
    assert {"min", "max", "mean", "folding_percent", "sd_log"} == set(report["jacobian"])
    assert {"name", "kept", "seconds", "similarity"} <= set(report["stages"][0])
    assert {"read", "align", "network", "refine", "warp", "write", "total"} <= set(report["seconds"])
    written = strict(Path("out/report.json").read_text())
    assert {k: written[k] for k in REPORT} == {k: report[k] for k in REPORT}


def test_json_is_strict_where_there_is_no_number(pair: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    empty = sitk.Image([20, 24], sitk.sitkUInt8)
    empty.SetOrigin([10.0, 10.0])
    sitk.WriteImage(empty, "none.nii.gz")
    answer = call(capfd, "register", *pair, *QUICK, "--json", "--fixed-labels", "none.nii.gz", "--moving-labels", "none.nii.gz")
    assert strict(answer.out)["after"]["dice"]["mean"] is None


def strict(text: str) -> dict[str, Any]:
    """JSON without NaN and Infinity, which are not JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads(text, parse_constant=refuse)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("verb", ["methods", "models list", "parameters check", "doctor", "jacobian", "transform info", "warp"])
def test_json_of_the_other_verbs(verb: str, pair: tuple[Path, Path], parameter_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shift = Path("shift.tfm")
    sitk.WriteTransform(sitk.TranslationTransform(2, (1.0, 2.0)), str(shift))
    more = {
        "parameters check": [parameter_file],
        "doctor": pair,
        "jacobian": [shift, "--like", pair[0]],
        "transform info": [shift],
        "warp": [pair[1], "-t", shift, "--like", pair[0], "-o", "warped.nii.gz", "--threads", "1"],
    }.get(verb, [])
    answer = call(capfd, *verb.split(), *more, "--json")
    assert answer.code == 0
    assert answer.err == ""
    assert strict(answer.out)


def test_quiet(pair: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    answer = call(capfd, "register", *pair, *QUICK, "-q")
    assert (answer.code, answer.err) == (0, "")
    assert answer.out
    assert call(capfd, "register", "nowhere.nii", pair[1], "-q").lines("error")


def test_a_warning_that_quiet_hides_stands_in_the_report(pair: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    image = sitk.ReadImage(str(pair[1]))
    image[3, 3] = float("nan")
    sitk.WriteImage(image, "nan.mha")
    answer = call(capfd, "register", pair[0], "nan.mha", *QUICK, "-q", "--json")
    assert (answer.code, answer.err) == (0, "")
    assert "NaN" in strict(answer.out)["warnings"][0]


def test_debug_alone_shows_a_traceback(pair: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    plain, debug = (call(capfd, "register", "nowhere.nii", pair[1], *flag) for flag in ((), ("--debug",)))
    assert plain.code == debug.code == 3
    assert "Traceback" not in plain.err
    assert "Traceback" in debug.err
    assert plain.err.splitlines() == debug.err.splitlines()[-2:]


def test_a_bug_is_one_line_too(pair: tuple[Path, Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("two\nlines")

    monkeypatch.setattr("regtool.workflows.register.register", broken)
    answer = call(capfd, "register", *pair)
    assert answer.code == 1
    assert answer.err.splitlines()[0] == "error: ValueError: two lines"
    assert "--debug" in answer.lines("tip")[0]
    assert "Traceback" in call(capfd, "register", *pair, "--debug").err


# --- arguments --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        "--fixed fixed.nii.gz --moving moving.nii.gz --method voxelmorph",
        "-f fixed.nii.gz moving.nii.gz",
        "moving.nii.gz -f fixed.nii.gz",
        "fixed.nii.gz --moving moving.nii.gz -m voxelmorph",
    ],
)
def test_options_name_the_images_too(arguments: str, pair: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    answer = call(capfd, "register", *arguments.split(), *QUICK, "--json")
    assert answer.code == 0
    report = strict(answer.out)
    assert [Path(report[role]["path"]).name for role in ("fixed", "moving")] == ["fixed.nii.gz", "moving.nii.gz"]
    assert report["folder"] == str(tmp_path / "moving_to_fixed")


def test_overwrite(pair: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    assert call(capfd, "register", *pair, *QUICK).code == 0
    before = listing(Path())
    again = call(capfd, "register", *pair, *QUICK)
    assert again.code == 2
    assert "--overwrite" in again.lines("tip")[0]
    assert listing(Path()) == before
    assert call(capfd, "register", *pair, *QUICK, "--overwrite").code == 0
    assert set(listing(Path())) == set(before)


def test_failed_quality_control_is_exit_code_4(pair: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    answer = call(capfd, "register", *pair, *QUICK, "--set", "qc.min_similarity_gain=2", "--qc", "--inverse", "--json", "-o", "out")
    assert answer.code == 4
    report = strict(answer.out)
    assert report["status"] == "qc_failed"
    assert {*report["outputs"].values(), "qc.png", "parameters.toml", "report.json"} == {p.name for p in Path("out").iterdir()}
    assert strict(Path("out/report.json").read_text())["status"] == "qc_failed"
    shown = call(capfd, "register", *pair, *QUICK, "--set", "qc.min_similarity_gain=2", "-o", "again")
    assert shown.code == 4
    assert "min_similarity_gain" in shown.out
    assert "FAILED" in shown.out


@pytest.mark.parametrize("name", ["two words", "[bold]red", "[/]", "ünï 日本", "-dash", "quote'\"s", "a.b.c", "100%", "x" * 120], ids=ascii)
def test_file_names_are_taken_and_printed_as_they_are(name: str, pair: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = name.replace("/", "")
    image = sitk.ReadImage(str(pair[1])) / 3
    image[3, 3] = float("nan")
    sitk.WriteImage(image, f"./{name}.mha")
    answer = call(capfd, "register", pair[0], f"./{name}.mha", *QUICK)
    assert answer.code == 0, answer.err
    assert f"{tmp_path / name}_to_fixed\n" in answer.out
    assert strict((tmp_path / f"{name}_to_fixed" / "report.json").read_text())["moving"]["path"] == str(tmp_path / f"{name}.mha")
    assert any(f"{name}.mha" in line for line in answer.lines("warning"))
    missing = call(capfd, "register", pair[0], f"./no {name}.mha")
    assert missing.code == 3
    assert missing.lines("error")[0].endswith(f"no {name}.mha")
    again = call(capfd, "register", pair[0], f"./{name}.mha", "-p", tmp_path / f"{name}_to_fixed" / "parameters.toml", "-o", f"./{name} 2", "-q")
    assert again.code == 0


def test_a_line_is_never_broken(pair: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    answer = call(capfd, "register", pair[0], "two\nlines " + "x" * 200)
    assert len(answer.err.splitlines()) == 2


# --- signals and pipes ------------------------------------------------------------------------------------------------------------------------


ENDLESS = (*QUICK, "--set", "oneshot.iterations=10000000", "--set", "oneshot.patience=10000000")


def started(folder: Path) -> subprocess.Popen[str]:
    """A registration that would take very long, in the middle of one-shot learning."""
    process = subprocess.Popen(
        [sys.executable, "-m", "regtool", "register", "fixed.nii.gz", "moving.nii.gz", "-o", "out", *ENDLESS],
        cwd=folder,
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=heeds_interrupts,
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    assert "learning on this pair: step 1 of" in line, line + process.stderr.read()
    return process


@pytest.mark.parametrize(("sent", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_a_signal_leaves_nothing_behind(sent: signal.Signals, code: int, word: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    before = listing(tmp_path)
    process = started(tmp_path)
    process.send_signal(sent)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert out == ""
    assert [line for line in err.splitlines() if word in line and line.startswith("error:")]
    assert "Traceback" not in err
    assert listing(tmp_path) == before


def test_killed_while_writing_nothing_looks_finished(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Killed without a chance to tidy up, in the middle of writing: the folder is hidden, and without a report."""
    code = """
import os, signal, sys
from regtool.cli.app import main
from regtool.result import folder
folder.write_transform = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
main(sys.argv[1:])
"""
    done = subprocess.run([sys.executable, "-c", code, "register", *pair, *QUICK, "-o", "out"], capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert not Path("out").exists()
    assert not list(tmp_path.rglob("report.json"))


def into_closed_pipe(arguments: list[object], both: bool = False) -> tuple[int, str]:
    """Exit code and stderr where nobody reads stdout (and stderr, with `both`), as after `| head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = run(*arguments, stdout=writing, stderr=writing if both else subprocess.PIPE)
    finally:
        os.close(writing)
    return done.returncode, done.stderr or ""


def test_a_closed_pipe_is_no_error(pair: tuple[Path, Path]) -> None:
    for arguments in (["methods"], ["register", "--help"], ["parameters", "init", "voxelmorph"], ["methods", "--json"]):
        assert into_closed_pipe([*arguments]) == (0, "")
    assert into_closed_pipe(["register", *pair, *QUICK, "-o", "out"], both=True)[0] == 0
    assert Path("out/report.json").is_file()  # the work is done all the same


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_stdout_is_an_error() -> None:
    with Path("/dev/full").open("w") as full:
        done = run("methods", stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "tip"]
    assert "No space left" in done.stderr


# --- parameter files --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", names())
def test_init_writes_what_check_accepts(method: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shown = call(capfd, "parameters", "init", method, "--all")
    assert (shown.code, shown.err) == (0, "")
    file = tmp_path / "a.toml"
    assert call(capfd, "parameters", "init", method, "--all", "-o", file).code == 0
    assert file.read_text().replace("a.toml", "FILE.toml") == shown.out
    answer = call(capfd, "parameters", "check", file, "--json")
    assert answer.code == 0
    assert strict(answer.out)["parameters"]["method"] == method
    engine = parameters_of(method)().model_dump()
    expected = read_parameters(None, {"method": method}).model_copy(update={"engine": engine})
    assert load(file).model_dump_json() == expected.model_dump_json()
    for section, info in Parameters.model_fields.items():
        assert info.annotation is not None
        for key in getattr(info.annotation, "model_fields", {}):
            assert f"{key} =" in shown.out or f"[{section}.{key}." in shown.out, f"{section}.{key} is not in the file"


def test_init_prints_what_is_often_changed(capfd: pytest.CaptureFixture[str]) -> None:
    """The numbers of the algorithm only where they are asked for; each of them has a meaning, and a tuned one says what it was chosen on."""
    short, everything = (call(capfd, "parameters", "init", "pyramid", *more).out for more in ((), ("--all",)))
    assert "iterations = 60" in short and "overlap_power" not in short and "overlap_power = 0.3" in everything
    answer = call(capfd, "parameters", "explain", "align.overlap_power", "--json")
    found = strict(answer.out)
    assert found["default"] == 0.3 and "hearts" in found["chosen_on"] and ">= 0" in found["range"] and "share" in found["meaning"]
    assert strict(call(capfd, "parameters", "explain", "engine.channels", "-m", "pyramid", "--json").out)["key"] == "engine.channels"
    wrong = call(capfd, "parameters", "explain", "align.overlap_powr")
    assert wrong.code == 2 and "did you mean 'overlap_power'" in wrong.err


def test_a_preset_may_be_given_in_part(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("[refine.presets.mi]\nsmoothings = 10\n[refine.presets.mind]\ndiffusion = 2.0\n")
    found = load(file).refine.presets
    assert (found["mi"].smoothings, found["mi"].diffusion) == (10, 1.0)
    assert (found["mind"].diffusion, found["mind"].smoothings) == (2.0, 2)
    assert found["lncc"].diffusion == 1.5
    file.write_text("[refine.presets.stiff]\nsmoothings = 10\n")
    with pytest.raises(ParameterError, match="stiff is no metric"):
        load(file)


@pytest.mark.parametrize("file", sorted((ROOT / "parameter_files").rglob("*.toml")), ids=lambda f: f.name)
def test_shipped_files_are_valid(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    answer = call(capfd, "parameters", "check", file)
    assert (answer.code, answer.err) == (0, "")
    assert "regtool" in file.read_text().splitlines()[0] + file.read_text().splitlines()[1], "opens with the command that uses it"


numbers = st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False)  # torch is told to flush those
positive = st.floats(min_value=1e-300, allow_nan=False, allow_infinity=False, allow_subnormal=False)


@settings(max_examples=25, deadline=None)
@given(
    initial=st.none() | st.text(),
    outside=st.none() | numbers,
    seed=st.integers(0, 2**63 - 1),
    rate=positive.map(lambda x: min(x, 100.0)),
    low=st.floats(0, 49, allow_subnormal=False),
    high=st.floats(50, 100),
    inverse=st.booleans(),
    documented=st.booleans(),
)
def test_a_dumped_file_loads_to_the_same(
    initial: str | None, outside: float | None, seed: int, rate: float, low: float, high: float, inverse: bool, documented: bool
) -> None:
    engine = parameters_of("voxelmorph")()
    parameters = Parameters(
        run=Run(initial_transform=initial, outside=outside, seed=seed, inverse=inverse),
        oneshot=Oneshot(learning_rate=rate),
        preprocess=Preprocess(percentiles=(low, high)),
        engine=engine.model_dump(),
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.toml"
        file.write_text(dump(parameters, "an opening\nof two lines", engine, documented=documented), encoding="utf-8")
        assert load(file) == parameters
        file.write_text(dump(load(file), "again", engine), encoding="utf-8")
        assert load(file) == parameters


def test_set_wins_over_the_file_and_the_file_over_the_defaults(parameter_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def found(*more: str) -> tuple[int, int]:
        answer = call(capfd, "parameters", "check", parameter_file, "--json", *more)
        assert answer.code == 0
        oneshot = strict(answer.out)["parameters"]["oneshot"]
        return oneshot["iterations"], oneshot["patience"]

    defaults = Oneshot()
    assert found() == (7, defaults.patience) != (defaults.iterations, defaults.patience)
    assert found("--set", "oneshot.iterations=9") == (9, defaults.patience)
    assert found("--set", "oneshot.iterations=9", "--set", "oneshot.iterations = 11") == (11, defaults.patience)
    assert found("--set", "oneshot.patience=3") == (7, 3)


def test_options_win_over_set_and_the_resolved_file_says_so(pair: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    Path("a.toml").write_text('[run]\nseed = 3\nformat = "mha"\n[training_similarity]\nname = "mse"\n', encoding="utf-8-sig")  # Notepad writes such
    answer = call(capfd, "register", *pair, "-p", "a.toml", *QUICK, "--set", "run.seed=4", "--seed", 5, "--similarity", "ncc", "-o", "out")
    assert answer.code == 0, answer.err
    resolved = load(Path("out/parameters.toml"))
    assert (resolved.run.seed, resolved.run.format, resolved.training_similarity.name, resolved.oneshot.iterations) == (5, "mha", "ncc", 2)
    assert Path("out/warped.mha").is_file()
    assert call(capfd, "parameters", "check", "out/parameters.toml").code == 0


def test_a_table_by_set(parameter_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    answer = call(
        capfd, "parameters", "check", parameter_file, "--set", "preprocess.percentiles=[1, 99]", "--set", "training_similarity.name=mse", "--json"
    )
    found = strict(answer.out)["parameters"]
    assert (found["preprocess"]["percentiles"], found["training_similarity"]["name"]) == ([1, 99], "mse")


def test_it_starts_from_any_folder_and_without_a_terminal(pair: tuple[Path, Path], tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
    done = run("doctor", *(p.resolve() for p in pair), cwd="/", env=environment, stdin=subprocess.DEVNULL, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
