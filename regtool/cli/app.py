"""The command line: one file a verb, and one error boundary around them all."""

from __future__ import annotations

import io
import re
import signal
import sys
from types import FrameType

import typer
from rich.markup import escape

from regtool.cli import cohort, doctor, evaluate, finetune_oneshot, jacobian, methods, models, parameters, register, train, transform, warp
from regtool.cli.console import drop, stderr
from regtool.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, GeometryError, InputError, RegtoolError

DEBUG = "--debug"

app = typer.Typer(
    name="regtool",
    help="Deformable registration of medical images. `regtool register FIXED MOVING` is all it takes.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 failed, 2 usage or parameters, 3 bad input, 4 done but quality control failed, 5 out of memory, 130 interrupted, "
    "143 terminated. Results go to stdout, progress and logs to stderr. `--debug` after any command shows the traceback of an error.",
)
app.command()(register.register)
app.command()(cohort.cohort)
app.command()(train.train)
app.command()(finetune_oneshot.finetune_oneshot)
app.command()(warp.warp)
app.command()(evaluate.evaluate)
app.command()(jacobian.jacobian)
app.add_typer(transform.app, name="transform")
app.add_typer(models.app, name="models")
app.command()(methods.methods)
app.add_typer(parameters.app, name="parameters")
app.command()(doctor.doctor)


class Terminated(BaseException):
    """SIGTERM arrived: unwinds like an interrupt, so that half-written files are removed."""


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version.", is_eager=True)) -> None:
    if version:
        from importlib.metadata import version as installed

        print(installed("regtool"))
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits with its code. Every expected failure is one line and a tip; a traceback only with --debug."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = DEBUG in arguments
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name must not fail for the terminal's encoding
    try:
        code = app([a for a in arguments if a != DEBUG], standalone_mode=False, prog_name="regtool")
        if code == EXIT_INTERRUPTED:  # typer makes Ctrl-C an exit without a word
            raise KeyboardInterrupt
        if sys.stdout is not None:
            sys.stdout.flush()
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # typer makes it an exit with code 1
            sys.exit(_outcome(error.__context__)[0])
        raise
    except BaseException as error:
        code, what, tip = _outcome(error)
        if debug and isinstance(error, Exception) and not isinstance(error, typer.TyperException | typer.Abort | BrokenPipeError):
            stderr.print_exception()
        _fail(what, tip)
    sys.exit(code if isinstance(code, int) else 0)


def _outcome(error: BaseException) -> tuple[int, str | None, str | None]:
    """(exit code, what happened, tip) of what ended a verb; no words where there is nothing more to say, or nobody to hear it."""
    if isinstance(error, typer.TyperException):
        if not error.format_message() or type(error).__name__ == "NoArgsIsHelpError":  # its help has been printed
            return 2, None, None
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "regtool"
        return 2, error.format_message().replace("Value error, ", ""), f"`{path} --help` lists what it takes"
    if isinstance(error, RegtoolError):
        return error.exit_code, error.what, error.tip or _general_tip(error)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return EXIT_INTERRUPTED, "interrupted; nothing half-written is left", None
    if isinstance(error, Terminated):
        return EXIT_TERMINATED, "terminated; nothing half-written is left", None
    if isinstance(error, OSError):
        drop(sys.stdout)
        if isinstance(error, BrokenPipeError):  # the reader of our stdout went away, as `| head -1` does: the work is done
            return 0, None, None
        return 1, f"{error.filename or 'standard output'}: {error.strerror or error}", "check free space, and the permissions of files and folders"
    return 1, f"{type(error).__name__}: {error}", "this is a bug in regtool; run again with --debug and report what it prints"


def _fail(what: str | None, tip: str | None) -> None:
    """One line, and one for the tip."""
    for label, style, text in (("error:", "bold red", what), ("tip:", "bold", tip)):
        if text:
            line = re.sub(r"\s*[\r\n]+\s*", " ", text)
            stderr.print(f"[{style}]{label}[/{style}] {escape(line)}")


def _general_tip(error: RegtoolError) -> str:
    """Where whoever raised the error knew none."""
    if isinstance(error, GeometryError):
        return "`regtool doctor FIXED MOVING` shows the geometry of a pair, `regtool transform info FILE` that of a transform"
    if isinstance(error, InputError):
        return "correct that file, or export it again"
    return "`regtool --help` lists the verbs, `regtool VERB --help` what each takes"


def _terminate(_: int, __: FrameType | None) -> None:
    raise Terminated
