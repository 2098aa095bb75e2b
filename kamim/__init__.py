"""kamim: Keypoint Aware Masked Image Modelling.

Rooms, and the way imports point: docs/architecture.md.
"""

__version__ = "0.1.0"
