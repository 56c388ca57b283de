"""A run as one HTML file that needs no network and no server. ``fastsae report``."""
