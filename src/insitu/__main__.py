"""``python -m insitu``, as torchrun starts it."""

from insitu.cli import main

if __name__ == "__main__":
    main()
