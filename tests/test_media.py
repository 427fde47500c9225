"""Files hold what was given, whole or not at all; grids put each clip where its caption is."""

import av
import numpy as np
import pytest
from PIL import Image

from skipdit.errors import UserError
from skipdit.files import check_writable, written_whole
from skipdit.media import (
    add_captions,
    make_grid,
    make_sheet,
    npz_array,
    to_uint8,
    upscale,
    write_frames,
    write_gif,
    write_mp4,
    write_png,
)


def smooth_clip(length: int = 5, height: int = 32, width: int = 48) -> np.ndarray:
    """Soft gradients that move, [T, H, W, 3]; their hue varies slowly, since 4:2:0 halves its resolution."""
    t, y, x = np.meshgrid(np.arange(length), np.arange(height), np.arange(width), indexing="ij")
    light, hue = np.sin(x / 9 + t / 3) * np.cos(y / 7 - t / 4), np.sin((x + y) / 40)
    return to_uint8(np.stack([light + hue / 4, light, light - hue / 4], axis=-1) * 0.4 + 0.5)


def decoded(path) -> tuple[np.ndarray, float]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)]), float(stream.average_rate)


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    return -10 * np.log10(np.mean((a.astype(float) - b) ** 2) / 255**2)


def test_to_uint8_rounds_and_clips():
    values = np.array([-1, 0, 0.5 / 255 - 1e-6, 0.5 / 255 + 1e-6, 0.5, 254.6 / 255, 1, 7])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 128, 255, 255, 255]


@pytest.mark.parametrize("fps", [8, 29.97])
def test_mp4_holds_the_clip(tmp_path, fps):
    clip = smooth_clip()
    write_mp4(tmp_path / "clip.mp4", clip, fps)
    frames, rate = decoded(tmp_path / "clip.mp4")
    assert frames.shape == clip.shape and rate == pytest.approx(fps, rel=1e-3)
    assert decibels(frames, clip) > 40


def test_mp4_pads_odd_sides_by_the_edge(tmp_path):
    clip = smooth_clip(height=31, width=45)
    write_mp4(tmp_path / "clip.mp4", clip, 8)
    frames, _ = decoded(tmp_path / "clip.mp4")
    assert frames.shape == (5, 32, 46, 3)
    assert decibels(frames[:, :31, :45], clip) > 40
    assert decibels(frames[:, 31, :45], clip[:, 30]) > 35


def test_gif_holds_frames_and_durations(tmp_path):
    clip = np.zeros((4, 8, 8, 3), np.uint8)
    clip[..., 0] = np.array([0, 80, 160, 240])[:, None, None]
    write_gif(tmp_path / "clip.gif", clip, fps=8)
    with Image.open(tmp_path / "clip.gif") as gif:
        assert gif.n_frames == 4 and gif.info["loop"] == 0
        for index in range(4):
            gif.seek(index)
            assert gif.info["duration"] == 120  # an eighth of a second in the format's hundredths
            np.testing.assert_array_equal(np.asarray(gif.convert("RGB")), clip[index])


def test_png_frames_and_npz_are_exact(tmp_path):
    clips = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 7, 3), dtype=np.uint8)
    write_png(tmp_path / "picture.png", clips[0, 0])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "picture.png")), clips[0, 0])

    write_frames(tmp_path / "clip", clips[0])
    write_frames(tmp_path / "clip", clips[1, :2])  # replaces the older, longer one
    files = sorted((tmp_path / "clip").iterdir())
    assert [file.name for file in files] == ["00000.png", "00001.png"]
    np.testing.assert_array_equal(np.stack([np.asarray(Image.open(file)) for file in files]), clips[1, :2])

    with npz_array(tmp_path / "all.npz", clips.shape) as array:
        array[:2], array[2:] = clips[:2], clips[2:]
    stored = np.load(tmp_path / "all.npz")
    assert stored.files == ["arr_0"] and stored["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(stored["arr_0"], clips)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.npz", "clip", "picture.png"]


def test_a_failed_write_leaves_what_was_there(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(RuntimeError), written_whole(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    with pytest.raises(RuntimeError), npz_array(tmp_path / "b.npz", (1, 2, 2, 3)):
        raise RuntimeError
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "old")]


def test_unwritable_folder_is_a_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another output folder"):
        check_writable(tmp_path / "file" / "below")
    assert check_writable(tmp_path / "new" / "folder").is_dir()


def test_upscale_repeats_pixels():
    frames = smooth_clip(2, 3, 4)
    large = upscale(frames, 3)
    assert large.shape == (2, 9, 12, 3)
    for shift in range(3):
        np.testing.assert_array_equal(large[:, shift::3, shift::3], frames)


def test_grid_places_clips_row_by_row():
    clips = np.random.default_rng(0).integers(0, 200, (5, 2, 128, 128, 3), dtype=np.uint8)
    grid = make_grid(clips, columns=3, gap=4)
    assert grid.shape == (2, 2 * 132 + 4, 3 * 132 + 4, 3)
    for index in range(5):
        top, left = 4 + index // 3 * 132, 4 + index % 3 * 132
        np.testing.assert_array_equal(grid[:, top : top + 128, left : left + 128], clips[index])
    assert (grid[:, 136:, 268:] == 255).all()  # the sixth place is empty


def test_grid_enlarges_small_clips_and_captions_every_cell():
    clips = np.zeros((2, 3, 32, 32, 3), np.uint8)
    grid = make_grid(clips, ["short", "a name that is far too long for its cell"], gap=4)
    assert grid.shape == (3, 22 + 128 + 8, 2 * 128 + 12, 3)
    captions = grid[0, 4:26]
    assert (captions[:, 4:132] < 128).any() and (captions[:, 136:264] < 128).any()
    assert (captions[:, 132:136] == 255).all() and (captions[:, 264:] == 255).all()  # cut to the cell


def test_captions_differ_by_text_only():
    cells = np.zeros((2, 1, 40, 60, 3), np.uint8)
    same = add_captions(cells, ["cat", "cat"])
    np.testing.assert_array_equal(same[0], same[1])
    other = add_captions(cells, ["cat", "dog"])
    assert (other[0] != other[1]).any()
    np.testing.assert_array_equal(other[:, :, -40:], cells)


def test_sheet_shows_every_frame_of_every_row():
    clips = [np.full((3, 8, 8, 3), value, np.uint8) for value in (10, 90)]
    clips[1][2] = 200
    words = ["first", "middle", "last"]
    sheet = make_sheet([("no cache", clips[0]), ("N=2", clips[1])], "cat", words, scale=2, gap=2)
    assert sheet.shape[0] == 10 + 26 + 18 + 2 * 18 + 10  # padding, title, column words, rows, padding
    right = sheet[54:, -3 * 18 - 10 :]
    assert right[8, [8, 26, 44], 0].tolist() == [10, 10, 10]
    assert right[26, [8, 26, 44], 0].tolist() == [90, 90, 200]
