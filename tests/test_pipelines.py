"""Pipelines: recorded trajectories, conventions of diffusers, results that do not depend on batching."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from golden_data import FAMILIES, golden, golden_model, relative_error

from skipdit import SkipCacheConfig, SkipDiTPipeline, SkipLattePipeline, make_scheduler
from skipdit.pipelines import guide

NAMES = ["apple", "boat", "cat", "dog", "elk", "fox", "goat"]


SOLVERS = (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)


def small_vae() -> AutoencoderKL:
    torch.manual_seed(3)
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4,
    ).eval().requires_grad_(False)  # fmt: skip


def pipeline(family: str = "latte_skip", sampler: str = "ddim", **overrides):
    kind = SkipLattePipeline if family == "latte_skip" else SkipDiTPipeline
    model = golden_model(family, **overrides)
    names = NAMES[: model.config.num_classes] if model.config.num_classes else None
    pipe = kind(transformer=model, vae=small_vae(), scheduler=make_scheduler(sampler), class_names=names)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("family", FAMILIES)
def test_trajectories_agree_with_the_published_code(family, monkeypatch):
    tensors, about = golden(family)
    for recorded in about["trajectories"]:
        pipe = pipeline(family, recorded["method"])
        # The recorded noise of each DDPM step takes the place of the generator's.
        noise = iter(tensors["sample.ddpm_step_noise"])
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, noise=noise, **__: next(noise)
        )
        pipe.transformer.enable_cache(
            SkipCacheConfig(
                interval=recorded["interval"],
                shallow=recorded.get("shallow_pairs", recorded.get("shallow_blocks")),
                start=recorded["start"],
                stop=recorded["stop"] if "stop" in recorded else recorded["stop_inclusive"] + 1,
            )
        )
        out = pipe(
            class_labels=tensors["sample.labels"],
            num_inference_steps=recorded["steps"],
            guidance_scale=about["guidance_scale"],
            guidance_channels=about["guidance_channels"],
            latents=tensors["sample.noise"],
            output_type="latent",
            return_dict=False,
        )[0]
        assert relative_error(out, tensors[recorded["key"]]) < 1e-5, recorded["key"]
        stats = pipe.transformer.cache_stats
        assert (stats.full, stats.reused) == (sum(recorded["full_step"]), recorded["full_step"].count(False))


@pytest.mark.parametrize("family", FAMILIES)
def test_guided_forward_agrees_with_the_published_code(family):
    tensors, about = golden(family)
    model, x, labels = golden_model(family), tensors["sample.noise"], tensors["cfg.labels"]
    null = torch.full_like(labels, model.null_class)
    out = model(torch.cat([x, x]), torch.full((2 * len(x),), 500), torch.cat([labels, null])).sample
    guided = guide(out, about["guidance_scale"], about["guidance_channels"])
    assert relative_error(guided, tensors["cfg.output"]) < 1e-5


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++", "unipc"])
def test_a_clip_does_not_depend_on_its_batch(sampler, guidance_scale):
    pipe = pipeline(sampler=sampler)
    pipe.transformer.enable_cache(SkipCacheConfig(interval=2))

    def run(labels, seeds):
        inputs = {"num_inference_steps": 6, "guidance_scale": guidance_scale, "output_type": "latent"}
        return pipe(class_labels=labels, generator=generators(*seeds), **inputs).frames

    together = run([0, 3, 1], (7, 8, 9))
    for row, (label, seed) in enumerate([(0, 7), (3, 8), (1, 9)]):
        assert relative_error(run([label], (seed,))[0], together[row]) < 1e-4


def test_interval_one_is_bit_for_bit_and_interval_two_is_not():
    pipe = pipeline()
    inputs = {"class_labels": [1, 2], "num_inference_steps": 10, "output_type": "latent"}
    plain = pipe(**inputs, generator=torch.manual_seed(0)).frames
    pipe.transformer.enable_cache(SkipCacheConfig(interval=1))
    assert torch.equal(pipe(**inputs, generator=torch.manual_seed(0)).frames, plain)
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(SkipCacheConfig(interval=2))
    assert not torch.equal(pipe(**inputs, generator=torch.manual_seed(0)).frames, plain)


def test_an_exception_in_mid_loop_leaves_nothing_behind():
    pipe = pipeline()
    pipe.transformer.enable_cache(SkipCacheConfig(interval=4))
    inputs = {"class_labels": [1, 2], "num_inference_steps": 10, "output_type": "latent"}
    expected = pipe(**inputs, generator=torch.manual_seed(0)).frames

    def stop(pipe, index, timestep, tensors):
        if index == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(**inputs, generator=torch.manual_seed(9), callback_on_step_end=stop)
    assert pipe.current_timestep is None
    assert torch.equal(pipe(**inputs, generator=torch.manual_seed(0)).frames, expected)


def test_two_pipelines_do_not_share_state():
    one, two = pipeline(), pipeline(skip="linear")
    two.transformer.skip_linears[0].linear.weight.mul_(2)
    inputs = {"class_labels": [1], "num_inference_steps": 8, "output_type": "latent"}
    for pipe in (one, two):
        pipe.transformer.enable_cache(SkipCacheConfig(interval=3))
    expected = one(**inputs, generator=torch.manual_seed(0)).frames

    def interleave(_, index, timestep, tensors):
        if index == 3:
            two(**inputs, generator=torch.manual_seed(1))

    mixed = one(**inputs, generator=torch.manual_seed(0), callback_on_step_end=interleave).frames
    assert torch.equal(mixed, expected)


def test_the_loop_reads_no_device_value(monkeypatch):
    """`item`, `tolist`, `cpu`, `int()` and `bool()` of a tensor would make the host wait for a GPU."""
    pipe = pipeline()
    pipe.transformer.enable_cache(SkipCacheConfig(interval=2))
    read = []

    def begin(pipe, index, timestep, tensors):
        if index == 0:
            for name in ("item", "tolist", "cpu", "__bool__", "__int__", "__float__", "numpy"):
                original = getattr(torch.Tensor, name)

                def spy(self, *args, name=name, original=original, **kwargs):
                    if self.numel() > 1 or self.data_ptr() not in schedule:  # the timestep list lives on the host
                        read.append(name)
                    return original(self, *args, **kwargs)

                monkeypatch.setattr(torch.Tensor, name, spy)

    schedule: set[int] = set()
    pipe.scheduler.set_timesteps(8)
    original_set = pipe.scheduler.set_timesteps

    def set_timesteps(*args, **kwargs):
        original_set(*args, **kwargs)
        schedule.update(t.data_ptr() for t in pipe.scheduler.timesteps)

    monkeypatch.setattr(pipe.scheduler, "set_timesteps", set_timesteps)
    pipe(class_labels=[1], num_inference_steps=8, output_type="latent", callback_on_step_end=begin)
    monkeypatch.undo()
    assert read == []


def test_save_and_load_with_names(tmp_path):
    pipe = pipeline()
    pipe.save_pretrained(tmp_path)
    loaded = SkipLattePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.class_names == NAMES[:5]
    assert type(loaded.scheduler) is type(pipe.scheduler)
    by_index = pipe([2, 0], num_inference_steps=3, generator=torch.manual_seed(0), output_type="latent").frames
    by_name = loaded(
        ["cat", "apple"], num_inference_steps=3, generator=torch.manual_seed(0), output_type="latent"
    ).frames
    assert torch.equal(by_index, by_name)


def test_output_types_agree():
    pipe = pipeline()
    out = {
        kind: pipe([0, 4], num_inference_steps=2, generator=torch.manual_seed(0), output_type=kind, decode_chunk_size=3)
        for kind in ("pil", "np", "pt", "latent")
    }
    assert out["np"].frames.shape == (2, 4, 16, 16, 3) and out["latent"].frames.shape == (2, 4, 4, 8, 8)
    assert np.allclose(out["pt"].frames.permute(0, 1, 3, 4, 2).numpy(), out["np"].frames)
    pixels = np.stack([np.stack([np.asarray(frame) for frame in clip]) for clip in out["pil"].frames])
    assert np.array_equal(pixels, (out["np"].frames * 255).round().astype(np.uint8))
    one_by_one = pipe(
        [0, 4], num_inference_steps=2, generator=torch.manual_seed(0), output_type="np", decode_chunk_size=1
    )
    assert np.allclose(one_by_one.frames, out["np"].frames, atol=1e-5)


def test_decoding_never_holds_more_frames_than_the_chunk():
    pipe = pipeline()
    seen = []
    pipe.vae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    pipe([0], num_inference_steps=2, num_frames=11, decode_chunk_size=4)
    assert seen == [4, 4, 3]


def test_pictures_and_tiny_autoencoder():
    pipe = pipeline("dit_skip")
    assert [image.size for image in pipe(["cat", 0], num_inference_steps=2).images] == [(16, 16)] * 2
    pipe.vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=4,
    ).eval()  # fmt: skip
    assert pipe([1], num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)


def test_other_sizes():
    pipe = pipeline()
    clip = pipe([1], num_inference_steps=2, num_frames=6, height=8, width=24, output_type="np").frames
    assert clip.shape == (1, 6, 8, 24, 3)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize(
    "kind",
    [
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
        UniPCMultistepScheduler,
    ],
)
def test_any_scheduler_from_config(kind, sampler):
    pipe = pipeline(sampler=sampler)
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    pipe.transformer.enable_cache(SkipCacheConfig(interval=2))
    out = pipe([1], num_inference_steps=5, generator=torch.manual_seed(0), output_type="latent").frames
    assert out.isfinite().all() and pipe.transformer.cache_stats.reused > 0


def test_fast_solver_comes_close_to_many_ddim_steps():
    inputs = {"class_labels": [1], "guidance_scale": 1.0, "output_type": "latent"}
    many = pipeline()(**inputs, num_inference_steps=500, generator=torch.manual_seed(0)).frames
    fast = pipeline(sampler="dpm++")(**inputs, num_inference_steps=25, generator=torch.manual_seed(0)).frames
    slow = pipeline()(**inputs, num_inference_steps=25, generator=torch.manual_seed(0)).frames
    assert relative_error(fast, many) < relative_error(slow, many)


def test_unconditional_model():
    pipe = pipeline(num_classes=None)
    assert len(pipe(num_samples=3, num_inference_steps=2).frames) == 3
    with pytest.raises(ValueError, match="unconditional"):
        pipe(class_labels=[1])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "class-conditional"),
        ({"class_labels": ["cta"]}, "did you mean 'cat'"),
        ({"class_labels": [5]}, "classes 0 to 4"),
        ({"class_labels": [1], "output_type": "jpg"}, "output_type='jpg'"),
        ({"class_labels": [1, 2], "generator": generators(0)}, "1 generators for 2"),
        ({"class_labels": [1], "latents": torch.zeros(1, 4, 4, 8, 9)}, "Expected latents"),
        ({"class_labels": [1], "height": 15}, "height=15"),
        ({"class_labels": [1], "num_samples": 2}, "contradicts"),
        ({"class_labels": [1], "num_inference_steps": 0}, "num_inference_steps=0 must be 1 or more"),
        ({"class_labels": [1], "decode_chunk_size": 0}, "decode_chunk_size=0 must be 1 or more"),
        ({"class_labels": [1], "guidance_channels": 9}, "guidance_channels=9 must be 1 to 4"),
        ({"class_labels": [1], "guidance_scale": float("nan")}, "guidance_scale=nan must be finite"),
        ({"class_labels": [2.7]}, "2.7 is neither an index nor a name"),
    ],
)
def test_bad_inputs_are_refused_before_any_work(inputs, message):
    with pytest.raises(ValueError, match=message):
        pipeline()(**inputs)
