"""Networks whose features the metrics compare: I3D for clips, Inception-v3 for pictures."""

from .detectors import Detector, load_detector
from .i3d import I3D

__all__ = ["I3D", "Detector", "load_detector"]
