"""The command line: help at once, mistakes in one line with status 2, scripts that work from anywhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from skipdit import __version__, cli
from skipdit.cli import COMMANDS, main
from skipdit.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = {
    "ucf101": "ucf101-skip",
    "taichi": "taichi-skip",
    "sky": "skytimelapse-skip",
    "ffs": "ffs-skip",
    "imagenet": "DiT-XL-2-skip",
}


def shell(*words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def test_overview_names_every_command_with_a_line(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for name, (_, help_line) in COMMANDS.items():
        assert f"  {name} " in text and help_line in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert f"usage: skipdit {name}" in capsys.readouterr().out


def test_version_and_overview_do_not_import_torch():
    code = "import sys\nfrom skipdit.cli import main\n"
    code += "try: main(['--version'])\nfinally: assert 'torch' not in sys.modules"
    done = shell(sys.executable, "-c", code, PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stdout.strip()) == (0, f"skipdit {__version__}"), done.stderr


def test_no_command_prints_the_overview_with_status_2(capsys):
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().err


def test_unknown_command_suggests_the_nearest(capsys):
    assert main(["smaple"]) == 2
    assert capsys.readouterr().err == "skipdit: No command 'smaple': did you mean 'sample'?\n"


class Command:
    """Stands for a command's module; `result` is returned or raised."""

    def __init__(self, result):
        self.result = result

    def add_arguments(self, parser):
        parser.add_argument("--flag")
        parser.add_argument("words", nargs="*")

    def run(self, args):
        self.args = args
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


@pytest.mark.parametrize(
    ("result", "status", "said"),
    [
        (None, 0, ""),
        (5, 5, ""),
        (UserError("nothing there."), 2, "skipdit: nothing there.\n"),
        (KeyboardInterrupt(), 130, "skipdit: stopped by Ctrl-C.\n"),
    ],
)
def test_exit_status(result, status, said, monkeypatch, capsys):
    command = Command(result)
    monkeypatch.setattr(cli, "import_module", lambda name: command)
    assert main(["sample", "a=1", "--flag", "x", "b=2"]) == status
    assert capsys.readouterr().err == said
    assert (command.args.flag, command.args.words) == ("x", ["a=1", "b=2"])


@pytest.mark.parametrize(("name", "checkpoint"), PUBLISHED.items())
def test_without_its_checkpoint_a_set_names_the_download(name, checkpoint, monkeypatch, capsys):
    path, entry = f"pretrained/{checkpoint}.pt", f"skip-dit/{checkpoint.lower()}"
    if (ROOT / path).exists() or (ROOT / "pretrained/Latte/vae").exists():
        pytest.skip("the checkpoint is here")
    monkeypatch.chdir(ROOT)
    assert main(["sample", "--config", f"configs/{name}/sample.yaml"]) == 2
    assert capsys.readouterr().err == (
        f"skipdit: {path} and pretrained/Latte/vae are not there: fetch with 'python pretrained/download_ckpts.py "
        f"{entry} skip-dit/vae' (or pass checkpoint=<path> and vae=<path>).\n"
    )


def test_every_set_has_its_script():
    scripts = {path.stem: path for path in (ROOT / "sample/scripts").glob("*.sh") if path.stem != "common"}
    assert set(scripts) == {"demo", *PUBLISHED}
    for name, path in scripts.items():
        folder = "digits" if name == "demo" else name
        assert path.read_text().splitlines()[-1].endswith(f'/common.sh" {folder} "$@"')
        assert path.stat().st_mode & 0o111


@pytest.mark.parametrize("folder", ["class-to-video", "class-to-image"])
def test_task_folders_hold_links_that_lead_somewhere(folder):
    names = {"sample", "train.py", "configs", "pretrained", "environment.yaml"}
    for path in (ROOT / folder).iterdir():
        if path.is_symlink():
            assert path.exists() and not os.readlink(path).startswith("/"), path
            assert path.resolve() == ROOT / path.name
            names.discard(path.name)
    assert not names


def test_scripts_work_through_links_and_pass_words_on(tmp_path):
    link = tmp_path / "link.sh"
    link.symlink_to(ROOT / "class-to-image/sample/scripts/imagenet.sh")
    done = shell("bash", str(link), "step=3", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "skipdit: No setting 'step' (the command line): did you mean 'steps'?\n",
    )


def test_script_without_packages_says_what_to_do(tmp_path):
    fake = tmp_path / "bare-python"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    for name in ("python", "python3"):
        (tmp_path / name).symlink_to(fake)
    copy = tmp_path / "a" / "sample" / "scripts" / "common.sh"
    copy.parent.mkdir(parents=True)
    copy.write_text((ROOT / "sample/scripts/common.sh").read_text())
    done = shell("bash", str(copy), "digits", PATH=f"{tmp_path}:{os.environ['PATH']}", PYTHON=str(fake))
    assert done.returncode == 1
    assert "make env" in done.stderr
