"""A training run in a process of its own, forked from one that has imported everything, so that it starts at once."""

import multiprocessing

import torch

from skipdit.config import load_config
from skipdit.data.digits import digit_images
from skipdit.training.config import TrainConfig
from skipdit.training.loop import Trainer

digit_images("train")  # imports scikit-learn


def run(words: list[str]) -> None:
    """Train with these settings on one thread."""
    torch.set_num_threads(1)
    Trainer(load_config(TrainConfig, None, words)).fit()


def context() -> multiprocessing.context.BaseContext:
    """Where to start `run` in."""
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(["training_child"])
    return forking
