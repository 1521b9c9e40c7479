"""``python -m leveret`` is ``leveret``."""

from leveret.cli import main

if __name__ == "__main__":
    main()
