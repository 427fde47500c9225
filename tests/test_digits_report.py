"""`skipdit evaluate-digits` on the carried pipeline."""

import re
from pathlib import Path

import pytest

from skipdit.cli import main
from skipdit.errors import UserError
from skipdit.evaluation.digits_report import evaluate_digits

CARRIED = Path(__file__).resolve().parent.parent / "pretrained" / "digits"


def test_the_carried_pipeline_is_read():
    table = evaluate_digits(CARRIED, clips=10, caches=["off", "N2-900-50"], steps=10)
    shares = [float(share) for share in re.findall(r"\| ([\d.]+)% \|", table)]
    assert len(shares) == 3 and min(shares[:2]) >= 80 and shares[2] > 97
    assert table.splitlines()[2].startswith("| generated, no cache |")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--clips", "0"], "--clips 0 must be 1 or more"),
        (["--caches", "fast"], "--caches: Cache setting 'fast' is not spelled"),
        (["--model", "nowhere"], "nowhere holds no pipeline: pass --model"),
    ],
)
def test_mistakes_are_named(words, message, capsys):
    assert main(["evaluate-digits", *words]) == 2
    assert message in capsys.readouterr().err


def test_another_pipeline_is_refused(tmp_path):
    from tiny_pipelines import tiny_pipeline

    tiny_pipeline().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is not a pipeline of the ten digits"):
        evaluate_digits(tmp_path, 1, ["off"])
