"""An export leaves the model as it was, on all ranks, whatever it is cast to."""

import pytest

from lit_moe.callbacks import ExportModel, ReportWriter
from tests.distributed.runs import Losses, some

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("dtype", some(["bfloat16"], ["float32"]))
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("mode", some(["single", "zero3"], ["ddp", "zero2", "zero3-sharded-load"]))
def test_validation_training_and_a_second_export_do_not_see_the_first(
    setup, mode, precision, dtype
):
    def afterwards(trainer, module):
        dtypes = {name: str(p.dtype) for name, p in module.named_parameters()}
        (metrics,) = trainer.validate(module, datamodule=trainer.datamodule, verbose=False)
        trainer.fit_loop.epoch_loop.max_steps = 4
        trainer.callbacks = [c for c in trainer.callbacks if isinstance(c, Losses)]
        trainer.fit(module, datamodule=trainer.datamodule)
        return dtypes, metrics["validation/loss"], list(trainer.callbacks[0].values)

    def exporting():
        first, second = (ExportModel(path=path, dtype=dtype) for path in ("first", "second"))
        return [ReportWriter(False, False), first, second]

    options = {"precision": precision, "max_steps": 2, "limit_val_batches": 2, "look": afterwards}
    without = setup.fit(mode, "without", lambda: [ReportWriter(False, False)], **options)
    assert setup.fit(mode, "with", exporting, **options) == without
    assert len(without[0][2]) == 4
    folder = setup.folder / "with" / mode
    files = [folder / name / "model.safetensors" for name in ("first", "second")]
    assert files[0].read_bytes() == files[1].read_bytes()
