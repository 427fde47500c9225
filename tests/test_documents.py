"""What pages and shell scripts tell people to type exists: commands, settings, files, names, links."""

import argparse
import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from skipdit.cli import COMMANDS
from skipdit.config import load_config
from skipdit.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SKIPPED_FOLDERS = {".git", ".venv", "outputs", "data", "build", "shared"}
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not SKIPPED_FOLDERS & set(path.relative_to(ROOT).parts) and not path.is_symlink()
)
SCRIPTS = sorted(
    path
    for folder in ("sample/scripts", "train_scripts")
    for path in ROOT.glob(f"{folder}/*.sh")
    if path.name != "common.sh"  # what the others share
)

# Settings that a command's key=value words belong to.
SCHEMAS = {
    "sample": "skipdit.sampling.command:SampleConfig",
    "train": "skipdit.training.config:TrainConfig",
    "train-vae": "skipdit.training.autoencoder:AutoencoderConfig",
    "encode": "skipdit.training.encoding:EncodeConfig",
    "evaluate": "skipdit.evaluation.evaluate:EvaluateConfig",
    "compare": "skipdit.evaluation.compare:CompareConfig",
}
# Programs that stand for a command of skipdit.
PROGRAMS = {"train.py": "train", "sample/sample.py": "sample", "pretrained/download_ckpts.py": "download"}
FOREIGN = {
    "git",
    "conda",
    "pip",
    "source",
    "export",
    "set",
    "exec",
    "pytest",
    "ruff",
    "tensorboard",
    "ls",
    "mkdir",
}
SHELL_WORDS = ("$", "`", "*")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# ---------------------------------------------------------------------- what a shell line says


def simple_commands(text: str) -> Iterator[list[str]]:
    """Words of each simple command in a shell text, without comments, assignments, prompts and operators."""
    text = re.sub(r"\\\n\s*", " ", text)
    for line in text.splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=";&|<>")
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";&|"):
                if command := strip_assignments(command):
                    yield command
                command = []
            else:
                command.append(word)


def strip_assignments(words: list[str]) -> list[str]:
    while words and re.match(r"[A-Za-z_]\w*=", words[0]):
        words = words[1:]
    return words


class StrictParser(argparse.ArgumentParser):
    """Raises where argparse would exit."""

    def error(self, message: str):
        raise AssertionError(message)


def check_skipdit(words: list[str]) -> None:
    """A skipdit command with its arguments, through the command's own parser and settings."""
    name, *rest = words
    if name.startswith("-") or name.isupper():  # skipdit --help; `skipdit COMMAND --help` in prose
        return
    assert name in COMMANDS, f"skipdit has no command {name!r}"
    rest = [word for word in rest if word not in ("$@", "--help")]
    parser = StrictParser(prog=f"skipdit {name}", allow_abbrev=False)
    import_module(COMMANDS[name][0]).add_arguments(parser)
    args = parser.parse_intermixed_args(rest)
    settings = [word for word in rest if re.match(r"[a-z][\w.]*=", word)]
    config = getattr(args, "config", None)
    if settings or config:
        assert name in SCHEMAS, f"skipdit {name} takes no key=value words: {settings}"
        check_settings(SCHEMAS[name], config and ROOT / config, settings)


def check_settings(schema_name: str, config: Path | None, settings: list[str]) -> None:
    """Keys exist and values fit; of a value that the shell fills in, only the key is checked."""
    module, name = schema_name.split(":")
    schema = getattr(import_module(module), name)
    filled_in = {word for word in settings if any(sign in word for sign in SHELL_WORDS)}
    load_config(schema, config, [word for word in settings if word not in filled_in])
    for word in filled_in:
        try:
            load_config(schema, config, [f"{word.split('=')[0]}=null"])
        except UserError as error:
            assert not str(error).startswith("No setting"), error


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name = word.split("=")[0]
        pattern = rf"^{name} *[:?]?=" if "=" in word else rf"^{name}:"
        assert re.search(pattern, makefile, re.MULTILINE), f"the Makefile has no {name!r}"


def check_file(word: str, folder: Path) -> Path:
    path = folder / word
    assert path.is_file(), f"{word} is not there (from {relative(folder) if folder != ROOT else 'the root'})"
    return path


def check_python(words: list[str], folder: Path) -> None:
    if words[:1] == ["-m"]:
        assert words[1] in ("pytest", "skipdit", "pip", "venv", "build"), f"python -m {words[1]}"
        if words[1] == "skipdit":
            check_skipdit(words[2:])
        return
    script = check_file(words[0], folder).resolve().relative_to(ROOT).as_posix()
    if script in PROGRAMS:
        check_skipdit([PROGRAMS[script], *words[1:]])


