"""The crops that every loader makes in the benchmarks: those of the paper's pretraining of a ViT-B."""

from kamim.method import geometry

RESOLUTION = 192  # px
SCALE = (0.67, 1.0)  # share of the image's area
RATIO = geometry.CROP_RATIO  # width / height
PATCH_SIZE, TEMPERATURE = 8, 0.25  # w_ps in px, and T
