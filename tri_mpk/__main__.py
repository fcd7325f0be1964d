"""`python -m tri_mpk` is `tri-mpk`."""

from tri_mpk.cli import main

if __name__ == "__main__":
    main()
