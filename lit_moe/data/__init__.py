"""Lightning data modules. Calibration, recovery, validation and test text never mix."""

from lit_moe.data.augmentation import Augmentation as Augmentation
from lit_moe.data.images import ImageDataModule as ImageDataModule
from lit_moe.data.tasks import SplitFractions as SplitFractions
from lit_moe.data.tasks import TaskDataModule as TaskDataModule
from lit_moe.data.text import TextDataModule as TextDataModule