def check_accelerate(words: list[str], folder: Path) -> None:
    if words[0] != "launch":
        return
    at = next(number for number, word in enumerate(words) if word.endswith(".py"))
    check_python(words[at:], folder)


def check_command(words: list[str], folder: Path) -> Path:
    """Check one simple command; returns the folder that the next one starts in."""
    program, *rest = words
    if program == "cd":
        if not any(sign in rest[0] for sign in SHELL_WORDS):
            folder = (folder / rest[0]).resolve()
            assert folder.is_dir(), f"no folder {rest[0]}"
    elif program == "make":
        check_make(rest)
    elif program == "skipdit":
        check_skipdit(rest)
    elif program in ("python", "python3"):
        check_python(rest, folder)
    elif program == "accelerate":
        check_accelerate(rest, folder)
    elif program == "bash":
        check_command(*what_a_script_runs(check_file(rest[0], folder), rest[1:]))
    elif program == "source":
        assert rest == [".venv/bin/activate"]
    else:
        assert program in FOREIGN, f"{program!r}: teach tests/test_documents.py what it is"
        for number, word in enumerate(rest):
            if number and rest[number - 1] in ("-f", "-r", "-c"):
                check_file(word, folder)
    return folder


def what_a_script_runs(script: Path, further: list[str]) -> tuple[list[str], Path]:
    """Run a script with stand-ins that note their arguments; returns the command and its working folder."""
    with TemporaryDirectory() as folder:
        note = Path(folder, "note")
        for name in ("python", "accelerate"):
            stand_in = Path(folder, name)
            # `python -c ...` is the script's question whether this interpreter has the packages.
            stand_in.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 0\nprintf "%s\\0" "$PWD" {name} "$@" >"{note}"\n')
            stand_in.chmod(0o755)
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PYTHON": f"{folder}/python", "PATH": path}
        done = subprocess.run(
            ["bash", script, *further],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert note.is_file(), f"calls no program of this project: {done.stderr}"
        working_folder, *words = note.read_text().split("\0")[:-1]
    return words, Path(working_folder)


def blocks(path: Path, languages: str) -> list[str]:
    return re.findall(rf"^```(?:{languages})\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def check_shell(text: str, page: Path) -> None:
    """Pages of the two task folders speak from their folder, all others from the root."""
    folder = page.parent if page.parent.name.startswith("class-to-") else ROOT
    for words in simple_commands(text):
        try:
            folder = check_command(words, folder)
        except Exception as error:
            raise AssertionError(f"{shlex.join(words)}: {error}") from error


# ---------------------------------------------------------------------- tests


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_shell_blocks_of_page(path):
    for block in blocks(path, "bash|sh|shell|console"):
        check_shell(block, path)


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_commands_in_the_text_of_page(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`\n]+)`", text):
        if re.match(r"(make|skipdit|accelerate launch|conda env|python [\w/]+\.py|bash [\w/]+\.sh)( |$)", span):
            is_pattern = "..." in span or re.search(r" [A-Z]{2,}\b(?!=)|[\[|]", span)
            if match := re.fullmatch(r"skipdit ([a-z][a-z-]*)", span):  # the command's name, not a call
                assert match[1] in COMMANDS, f"skipdit has no command {match[1]!r}"
            elif not is_pattern:
                check_shell(span, path)


@pytest.mark.parametrize("path", SCRIPTS, ids=relative)
def test_settings_of_script(path):
    words, folder = what_a_script_runs(path, ["seed=17"])
    assert words[-1] == "seed=17", "passes no further arguments on"
    check_command(words, folder)


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_python_blocks_of_page(path):
    for block in blocks(path, "python|py"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{node.module} has no {', '.join(missing)}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    import_module(alias.name)


def anchors(path: Path) -> set[str]:
    """Anchors that a forge makes of the headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_links_of_page(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "", text)
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), f"{link} is not there"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


def test_the_readme_lists_every_command():
    readme = (ROOT / "README.md").read_text()
    missing = [name for name in COMMANDS if f"`skipdit {name}`" not in readme]
    assert not missing, f"not in the README: {missing}"


def test_scripts_are_executable_with_bash():
    assert all(path.read_text().startswith("#!/usr/bin/env bash\n") for path in SCRIPTS)
    assert all(os.access(path, os.X_OK) for path in SCRIPTS)


def test_the_readmes_lines_of_python_run():
    """In a process of its own, for another test's imports could hide a missing one; with fewer steps."""
    block = blocks(ROOT / "README.md", "python")[0]
    shorter = block.replace("guidance_scale=4.0", "guidance_scale=4.0, num_inference_steps=4")
    assert shorter != block
    code = f"{shorter}\nprint(len(clips), len(clips[0]), clips[0][0].size, pipe.transformer.cache_stats)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "2 16 (32, 32) CacheStats(full=2, reused=2)", done.stderr[-2000:]
