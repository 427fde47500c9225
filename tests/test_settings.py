"""Every setting of every command is read somewhere, so that none can be given in vain."""

import dataclasses
import textwrap
from pathlib import Path

import pytest
from config_reads import Reader

from skipdit.evaluation.compare import CompareConfig
from skipdit.evaluation.evaluate_config import EvaluateConfig, SideConfig
from skipdit.sampling.config import SampleConfig
from skipdit.training.autoencoder import AutoencoderConfig
from skipdit.training.config import TrainConfig
from skipdit.training.encoding import EncodeConfig

PACKAGE = Path(__file__).resolve().parent.parent / "skipdit"
CONFIGS = (
    TrainConfig(),
    EncodeConfig(),
    AutoencoderConfig(),
    SampleConfig(model="digits"),
    EvaluateConfig(SideConfig("digits"), SideConfig("digits")),
    CompareConfig(),
)


def settings(section, prefix="") -> list[tuple[str, str, str]]:
    """(dotted name, class, attribute) of a config's settings, those of its sections included."""
    found = []
    for field in dataclasses.fields(section):
        value, name = getattr(section, field.name), f"{prefix}{field.name}"
        own = (name, type(section).__name__, field.name)
        found += settings(value, f"{name}.") if dataclasses.is_dataclass(value) else [own]
    return found


@pytest.fixture(scope="module")
def reads():
    return Reader(sorted(PACKAGE.rglob("*.py"))).reads


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_every_setting_is_read(reads, config):
    assert not [name for name, kind, attribute in settings(config) if (kind, attribute) not in reads]


def test_a_setting_that_only_another_class_has_read_or_a_check_is_found(tmp_path):
    """`lost` is checked, and something else of that name is read; the others are read in the ways that there are."""
    (tmp_path / "one.py").write_text(
        textwrap.dedent("""
            class Part:
                lost: int
                deep: int
                renamed: int

                def check(self):
                    return self.lost

            class Config:
                part: Part
                direct: int
                called: int

                @property
                def double(self):
                    return 2 * self.direct

            class Other:
                lost: int
        """)
    )
    (tmp_path / "two.py").write_text(
        textwrap.dedent("""
            class User:
                def __init__(self, config: "Config | None", other: Other):
                    self.config, self.lost = config, other.lost

                def use(self):
                    part = self.config.part
                    return part.deep, [x for x in (lambda: part.renamed)()]

            def check_all(config: Config):
                return config.part.lost

            def make() -> Config: ...

            def use():
                return make().called
        """)
    )
    reads = Reader(sorted(tmp_path.glob("*.py"))).reads
    part, config = {name for kind, name in reads if kind == "Part"}, {name for kind, name in reads if kind == "Config"}
    assert part == {"deep", "renamed"} and config == {"part", "direct", "called"}
