"""The forecast of the remembered tensor: closed forms, what it falls back to, and what it is worth."""

from pathlib import Path

import pytest
import torch
from accelerated import recorded
from diffusers.models.cache_utils import CacheMixin
from tiny_pipelines import tiny_pipeline

from skipdit import SkipCacheConfig, SkipLattePipeline
from skipdit.acceleration.quality import psnr
from skipdit.acceleration.undoing import turn_on_blocks
from skipdit.cache import SkipCacheHook
from skipdit.cache.forecast import forecast, forecast_weights
from skipdit.cli import main

CARRIED = Path(__file__).resolve().parents[1] / "pretrained/digits"
WIDE = {"start": 1000, "stop": 0}


class Curve(torch.nn.Module, CacheMixin):
    """Stands in for a backbone: its features follow a curve in the step index; notes which ones it is given."""

    def __init__(self, curve, dtype=torch.float32):
        super().__init__()
        self.curve, self.dtype, self.calls, self.given = curve, dtype, 0, {}

    def forward(self, x, shallow, deep_features=None):
        if deep_features is None:
            deep_features = torch.tensor([self.curve(self.step)], dtype=self.dtype)
        else:
            self.given[self.step] = deep_features
        return x, deep_features

    @torch.no_grad()
    def run(self, steps: int, calls: int = 1, name: str = "c", size: int = 1, first: int = 0) -> dict[int, float]:
        """Features that the reused steps were given, by step."""
        self.given = {}
        for self.step in range(first, steps):
            for _ in range(calls):
                with self.cache_context(name, step_index=self.step, timestep=999 - 10 * self.step):
                    self(torch.zeros(size))
        return {step: features.item() for step, features in self.given.items()}


def curve(function, config: SkipCacheConfig, **settings) -> Curve:
    model = Curve(function, **settings)
    SkipCacheHook.attach(model, config)
    return model


def line(step: float) -> float:
    return 3 * step - 1


def parabola(step: float) -> float:
    return 0.5 * step**2 - 2 * step + 1


# ---------------------------------------------------------------------- the arithmetic


def test_weights_of_even_and_uneven_spacing():
    assert forecast_weights([0], 5) == [1]
    assert forecast_weights([0, 3], 4) == pytest.approx([-1 / 3, 4 / 3])
    assert forecast_weights([0, 1, 2], 3) == pytest.approx([1, -3, 3])
    assert forecast_weights([0, 1, 4], 6) == pytest.approx([2.5, -4, 2.5])
    assert forecast_weights([0, 1, 4], 4) == pytest.approx([0, 0, 1])
    for places in ([2, 3], [0, 1, 9], [5, 6, 8]):
        assert sum(forecast_weights(places, 12)) == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_forecast_is_summed_wide_and_rounded_once(dtype):
    values = [torch.randn(64, generator=torch.manual_seed(seed)).to(dtype) for seed in range(3)]
    found = forecast(list(zip((0, 1, 4), values, strict=True)), 6)
    wide = torch.promote_types(dtype, torch.float32)
    expected = (2.5 * values[0].to(wide) - 4 * values[1].to(wide) + 2.5 * values[2].to(wide)).to(dtype)
    assert found.dtype == dtype
    assert torch.allclose(found, expected, rtol=torch.finfo(dtype).eps, atol=torch.finfo(wide).eps * 8)


def test_what_is_remembered_is_not_written_to():
    values = [torch.ones(2), torch.full((2,), 3.0)]
    assert forecast(list(enumerate(values)), 2).tolist() == [5, 5]
    assert values[0].tolist() == [1, 1] and values[1].tolist() == [3, 3]
    assert forecast([(0, values[0])], 7) is values[0]  # a single one is held


# ---------------------------------------------------------------------- through the hook


