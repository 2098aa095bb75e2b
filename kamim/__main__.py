"""`python -m kamim`, for torchrun."""

from kamim.cli import main

if __name__ == "__main__":
    main()
