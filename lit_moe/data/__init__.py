"""Lightning data modules. Calibration, recovery, validation and test text never mix."""

from lit_moe.data.text import TextDataModule as TextDataModule