@pytest.mark.parametrize(("order", "function"), [(1, line), (2, line), (2, parabola)])
@pytest.mark.parametrize("full_steps", [(0, 1, 2), (0, 3, 6, 9), (0, 1, 2, 5, 9)])
def test_curves_of_the_order_are_forecast_exactly(order, function, full_steps):
    found = curve(function, SkipCacheConfig(full_steps=full_steps, forecast=order)).run(14)
    assert set(found) == set(range(14)) - set(full_steps)
    for step, value in found.items():
        if sum(full < step for full in full_steps) > order:
            assert value == pytest.approx(function(step), abs=1e-4), step


def test_lower_orders_while_too_few_are_remembered():
    """Full at 0, 2, 4, 6: hold, line, parabola of step squared; order 0 holds throughout, order 1 keeps two."""
    expected = {
        0: {1: 0, 3: 4, 5: 16, 7: 36},
        1: {1: 0, 3: 6, 5: 22, 7: 46},
        2: {1: 0, 3: 6, 5: 25, 7: 49},
    }
    for order, values in expected.items():
        model = curve(lambda step: step**2, SkipCacheConfig(2, **WIDE, forecast=order))
        assert model.run(8) == pytest.approx(values)
        assert len(_remembered(model)) == order + 1


def _remembered(model) -> list:
    hook = model._diffusers_hook.get_hook("skip_cache")
    return hook.states._state_cache["c"].remembered


def test_a_new_trajectory_another_shape_and_a_reset_forget():
    model = curve(parabola, SkipCacheConfig(3, **WIDE, forecast=2))
    first = model.run(9)
    assert first[1] == first[2] == parabola(0)
    assert model.run(9) == first
    model.run(5)
    assert model.run(9) == first  # after one that was cut short
    model.run(7)
    assert model.run(9, size=2, first=7) == {8: parabola(7)}  # another shape in mid-trajectory: 7 in full, 8 held
    model._reset_stateful_cache()
    assert model.run(9) == first


def test_after_the_stop_window_nothing_is_forecast():
    model = curve(parabola, SkipCacheConfig(3, start=1000, stop=960, forecast=1))
    assert set(model.run(12)) == {1, 2, 4}  # the step at 959 is the first below 960; all later ones are full
    assert len(_remembered(model)) == 1


def test_contexts_forecast_apart_and_calls_within_a_step_share_one():
    model = curve(line, SkipCacheConfig(2, **WIDE, forecast=1))
    found = model.run(8)
    assert model.run(8, calls=2) == found  # a second call in a full step takes the place of the first
    assert model.run(8, name="other") == found


# ---------------------------------------------------------------------- settings


def test_spelling_there_and_back():
    parse = SkipCacheConfig.parse
    assert parse("N3-900-50-F1") == SkipCacheConfig(3, 1, 900, 50, forecast=1)
    assert parse("n4-f2", shallow=4, start=1000, stop=21) == SkipCacheConfig(4, 4, 1000, 21, forecast=2)
    assert parse("N3-900-50-F0") == parse("N3-900-50") == parse("N3") == SkipCacheConfig(3)
    for text in ("N2-900-50", "N3-1000-0-F1", "N6-800-20-F2"):
        assert str(parse(text)) == text and parse(str(parse(text))) == parse(text)
    assert str(SkipCacheConfig(full_steps=(0, 3), forecast=1)) == "full steps 0,3-F1"
    assert repr(parse("N2-F2")) == "SkipCacheConfig(N2-900-50-F2, shallow=1)"


def test_bad_orders_are_refused():
    for order in (-1, 3, 0.5):
        with pytest.raises(ValueError, match=f"forecast={order} must be 0"):
            SkipCacheConfig(forecast=order)
    with pytest.raises(ValueError, match="forecast=3"):
        SkipCacheConfig.parse("N2-F3")
    for text in ("N2F1", "N2-900-50-F", "N2-900-F1", "F1"):
        with pytest.raises(ValueError, match="N2-900-50-F2"):
            SkipCacheConfig.parse(text)


def test_bench_refuses_a_bad_order(capsys):
    assert main(["bench", "--forecast", "3"]) != 0
    assert "--forecast: forecast=3 must be" in capsys.readouterr().err


# ---------------------------------------------------------------------- on pipelines


