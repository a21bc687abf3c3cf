"""Which groups of an encoder's parameters are worth training, and by which measure."""
