"""How good coders are: on their own, and grafted into the model. ``fastsae eval`` and ``fastsae.evaluate``."""
