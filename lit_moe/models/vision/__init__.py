"""V-MoEs made of other models, checks of them against data, and the theory on synthetic data."""

from lit_moe.models.vision.labels import check_images as check_images
from lit_moe.models.vision.labels import check_labels as check_labels
from lit_moe.models.vision.npz import vmoe_from_npz as vmoe_from_npz
from lit_moe.models.vision.upcycling import upcycle as upcycle
