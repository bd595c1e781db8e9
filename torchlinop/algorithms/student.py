"""Quantiles of Student's t."""


def student_quantile(freedom: int, probability: float) -> float:
    """The number that t, of ``freedom`` degrees, is below with this probability."""
    from scipy.special import stdtrit  # noqa: PLC0415  # it takes longer to import than torchlinop

    return float(stdtrit(freedom, probability))
