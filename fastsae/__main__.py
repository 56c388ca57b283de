"""``python -m fastsae`` is the ``fastsae`` command."""

from .cli import main

if __name__ == "__main__":
    main()
