"""How a conversion fails."""


class ConversionError(RuntimeError):
    """Weights that cannot be converted: which file or tensor, what is wrong, what to do."""
