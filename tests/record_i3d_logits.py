"""Record golden/i3d_logits.json: logits of I3D by another implementation, to be run by hand where JAX is installed.

    python tests/record_i3d_logits.py pretrained/metrics/i3d-kinetics-400.ckpt tests/golden/i3d_logits.json

Shares nothing with skipdit: kernels stay in TensorFlow's order and padding 'SAME' is XLA's own, batch norm is
computed after the convolution, and the layers are found by walking the names in the checkpoint. Needs jax alone.
"""

import json
import pickle
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

FRAMES = (9, 16, 25)  # odd and even ones are padded differently; 25 frames leave three positions to average over
POOLS = {  # the layer behind each pooling -> its kernel and stride in time, height, width (paper, Figure 3)
    "Conv3d_2b_1x1": ((1, 3, 3), (1, 2, 2)),
    "Mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ((2, 2, 2), (2, 2, 2)),
}


def wave(frames: int) -> np.ndarray:
    """A clip in closed form, float32 [1, T, 224, 224, 3] within [-1, 1]; test_networks.py has it too."""
    t, y, x, c = np.ogrid[:frames, :224, :224, :3]
    clip = 0.6 * np.sin(0.05 * x + 0.3 * t + c) + 0.4 * np.cos(0.11 * y - 0.2 * t + 2 * c + 0.0007 * x * y)
    return clip.astype(np.float32)[None]


def convolve(x, kernel, stride=1):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride,) * 3, "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC"), precision="highest"
    )


def unit(x, params, stats, stride=1):
    norm, moments = params["BatchNorm_0"], stats["BatchNorm_0"]
    x = convolve(x, params["Conv_0"]["kernel"], stride)
    return jax.nn.relu((x - moments["mean"]) / jnp.sqrt(moments["var"] + 1e-3) + norm["bias"])


def max_pool(x, kernel, stride):
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, *kernel, 1), (1, *stride, 1), "SAME")


def mixed(x, params, stats):
    outputs = []
    for branch in ("Branch_0", "Branch_1", "Branch_2", "Branch_3"):
        y = max_pool(x, (3, 3, 3), (1, 1, 1)) if branch == "Branch_3" else x
        for layer in sorted(name for name in params if name.startswith(branch)):  # 0a before 0b
            y = unit(y, params[layer], stats[layer])
        outputs.append(y)
    return jnp.concatenate(outputs, axis=-1)


def logits(tree, x):
    params, stats = tree["params"], tree["batch_stats"]
    for layer in sorted(
        set(params) - {"Logits/Conv3d_0c_1x1"}
    ):  # Conv3d_1a, 2b, 2c, Mixed_3b .. Mixed_5c: in their order
        if layer in POOLS:
            x = max_pool(x, *POOLS[layer])
        if layer.startswith("Mixed"):
            x = mixed(x, params[layer], stats[layer])
        else:
            x = unit(x, params[layer], stats[layer], stride=2 if layer == "Conv3d_1a_7x7" else 1)
    window = (1, 2, 7, 7, 1)
    x = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, (1,) * 5, "VALID") / (2 * 7 * 7)
    head = params["Logits/Conv3d_0c_1x1"]["Conv_0"]
    return (convolve(x, head["kernel"]) + head["bias"]).mean(axis=(1, 2, 3))


def main(weights: str, target: str) -> None:
    with open(weights, "rb") as file:
        tree = pickle.load(file)  # runs what the file says: only for a file whose hash has been checked
    forward = jax.jit(partial(logits, tree))
    record = {
        "clip": "wave(frames) of tests/record_i3d_logits.py",
        "by": f"jax {jax.__version__}, CPU, float32",
        "logits": {str(n): [float(f"{v:.7g}") for v in np.asarray(forward(wave(n)))[0]] for n in FRAMES},
    }
    with open(target, "w") as file:
        json.dump(record, file)
        file.write("\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