def sample(pipe, cache: SkipCacheConfig | None = None, steps: int = 9) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    if cache is not None:
        pipe.transformer.enable_cache(cache)
    inputs = {"guidance_scale": 4.0, "generator": torch.manual_seed(0), "output_type": "latent"}
    try:
        return pipe([0, 2], num_inference_steps=steps, return_dict=False, **inputs)[0]
    finally:
        if cache is not None:
            pipe.transformer.disable_cache()


@torch.no_grad()
def by_hand(pipe, cache: SkipCacheConfig, steps: int = 9) -> torch.Tensor:
    """The same samples from the model's two paths alone, each reused tensor from a fit in float64."""
    model, taken = pipe.transformer, []
    schedule = iter(cache.schedule(_timesteps(pipe, steps)))
    forward, step = model.forward, iter(range(steps))

    def follow(x, timestep, labels, return_dict):
        now = next(step)
        features = None if next(schedule) else _fit(taken[-1 - cache.forecast :], now)
        prediction, features_after = forward(
            x, timestep, labels, return_dict=False, shallow=cache.shallow, deep_features=features
        )
        if features is None:
            taken.append((now, features_after))
        return (prediction,)

    model.forward = follow
    try:
        return sample(pipe, steps=steps)
    finally:
        del model.forward


def _timesteps(pipe, steps: int) -> list[float]:
    pipe.scheduler.set_timesteps(steps)
    return pipe.scheduler.timesteps.tolist()


def _fit(taken: list[tuple[int, torch.Tensor]], now: int) -> torch.Tensor:
    """Newton's form: sums of divided differences."""
    places = [place for place, _ in taken]
    column = [features.double() for _, features in taken]
    total, factor = torch.zeros_like(column[0]), 1.0
    for order in range(len(taken)):
        total = total + factor * column[0]
        factor *= now - places[order]
        column = [
            (later - earlier) / (places[i + order + 1] - places[i])
            for i, (earlier, later) in enumerate(zip(column, column[1:], strict=False))
        ]
    return total.to(taken[0][1].dtype)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("kind", ["video", "image"])
def test_pipelines_equal_the_two_paths_taken_by_hand(kind, order):
    pipe = tiny_pipeline(kind)
    cache = SkipCacheConfig(3, **WIDE, forecast=order)
    found, expected = sample(pipe, cache), by_hand(pipe, cache)
    if order == 0:
        assert torch.equal(found, expected)
    else:
        assert ((found - expected).norm() / expected.norm()).item() < 1e-4
        assert not torch.equal(found, sample(pipe, SkipCacheConfig(3, **WIDE)))


@pytest.mark.parametrize("order", [1, 2])
def test_interval_one_is_no_cache_bit_for_bit(order):
    pipe = tiny_pipeline()
    assert torch.equal(sample(pipe, SkipCacheConfig(1, forecast=order)), sample(pipe))


def test_graphs_and_compiled_blocks_take_the_forecast():
    """It is an ordinary input of the reuse path: what is recorded or compiled does not depend on it."""
    pipe, cache = tiny_pipeline(), SkipCacheConfig(3, **WIDE, forecast=2)
    expected = sample(pipe, cache)

    with recorded(pipe) as forward:
        assert torch.allclose(sample(pipe, cache), expected, atol=1e-6)
        assert len(forward._recorded) == 2
    torch._dynamo.reset()
    turn_on_blocks(pipe.transformer, backend="eager")
    assert ((sample(pipe, cache) - expected).norm() / expected.norm()).item() < 1e-5
    torch._dynamo.reset()


def test_the_carried_pipeline_gains_from_a_forecast():
    """At the same operations: 25 steps, 9 of them in full, two clips; PSNR against no cache."""
    pipe = SkipLattePipeline.from_pretrained(CARRIED)
    plain = sample(pipe, steps=25)
    settings = {order: SkipCacheConfig(3, **WIDE, forecast=order) for order in (0, 1, 2)}
    quality = {order: psnr(sample(pipe, cache, steps=25), plain) for order, cache in settings.items()}
    assert quality[1] > quality[0] + 5 and quality[2] > quality[1] + 1
