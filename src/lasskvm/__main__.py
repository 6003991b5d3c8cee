"""``python -m lasskvm``."""

from lasskvm.cli import main

if __name__ == "__main__":
    main(prog_name="lasskvm")
