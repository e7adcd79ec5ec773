"""`python -m espalier`, which torchrun and `accelerate launch` need."""

from espalier.cli import main

if __name__ == "__main__":
    main()
