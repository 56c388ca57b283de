"""``fastsae plan``: what a run will need and take, worked out before any weights are loaded."""
