"""Labels in, pictures or clips out: class-conditional pipelines in the diffusers way."""

from .base import SkipPipeline
from .dit import SkipDiTPipeline
from .guidance import guide
from .latte import SkipLattePipeline, SkipLattePipelineOutput

__all__ = ["SkipDiTPipeline", "SkipLattePipeline", "SkipLattePipelineOutput", "SkipPipeline", "guide"]
