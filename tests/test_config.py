"""Settings: typed, nested, and every mistake named with its nearest remedy."""

from dataclasses import dataclass, field

import pytest

from skipdit.config import load_config, save_config
from skipdit.errors import UserError


@dataclass
class Optimizer:
    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])


@dataclass
class Settings:
    model: str
    steps: int = 50
    cache: str = "off"
    resume: str | None = None
    ema: bool = True
    classes: list[str] = field(default_factory=list)
    extra: dict[str, int] = field(default_factory=dict)
    optimizer: Optimizer = field(default_factory=Optimizer)

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be 1 or more.")


def write(tmp_path, text):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return path


def message(*args):
    with pytest.raises(UserError) as caught:
        load_config(Settings, *args)
    return str(caught.value)


def test_defaults_then_file_then_overrides(tmp_path):
    path = write(tmp_path, "model: 007\nsteps: 20\noptimizer: {lr: 1e-3}\nextra: {a: 1}\n")
    config = load_config(Settings, path, ["steps=30", "steps=10", "optimizer.betas=[0.5, 0.9]", "cache=007"])
    assert config == Settings(
        "007", steps=10, cache="007", extra={"a": 1}, optimizer=Optimizer(lr=1e-3, betas=[0.5, 0.9])
    )
    assert type(config.optimizer) is Optimizer


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("cache=off", "off"),
        ("cache=N2-900-50", "N2-900-50"),
        ("cache=1e-4", "1e-4"),
        ("cache=007", "007"),
        ("cache=2024-01-01", "2024-01-01"),
        ("cache=12:30:00", "12:30:00"),
        ("cache=a=b", "a=b"),
        ("cache='5'", "5"),
    ],
)
def test_words_stay_words(word, expected):
    assert load_config(Settings, None, ["model=m", word]).cache == expected


def test_values_are_typed():
    config = load_config(
        Settings, None, ["model=m", "optimizer.lr=5e-5", "ema=false", "classes=[3, on]", "resume=null"]
    )
    assert (config.optimizer.lr, config.ema, config.classes, config.resume) == (
        5e-5,
        False,
        ["3", "on"],
        None,
    )


def test_a_single_value_makes_a_list_of_one():
    config = load_config(Settings, None, ["model=m", "classes=007", "optimizer.betas=0.9"])
    assert (config.classes, config.optimizer.betas) == (["007"], [0.9])


def test_unknown_key_names_the_nearest_and_the_source(tmp_path):
    path = write(tmp_path, "model: m\nstep: 3\n")
    assert message(path, []) == f"No setting 'step' ({path}): did you mean 'steps'?"
    assert message(None, ["model=m", "Cahce=off"]) == "No setting 'Cahce' (the command line): did you mean 'cache'?"
    assert "did you mean 'optimizer.lr'?" in message(None, ["lr=1"])
    assert "did you mean 'optimizer.betas'?" in message(None, ["optimizer.beta=1"])
    assert "choose from model, steps" in message(None, ["zzzzzz=1"])


def test_wrong_type_names_the_key_and_the_source(tmp_path):
    path = write(tmp_path, "model: m\nsteps: many\n")
    error = message(path, [])
    assert error.startswith(f"steps ({path}): ") and "many" in error
    assert message(None, ["model=m", "optimizer.lr=fast"]).startswith("optimizer.lr (the command line): ")
    assert message(None, ["model=m", "steps=2.5"]).startswith("steps (the command line): ")
    assert "is a section: set one of optimizer.lr, optimizer.betas" in message(None, ["model=m", "optimizer=adam"])
    assert message(None, ["model=m", "steps.a=1"]).startswith("steps (the command line): ")


def test_missing_value_and_bad_value():
    assert message(None, []) == "model has no value: set it in the command line (model=...)."
    assert message(None, ["model=m", "steps=0"]) == "steps=0 must be 1 or more."


@pytest.mark.parametrize("word", ["steps", "=3", "classes=[1, 2"])
def test_malformed_words(word):
    assert repr(word) in message(None, [word])


def test_malformed_files(tmp_path):
    assert "nowhere.yaml is not there" in message(tmp_path / "nowhere.yaml", [])
    assert "line 2" in message(write(tmp_path, "model: m\n  steps: [1\n"), [])
    assert "'steps' is set twice" in message(write(tmp_path, "steps: 1\nsteps: 2\n"), [])
    assert "holds a list" in message(write(tmp_path, "- 1\n"), [])
    assert "model has no value" in message(write(tmp_path, "# only a comment\n"), [])


def test_saved_settings_read_back_equal(tmp_path):
    config = load_config(Settings, None, ["model=off", "cache=off", "optimizer.lr=3e-5", "classes=['1', 'no']"])
    save_config(config, tmp_path / "new" / "settings.yaml")
    assert load_config(Settings, tmp_path / "new" / "settings.yaml") == config
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["settings.yaml"]


@dataclass
class Start:
    from_: str | None = None


@dataclass
class WithKeyword:
    init: Start = field(default_factory=Start)


def test_a_setting_may_be_called_like_a_word_of_python(tmp_path):
    (tmp_path / "a.yaml").write_text("init: {from: there}")
    config = load_config(WithKeyword, tmp_path / "a.yaml")
    assert config.init.from_ == "there"
    assert load_config(WithKeyword, None, ["init.from=here"]).init.from_ == "here"
    save_config(config, tmp_path / "b.yaml")
    assert (tmp_path / "b.yaml").read_text() == "init:\n  from: there\n"
    assert load_config(WithKeyword, tmp_path / "b.yaml") == config
