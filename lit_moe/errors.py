"""The errors a user can mend, and the warning for work that changed nothing."""


class LitMoEError(ValueError):
    """A request that cannot be met: the message says what was asked, found, and would work."""


class NotAnMoEError(LitMoEError):
    """The model has no sparse Mixture-of-Experts layer that lit-moe could act on."""


class UnsupportedModelError(LitMoEError):
    """The model has experts, but they cannot be observed or removed correctly; says why."""


class PlanError(LitMoEError):
    """A plan that is malformed, impossible for the router, or made for another model."""


class CalibrationError(LitMoEError):
    """Calibration gave nothing usable: no tokens, non-finite activations, a tap that disturbs."""


class ExportError(LitMoEError):
    """An export that could not be written or did not verify; nothing half-written remains."""


class NoEffectWarning(UserWarning):
    """Something was asked for that changed nothing."""
