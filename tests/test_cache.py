"""Skip-Cache: the published rule, and everything that must never go wrong with remembered features."""

import pytest
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from golden_data import FAMILIES, golden

from skipdit.cache import IntervalPolicy, SkipCacheConfig
from skipdit.models import SkipLatteTransformer3DModel


def tiny(seed: int = 0, **overrides) -> SkipLatteTransformer3DModel:
    """A small video model none of whose parameters is zero."""
    torch.manual_seed(seed)
    sizes = {"sample_size": 8, "hidden_size": 32, "depth": 16, "num_heads": 4, "num_frames": 4, "num_classes": 5}
    model = SkipLatteTransformer3DModel(**{**sizes, **overrides}).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.1)
    return model


def latents(batch: int = 2, size: int = 8, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 4, 4, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def trajectory(model, x, steps: int = 12, stop_after: int | None = None, name: str = "cond_uncond") -> torch.Tensor:
    """A stand-in for a sampler: a few small steps along the prediction."""
    timesteps = torch.linspace(999, 0, steps).round().tolist()
    labels = torch.arange(len(x)) % 5
    for index, timestep in enumerate(timesteps):
        if index == stop_after:
            raise KeyboardInterrupt
        with model.cache_context(name, step_index=index, timestep=timestep):
            x = x - 0.1 * model(x, torch.full((len(x),), timestep), labels).sample[:, :4]
    return x


# ---------------------------------------------------------------------- the rule


@pytest.mark.parametrize("family", FAMILIES)
def test_schedule_is_the_published_one(family):
    for recorded in golden(family)[1]["trajectories"]:
        config = SkipCacheConfig(
            interval=recorded["interval"],
            shallow=recorded.get("shallow_pairs", recorded.get("shallow_blocks")),
            start=recorded["start"],
            stop=recorded["stop"] if "stop" in recorded else recorded["stop_inclusive"] + 1,
        )
        assert config.schedule(recorded["timesteps"]) == recorded["full_step"]


def test_presets_parse_and_words():
    assert SkipCacheConfig.parse("N2-700-50") == SkipCacheConfig(interval=2, start=700, stop=50)
    assert SkipCacheConfig.parse("n3", shallow=2) == SkipCacheConfig(interval=3, shallow=2)
    assert repr(SkipCacheConfig()) == "SkipCacheConfig(N2-900-50, shallow=1)"
    assert SkipCacheConfig.parse(str(SkipCacheConfig(interval=4, start=800, stop=20))).interval == 4
    assert SkipCacheConfig.preset("class-to-video", 3) == SkipCacheConfig(interval=3, shallow=1, start=900, stop=50)
    image = SkipCacheConfig.preset("class-to-image")
    assert (image.shallow, image.start, image.stop) == (4, 1000, 21)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SkipCacheConfig(interval=0), "interval=0"),
        (lambda: SkipCacheConfig(shallow=0), "shallow=0"),
        (lambda: SkipCacheConfig(start=10, stop=20), "stop=20"),
        (lambda: SkipCacheConfig(start=1001), "1000"),
        (lambda: SkipCacheConfig.parse("2-900-50"), "N2-900-50"),
        (lambda: SkipCacheConfig.preset("text-to-video"), "class-to-image"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_counter_runs_through_the_start_window():
    policy = IntervalPolicy(interval=3, start=900, stop=0)
    assert [policy.is_full(counter, 0, t) for counter, t in enumerate((999, 950, 899, 800, 700, 600, 500))] == [
        True, True, False, True, False, False, True,
    ]  # fmt: skip


def test_a_list_of_full_steps_replaces_the_interval():
    config = SkipCacheConfig(full_steps=(0, 5, 4))
    assert config.schedule(range(999, 0, -100)) == [i in (0, 4, 5) for i in range(10)]
    model = tiny()
    model.enable_cache(config)
    trajectory(model, latents())
    assert (model.cache_stats.full, model.cache_stats.reused) == (3, 9)


# ---------------------------------------------------------------------- the two paths


def test_reuse_path_equals_the_full_path_on_the_same_input():
    """With the features of this very step the shallow path must give the full result bit for bit."""
    model, x, t = tiny(), latents(), torch.tensor([500, 500])
    for shallow in (1, 2, 3):
        full = model(x, t, shallow=shallow)
        reused = model(x, t, shallow=shallow, deep_features=full.deep_features)
        assert torch.equal(full.sample, model(x, t).sample)
        assert torch.equal(reused.sample, full.sample)


def test_reuse_path_runs_the_first_and_last_units_only():
    model, x, t = tiny(), latents(), torch.tensor([500, 500])
    ran = []
    for index, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    features = model(x, t, shallow=1).deep_features
    assert ran == list(range(16))
    ran.clear()
    model(x, t, shallow=1, deep_features=features)
    assert ran == [0, 1, 14, 15]


# ---------------------------------------------------------------------- what must hold


def test_interval_one_equals_no_cache_bit_for_bit():
    model, x = tiny(), latents()
    plain = trajectory(model, x)
    model.enable_cache(SkipCacheConfig(interval=1))
    assert torch.equal(trajectory(model, x), plain)
    assert (model.cache_stats.full, model.cache_stats.reused) == (12, 0)


def test_caching_changes_the_result_and_disabling_restores_it():
    model, x = tiny(), latents()
    plain, names = trajectory(model, x), list(model.state_dict())
    model.enable_cache(SkipCacheConfig(interval=3))
    assert model.is_cache_enabled and not torch.equal(trajectory(model, x), plain)
    assert list(model.state_dict()) == names
    model.disable_cache()
    assert not model.is_cache_enabled and model.cache_stats is None
    assert torch.equal(trajectory(model, x), plain)


def test_second_call_and_call_after_an_abort_start_afresh():
    model, x = tiny(), latents()
    model.enable_cache(SkipCacheConfig(interval=4))
    first = trajectory(model, x)
    assert torch.equal(trajectory(model, x), first)
    full = sum(SkipCacheConfig(interval=4).schedule(torch.linspace(999, 0, 12).round().tolist()))
    for stop_after in (2, 7, 1):
        with pytest.raises(KeyboardInterrupt):
            trajectory(model, latents(seed=9), stop_after=stop_after)
        if stop_after == 1:  # a second step 0 counts as the same step, unless the caller resets, as the pipelines do
            model._reset_stateful_cache()
        assert torch.equal(trajectory(model, x), first)
        assert (model.cache_stats.full, model.cache_stats.reused) == (full, 12 - full)


@pytest.mark.parametrize("other", [latents(batch=3), latents(size=4), latents().double().float()[:1]])
def test_another_batch_size_or_resolution_never_sees_old_features(other):
    model = tiny()
    model.enable_cache(SkipCacheConfig(interval=4))
    expected = trajectory(model, other)
    with pytest.raises(KeyboardInterrupt):
        trajectory(model, latents(), stop_after=6)
    # Even if the loop goes on in mid-trajectory with another shape, the first such step is a full one.
    with torch.no_grad(), model.cache_context("cond_uncond", step_index=6, timestep=450.0):
        t = torch.full((len(other),), 450)
        cached = model(other, t).sample
    model.disable_cache()
    assert torch.equal(cached, model(other, t).sample)
    model.enable_cache(SkipCacheConfig(interval=4))
    assert torch.equal(trajectory(model, other), expected)


def test_many_samples_equal_one_by_one():
    model, x = tiny(), latents(batch=3)
    labels = torch.arange(3)
    model.enable_cache(SkipCacheConfig(interval=3))

    @torch.no_grad()
    def run(rows):
        y = x[rows]
        for index, timestep in enumerate((999, 800, 600, 400, 200)):
            with model.cache_context("c", step_index=index, timestep=timestep):
                y = y - 0.1 * model(y, torch.full((len(y),), timestep), labels[rows]).sample[:, :4]
        return y

    together = run([0, 1, 2])
    for row in range(3):
        assert torch.allclose(run([row])[0], together[row], atol=1e-5)


def test_contexts_keep_their_features_apart():
    model, a, b = tiny(), latents(seed=3), latents(seed=4)
    model.enable_cache(SkipCacheConfig(interval=3))
    expected_a, expected_b = trajectory(model, a, name="a"), trajectory(model, b, name="b")

    @torch.no_grad()
    def together(x, y):
        for index, timestep in enumerate(torch.linspace(999, 0, 12).round().tolist()):
            t, labels = torch.full((2,), timestep), torch.arange(2)
            with model.cache_context("a", step_index=index, timestep=timestep):
                x = x - 0.1 * model(x, t, labels).sample[:, :4]
            with model.cache_context("b", step_index=index, timestep=timestep):
                y = y - 0.1 * model(y, t, labels).sample[:, :4]
        return x, y

    x, y = together(a, b)
    assert torch.equal(x, expected_a) and torch.equal(y, expected_b)
    schedule = SkipCacheConfig(interval=3).schedule(torch.linspace(999, 0, 12).round().tolist())
    assert (model.cache_stats.full, model.cache_stats.reused) == (2 * sum(schedule), 2 * (12 - sum(schedule)))


def test_two_models_do_not_share_state():
    one, two, x = tiny(0), tiny(5), latents()
    for model in (one, two):
        model.enable_cache(SkipCacheConfig(interval=3))
    expected = trajectory(one, x), trajectory(two, x)
    with pytest.raises(KeyboardInterrupt):
        trajectory(two, x, stop_after=5)
    assert torch.equal(trajectory(one, x), expected[0]) and torch.equal(trajectory(two, x), expected[1])


def test_a_sampler_that_calls_the_model_twice_a_step_decides_once():
    model, x, t = tiny(), latents(), torch.full((2,), 500)
    model.enable_cache(SkipCacheConfig(interval=2))
    decisions = []
    with torch.no_grad():
        for index in range(4):
            for _ in range(2):
                before = model.cache_stats.full
                with model.cache_context("c", step_index=index, timestep=500.0):
                    model(x, t)
                decisions.append(model.cache_stats.full > before)
    assert decisions == [True, True, False, False, True, True, False, False]


def test_autocast_bfloat16():
    model, x = tiny(), latents()
    with torch.autocast("cpu", torch.bfloat16):
        plain = trajectory(model, x)
        model.enable_cache(SkipCacheConfig(interval=1))
        assert torch.equal(trajectory(model, x), plain)
        model.disable_cache()
        model.enable_cache(SkipCacheConfig(interval=3))
        cached = trajectory(model, x)
    assert cached.isfinite().all() and model.cache_stats.reused > 0 and not torch.equal(cached, plain)


@pytest.mark.parametrize("how", ["torch.compile", "model.compile"])
def test_compiled_model_has_two_graphs_and_the_same_numbers(how):
    graphs = []

    def backend(graph, inputs):
        graphs.append(sum(1 for node in graph.graph.nodes if node.op == "call_function"))
        return graph.forward

    torch._dynamo.reset()
    model, x = tiny(depth=8), latents()
    model.enable_cache(SkipCacheConfig(interval=3))
    eager = trajectory(model, x)
    compiled = model
    if how == "torch.compile":
        compiled = torch.compile(model, backend=backend)
    else:
        model.compile(backend=backend)
    for _ in range(2):
        assert torch.equal(trajectory(compiled, x), eager)
    assert model.cache_stats.reused > 0
    large = [size for size in graphs if size > 20]
    assert len(large) == 2 and len(graphs) <= 3, graphs  # the third: the test loop's own arithmetic, if traced
    torch._dynamo.reset()


# ---------------------------------------------------------------------- what is refused


def test_misuse_is_refused_with_the_reason():
    model, x, t = tiny(), latents(), torch.tensor([5, 5])
    with pytest.raises(ValueError, match="vanilla"):
        tiny(skip=None).enable_cache(SkipCacheConfig())
    with pytest.raises(ValueError, match="shallow=4 is out of range"):
        model.enable_cache(SkipCacheConfig(shallow=4))
    model.enable_cache(SkipCacheConfig())
    with pytest.raises(ValueError, match="enabled already"):
        model.enable_cache(SkipCacheConfig())
    with model.cache_context("c", step_index=0, timestep=5.0):
        with torch.enable_grad(), pytest.raises(RuntimeError, match="no gradient"):
            model(x, t)
        with torch.no_grad(), pytest.raises(ValueError, match="chooses the path itself"):
            model(x, t, shallow=1)
    with torch.no_grad(), model.cache_context("c"), pytest.raises(ValueError, match="step_index"):
        model(x, t)
    with torch.no_grad(), pytest.raises(ValueError, match="cache context"):
        model(x, t)


# ---------------------------------------------------------------------- diffusers' own caches


def attached(config, **overrides):
    model = tiny(**overrides)
    plain = trajectory(model, latents())
    model.enable_cache(config)
    model._reset_stateful_cache()
    cached = trajectory(model, latents())
    model._reset_stateful_cache()
    model.disable_cache()
    assert torch.equal(trajectory(model, latents()), plain)
    return plain, cached


def test_first_block_cache_works_on_vanilla_models():
    plain, cached = attached(FirstBlockCacheConfig(threshold=0.0), skip=None)
    assert torch.allclose(cached, plain, atol=1e-6)  # a threshold of 0 never skips
    plain, cached = attached(FirstBlockCacheConfig(threshold=1e9), skip=None)
    assert not torch.allclose(cached, plain, atol=1e-6) and cached.isfinite().all()


def test_first_block_cache_adds_frame_positions_once():
    """Skipped blocks must not leave the frame positions to be added a second time to the remembered residual."""
    model, x, t = tiny(skip=None), latents(), torch.tensor([500, 500])
    model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    with torch.no_grad(), model.cache_context("c"):
        first, again = model(x, t).sample, model(x, t).sample  # the second call skips every block but the first
    assert torch.allclose(first, again, atol=1e-5)


def test_pyramid_attention_and_taylorseer_work_on_both():
    timestep = {"now": 500}
    for skip in (None, "linear"):
        pab = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: timestep["now"]
        )
        plain, cached = attached(pab, skip=skip)
        assert not torch.equal(cached, plain) and cached.isfinite().all()
        plain, cached = attached(
            TaylorSeerCacheConfig(
                cache_interval=3, disable_cache_before_step=2, cache_identifiers=[r"blocks\.\d+\.attn"]
            ),
            skip=skip,
        )
        assert not torch.equal(cached, plain) and cached.isfinite().all()


def test_mag_cache_works_on_vanilla_models():
    plain, cached = attached(
        MagCacheConfig(threshold=10.0, max_skip_steps=2, num_inference_steps=12, mag_ratios=[1.0] * 12), skip=None
    )
    assert not torch.equal(cached, plain) and cached.isfinite().all()


def test_caches_that_cannot_work_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="long skips of this model"):
        tiny().enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="long skips of this model"):
        tiny().enable_cache(MagCacheConfig(num_inference_steps=4, mag_ratios=[1.0] * 4))
    with pytest.raises(ValueError, match="text-conditioned"):
        tiny(skip=None).enable_cache(FasterCacheConfig())
    model = tiny()
    with pytest.raises(ValueError):
        model.enable_cache(FirstBlockCacheConfig())
    assert not model.is_cache_enabled
